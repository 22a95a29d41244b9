"""What a GGML format is here: block bytes, planes, float32 values, and the tile decoder.

A row of K weights lies in a file as B = K / block_weights blocks, each a C struct. In memory the
structs are turned into *planes*, one tensor per field, so that a kernel reads each field with wide
aligned loads. Nothing is rounded: ``unpack(repack(blocks))`` gives the same bytes back.

Shapes: N rows, K weights per row, B blocks per row, ``...`` any leading dimensions.
    blocks   uint8 [..., block_bytes]       as in the file
    field    [..., width]                   one struct field of each block
    plane    [N, B * width]                 one field of a whole tensor; each row starts on a
                                            16-byte boundary (rows may be padded: use the stride)
    weights  float32 [..., block_weights]

A new type is a new file here, named after it in lower case, that defines ``FORMAT``.

The tile decoder of a format is a ``@triton.jit`` function that matmul kernels take as constexpr::

    decode_tile(p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
                BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr) -> float32 [BLOCK_N, BLOCK_K]

    p0..p3    pointers to the planes in the order of ``Format.fields`` (unused: any pointer); p3 is
              the ``table`` of a format that has one
    s0..s3    their row strides in elements (``PackedTensor.tile_args`` gives all eight)
    rows      int64 [BLOCK_N], row indices into the planes
    row_mask  bool [BLOCK_N]; nothing is read for a masked row, and its weights are 0
    k0, K     first weight of the tile, a multiple of BLOCK_K, and the row length
    BLOCK_K   a power of two that divides K, from 32 to 256; types with blocks of 256 weights take
              64 to 256. Formats of single weights (F32, F16, BF16) take any power of two, and
              give 0 where k >= K.

Its values equal ``dequantize`` bit for bit, except that a GPU compiler may contract ``a * b - c``
into one fused operation, which rounds once instead of twice (launch with
``enable_fp_fusion=False`` to rule that out).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.types import TYPE_SIZES, GGMLType, TypeSize

__all__ = ["Format", "PackedTensor", "dequantize", "get", "known", "make_plane"]

ROW_ALIGNMENT = 16  # bytes: the widest load of a GPU thread
MAX_PLANES = 4  # decode_tile has this many pointers


def make_plane(values: Tensor) -> Tensor:
    """Copy ``values`` [N, B, width] into a plane [N, B * width] with 16-byte aligned rows."""
    rows, width = values.shape[0], values.shape[1:].numel()
    unit = ROW_ALIGNMENT // values.element_size()
    stride = -(-width // unit) * unit
    # Zeros, not empty: the padding is uploaded, saved and compared like everything else.
    make = torch.empty if stride == width else torch.zeros
    plane = make((rows, stride), dtype=values.dtype, device=values.device)[:, :width]
    plane.unflatten(1, values.shape[1:]).copy_(values)
    return plane


@dataclass(frozen=True, eq=False)
class Format:
    """How one GGML type is stored and decoded.

    Args:
        type: the GGML type; block sizes come from ``gguf.types.TYPE_SIZES``.
        fields: plane name -> elements per block, in the order in which ``decode_tile`` takes the
            planes. At most four.
        split: blocks uint8 [..., block_bytes] -> {name: field [..., width]}; views where it can.
        join: the inverse of ``split``.
        decode: (out float32 [..., block_weights], **fields) -> None; writes the weights into out.
        decode_tile: the Triton tile decoder described at the top of this file.
        decode_pairs: ``decode_tile`` in bfloat16, for tensor cores, by ``pairs``; None: its values
            are rounded instead.
        table: device -> a codebook for ``decode_tile``, the same tensor in every call; a format
            with a table has at most three planes.
    """

    type: GGMLType
    fields: dict[str, int]
    split: Callable[[Tensor], dict[str, Tensor]] = field(repr=False)
    join: Callable[..., Tensor] = field(repr=False)
    decode: Callable[..., None] = field(repr=False)
    decode_tile: Any = field(repr=False)
    table: Callable[[torch.device], Tensor] | None = field(default=None, repr=False)
    decode_pairs: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        most = MAX_PLANES - (self.table is not None)
        assert len(self.fields) <= most, f"{self.name} has more than {most} planes"

    @functools.cached_property
    def name(self) -> str:
        return self.type.name

    def decoder(self, bfloat16: bool) -> Any:
        """The tile decoder for matrix products in bfloat16, or in float32 and float16."""
        return self.decode_pairs if bfloat16 and self.decode_pairs else self.decode_tile

    @property
    def size(self) -> TypeSize:
        return TYPE_SIZES[self.type]

    @property
    def block_weights(self) -> int:
        return self.size.block_weights

    @property
    def block_bytes(self) -> int:
        return self.size.block_bytes

    def check_columns(self, columns: int) -> None:
        """Raise UnsupportedError unless rows of ``columns`` weights are whole blocks."""
        if columns % self.block_weights:
            raise UnsupportedError(
                f"{self.name} rows of {columns} weights", [f"multiples of {self.block_weights}"]
            )

    def dequantize(self, blocks: Tensor, out: Tensor | None = None) -> Tensor:
        """Weights of ``blocks`` uint8 [..., block_bytes] -> float32 [..., block_weights]."""
        return self._decode(self.split(blocks), blocks.shape[:-1], out)

    def repack(self, blocks: Tensor) -> dict[str, Tensor]:
        """Planes of ``blocks`` uint8 [N, B, block_bytes]; lossless."""
        return {name: make_plane(values) for name, values in self.split(blocks).items()}

    def unpack(self, planes: dict[str, Tensor]) -> Tensor:
        """The blocks uint8 [N, B, block_bytes] that ``planes`` came from."""
        return self.join(**self._fields_of(planes))

    def dequantize_planes(self, planes: dict[str, Tensor], out: Tensor | None = None) -> Tensor:
        """Weights float32 [N, K] of ``planes``, or of the same rows of each of them.

        Args:
            out: float32 [N, K], contiguous, to be overwritten. A buffer that is used again is
                still in the cache, and spares the system mapping memory for each call.
        """
        fields = self._fields_of(planes)
        rows, blocks = next(iter(fields.values())).shape[:2]
        if out is not None:
            out = out.view(rows, blocks, self.block_weights)
        return self._decode(fields, (rows, blocks), out).flatten(1)

    def _fields_of(self, planes: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: planes[name].view(-1, planes[name].shape[1] // width, width)
            for name, width in self.fields.items()
        }

    def _decode(
        self, fields: dict[str, Tensor], lead: tuple[int, ...], out: Tensor | None
    ) -> Tensor:
        if out is None:
            device = next(iter(fields.values())).device
            out = torch.empty((*lead, self.block_weights), dtype=torch.float32, device=device)
        self.decode(out, **fields)
        return out


@dataclass(eq=False)
class PackedTensor:
    """A weight matrix [N, K] that stays quantized: what layers hold and matmul kernels read.

    Args:
        shape: (N, K): output rows, input weights per row. A stack of E matrices is one tensor of
            E * N rows of which ``rows`` takes a part.
        planes: name -> [N, ...]; see ``Format.fields``.
    """

    format: Format
    shape: tuple[int, int]
    planes: dict[str, Tensor]

    @classmethod
    def from_bytes(cls, type: str | GGMLType, data: Tensor, shape: tuple[int, int]) -> PackedTensor:
        """Repack the bytes of a tensor as they lie in a file.

        Args:
            data: uint8 [bytes], on any device; a view of a mapped file will do.
            shape: (N, K), K a multiple of the type's block.

        Raises:
            UnsupportedError: no such format, or K is no multiple of the block.
            ValueError: ``data`` is not uint8 of the right length.
        """
        format = get(type)
        rows, columns = shape
        format.check_columns(columns)
        blocks = columns // format.block_weights
        expected = rows * blocks * format.block_bytes
        if data.dtype != torch.uint8 or data.shape != (expected,):
            raise ValueError(
                f"{format.name} {rows} x {columns} is uint8 [{expected}], "
                f"not {data.dtype} {list(data.shape)}"
            )
        planes = format.repack(data.view(rows, blocks, format.block_bytes))
        return cls(format, (rows, columns), planes)

    @property
    def type_name(self) -> str:
        return self.format.name

    @property
    def device(self) -> torch.device:
        return next(iter(self.planes.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes held by the planes, padding included."""
        return sum(p.shape[0] * p.stride(0) * p.element_size() for p in self.planes.values())

    def rows(self, start: int, stop: int) -> PackedTensor:
        """Rows ``start`` to ``stop`` (exclusive), sharing memory."""
        assert 0 <= start <= stop <= self.shape[0], f"rows {start}:{stop} of {self.shape[0]}"
        planes = {name: plane[start:stop] for name, plane in self.planes.items()}
        return PackedTensor(self.format, (stop - start, self.shape[1]), planes)

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """All weights as float32 [N, K]."""
        return self.format.dequantize_planes(self.planes, out)

    def to(self, device: torch.device | str) -> PackedTensor:
        """The same tensor on ``device``; itself when it is there already."""
        if torch.device(device) == self.device:
            return self
        planes = {}
        for name, plane in self.planes.items():
            # Tensor.to would drop the padding between rows, and their alignment with it.
            padded = torch.as_strided(plane, (plane.shape[0], plane.stride(0)), plane.stride())
            planes[name] = padded.to(device)[:, : plane.shape[1]]
        return PackedTensor(self.format, self.shape, planes)

    def tile_args(self) -> tuple[Any, ...]:
        """``p0, p1, p2, p3, s0, s1, s2, s3`` for ``decode_tile``; unused ones repeat the first."""
        planes = list(self.planes.values())
        planes += planes[:1] * (MAX_PLANES - len(planes))
        if self.format.table is not None:
            planes[-1] = self.format.table(self.device)
        return (*planes, *(plane.stride(0) for plane in planes))


