"""``jit`` and ``tl`` for tile decoders, with or without Triton.

Formats must decode on machines that have no Triton (the torch paths need none), so their files
take both names from here. Without Triton a tile decoder is None, and the kernels that would use it
do not load either.
"""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "triton":
        raise
    tl = None

    def jit(function: object) -> None:
        """Stand in for ``triton.jit``."""


__all__ = ["jit", "tl"]
