"""``jit`` and ``tl`` for tile decoders, with or without Triton.

Formats must decode on machines that have no Triton (the torch paths need none), so their files
take both names from here. Without Triton a tile decoder is None, and the kernels that would use it
do not load either.
"""

from __future__ import annotations

__all__ = ["jit", "nibbles", "small_to_float", "tl"]

try:
    import triton.language as tl
    from triton import jit
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "triton":
        raise
    tl = None

    def jit(function: object) -> None:
        """Stand in for ``triton.jit``."""


@jit
def small_to_float(q, offset: tl.constexpr):
    """float32 ``q - offset`` of int32 q from 0 to 2^23 - 1, exactly.

    Puts q into the mantissa of 2^23 and subtracts: two full-rate instructions, where the
    conversion that the compiler would choose for small integers runs at a quarter of the rate.
    """
    return (q | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + offset)


@jit
def nibbles(packed):
    """int32 [..., n] of bytes -> [..., 2 n]: the low nibbles, then the high ones.

    Joined in registers, so that each byte is read once.
    """
    pairs = tl.join(packed & 15, packed >> 4)
    return pairs.permute(0, 1, 3, 2).reshape(packed.shape[0], packed.shape[1], 2 * packed.shape[2])