def known() -> list[str]:
    """Names of the types that have a format file here."""
    from oxillama_torch.kernels import formats

    modules = (module.name.upper() for module in pkgutil.iter_modules(formats.__path__))
    return sorted(name for name in modules if name in GGMLType.__members__)


@functools.cache
def get(type: str | GGMLType) -> Format:
    """The format called ``type`` ("Q4_K", in either case, or a GGMLType); its file loads now.

    Raises:
        UnsupportedError: there is none; the message lists those there are.
    """
    name = type.name if isinstance(type, GGMLType) else str(type).upper()
    if name not in known():
        raise UnsupportedError(f"no format for GGML type {name!r}", known())
    return importlib.import_module(f"oxillama_torch.kernels.formats.{name.lower()}").FORMAT


def dequantize(type: str | GGMLType, data: bytes | np.ndarray | Tensor) -> Tensor:
    """Decode whole blocks.

    Args:
        data: bytes, or uint8 [..., row bytes]; the last dimension holds whole blocks.

    Returns:
        float32 [..., weights].

    Raises:
        UnsupportedError: no such format.
        ValueError: ``data`` is not uint8, or its last dimension not a multiple of the block.
    """
    format = get(type)
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data)
    elif not isinstance(data, Tensor):
        data = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _NO_BYTES
    if data.dtype != torch.uint8 or data.shape[-1] % format.block_bytes:
        raise ValueError(
            f"{format.name} data is uint8 in multiples of {format.block_bytes} bytes, "
            f"not {data.dtype} {list(data.shape)}"
        )
    if data.storage_offset() % 8:
        data = data.clone()  # float16 fields must lie on even offsets of the storage
    blocks = data.unflatten(-1, (data.shape[-1] // format.block_bytes, format.block_bytes))
    return format.dequantize(blocks).flatten(-2)


_NO_BYTES = torch.empty(0, dtype=torch.uint8)
