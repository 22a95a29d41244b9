"""How keys and values lie in their pages: plain floats, float8, or packed with a scale per 32 dims.

| name | a head of D dims | bits per value |
|------|------------------|----------------|
| f32, f16, bf16 | D numbers | 32, 16, 16 |
| fp8 | D float8_e4m3fn, beyond +-448 cut to that | 8 |
| q8_0 | D int8, then D / 32 float16 scales | 8.5 |
| q4_0 | D / 2 bytes, two neighbours each, the first one low; then D / 32 float16 scales | 4.5 |

Packed pages are uint8. They are written as ggml quantizes (``scale * q`` with q in -127..127, and
``scale * (q - 8)`` with q in 0..15), every token and head by itself, so that its bits depend on
nothing else.

Shapes: P pages of S slots, Hkv heads of D dims in R elements. Pages are [P, S, Hkv, R].

Source: ggml-quants.c, quantize_row_q8_0_ref and quantize_row_q4_0_ref.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oxillama_torch.errors import UnsupportedError

__all__ = ["KVFormat", "decode", "encode", "find", "format_of", "raw"]

_GROUP = 32  # dims that share a scale
_FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class KVFormat:
    """One way of keeping keys and values.

    Args:
        name: as ``EngineConfig.kv_dtype`` has it.
        dtype: of the pages.
        dims, elements: so many dims of a head take so many elements of the pages.
    """

    name: str
    dtype: torch.dtype
    dims: int = 1
    elements: int = 1

    @property
    def packed(self) -> bool:
        """Whether dims share a scale."""
        return self.dims > 1

    def row(self, dim: int) -> int:
        """Elements that a head of ``dim`` dims takes.

        Raises:
            UnsupportedError: its dims do not fill groups.
        """
        if dim % self.dims:
            supported = (f"multiples of {self.dims}", "f32, f16, bf16 and fp8 with any head dim")
            raise UnsupportedError(f"keys and values as {self.name}, head dim {dim}", supported)
        return dim // self.dims * self.elements

    def row_bytes(self, dim: int) -> int:
        """Bytes that a head of ``dim`` dims takes; errors as ``row``'s."""
        return self.row(dim) * self.dtype.itemsize

    def dim(self, row: int) -> int | None:
        """Dims of a head that takes ``row`` elements; None: no head does."""
        return None if row % self.elements else row // self.elements * self.dims


_FORMATS = {
    format.name: format
    for format in (
        KVFormat("f32", torch.float32),
        KVFormat("f16", torch.float16),
        KVFormat("bf16", torch.bfloat16),
        KVFormat("fp8", torch.float8_e4m3fn),
        KVFormat("q8_0", torch.uint8, _GROUP, _GROUP + 2),
        KVFormat("q4_0", torch.uint8, _GROUP, _GROUP // 2 + 2),
    )
}


def find(name: str, activations: torch.dtype | None) -> KVFormat:
    """The format of a ``kv_dtype``; ``"auto"`` is the activations' own.

    Raises:
        UnsupportedError: there is no such format.
    """
    if name == "auto":
        return next(f for f in _FORMATS.values() if f.dtype == activations)
    if name not in _FORMATS:
        raise UnsupportedError(f"kv_dtype {name!r}", ("auto", *_FORMATS))
    return _FORMATS[name]


def format_of(pages: torch.Tensor, dim: int, name: str = "k_pages") -> KVFormat:
    """The format of pages [P, S, Hkv, R] of heads of ``dim`` dims, by their dtype and R.

    Raises:
        ValueError: there is none with that dtype and R.
    """
    with_dtype = [f for f in _FORMATS.values() if f.dtype == pages.dtype]
    rows = {dim // f.dims * f.elements: f for f in with_dtype if dim % f.dims == 0}
    if pages.shape[-1] not in rows:
        wanted = " or ".join(f"(P, S, HKV, {row}) as {f.name}" for row, f in rows.items())
        wanted = wanted or f"the dtype of {', '.join(_FORMATS)}"
        raise ValueError(f"{name}: got {tuple(pages.shape)} {pages.dtype}, wanted {wanted}")
    return rows[pages.shape[-1]]


def raw(pages: torch.Tensor) -> torch.Tensor:
    """Pages as kernels and index operations take them: float8 as bytes."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages


def encode(x: torch.Tensor, format: KVFormat) -> torch.Tensor:
    """What is written to pages: x [..., D] -> [..., R] in the format's dtype."""
    if format.dtype == torch.float8_e4m3fn:
        return x.float().clamp(-_FP8_MAX, _FP8_MAX).to(format.dtype)
    if not format.packed:
        return x.to(format.dtype)
    groups = x.float().unflatten(-1, (-1, _GROUP))
    if format.name == "q8_0":
        scale = groups.abs().amax(-1, keepdim=True) / 127
        y = groups * _inverse(scale)
        size = y.abs()
        whole = size.floor()  # halves away from zero, as roundf; torch rounds them to even
        q = torch.copysign(whole + (2 * (size - whole)).floor(), y).to(torch.int8)
        values = q.view(torch.uint8).flatten(-2)
    else:
        first = groups.abs().argmax(-1, keepdim=True)
        scale = groups.gather(-1, first) / -8
        q = (groups * _inverse(scale) + 8.5).to(torch.uint8).clamp(max=15).flatten(-2)
        values = q[..., ::2] | q[..., 1::2] << 4
    return torch.cat([values, scale.flatten(-2).half().view(torch.uint8)], dim=-1)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def decode(rows: torch.Tensor, format: KVFormat) -> torch.Tensor:
    """What pages hold: [..., R] -> float32 [..., D]."""
    if not format.packed:
        return rows.view(format.dtype).float()
    dim = rows.shape[-1] // format.elements * _GROUP
    split = dim if format.name == "q8_0" else dim // 2
    values = rows[..., :split]
    scale = rows[..., split:].contiguous().view(torch.float16).float()
    if format.name == "q8_0":
        q = values.view(torch.int8).float()
    else:
        q = torch.stack([values & 15, values >> 4], dim=-1).flatten(-2).float() - 8
    return (q.unflatten(-1, (-1, _GROUP)) * scale[..., None]).flatten(-2)
