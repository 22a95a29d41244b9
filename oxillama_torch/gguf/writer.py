"""Write GGUF files, for scripts and tests. gguf-py does the work and is imported when needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.types import TYPE_SIZES, GGMLType

__all__ = ["ENCODABLE", "write_gguf"]

# Types that gguf-py can encode from floats; of the others it takes finished blocks.
ENCODABLE = frozenset(
    ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
)


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[np.ndarray | bytes, str]],
) -> None:
    """Write a GGUF version 3 file.

    Args:
        metadata: key -> bool, int (uint32 where it fits, else int32, uint64, int64), float
            (float32), str, numpy scalar or array (its own type), list or tuple of one of these.
            ``general.architecture`` must be there.
        tensors: name -> (values, GGML type name). Values are floating (they are encoded), uint8
            ``[..., row bytes]`` (blocks that are encoded already) or bytes (one row of blocks).

    Raises:
        UnsupportedError: gguf-py is not installed, or does not know or cannot encode a type.
        ValueError: a value of a type that GGUF cannot hold.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise UnsupportedError("writing GGUF without the gguf package (pip install gguf)") from None

    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    try:
        for key, value in metadata.items():
            if key == "general.alignment":
                writer.add_custom_alignment(value)
            elif key != "general.architecture":  # the writer's constructor wrote it
                writer.add_key_value(key, *_typed(gguf, key, value))
        for name, (values, type_name) in tensors.items():
            _add_tensor(gguf, writer, name, values, GGMLType[type_name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_tensor(
    gguf: Any, writer: Any, name: str, values: np.ndarray | bytes, type: GGMLType
) -> None:
    try:
        qtype = gguf.GGMLQuantizationType(type)
    except ValueError:
        raise UnsupportedError(f"gguf-py cannot write {type.name}") from None
    if not isinstance(values, np.ndarray):
        values = np.frombuffer(values, np.uint8)
    if values.dtype != np.uint8:
        if type.name not in ENCODABLE:
            raise UnsupportedError(f"no encoder for {type.name}", sorted(ENCODABLE))
        values = gguf.quants.quantize(np.asarray(values, np.float32), qtype).view(np.uint8)
    assert values.shape[-1] % TYPE_SIZES[type].block_bytes == 0, f"{name}: not whole blocks"
    writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=qtype)


def _typed(gguf: Any, key: str, value: Any) -> tuple[Any, ...]:
    """(value, type) of a scalar or (list, ARRAY, element type), as gguf-py wants them."""
    types = gguf.GGUFValueType
    if isinstance(value, (list, tuple, np.ndarray)):
        items = list(value)
        if not items:
            raise ValueError(f"{key}: gguf-py cannot write an empty array")
        if all(type(item) is int for item in items):
            kind = _integer_type(types, min(items), max(items))
        elif all(type(item) in (int, float) for item in items):
            kind = types.FLOAT32
        else:
            kind = _typed(gguf, key, items[0])[1]
        return [_plain(item) for item in items], types.ARRAY, kind
    if isinstance(value, (bool, np.bool_)):
        return bool(value), types.BOOL
    if isinstance(value, str):
        return value, types.STRING
    if isinstance(value, np.generic):
        return value.item(), types[value.dtype.name.upper()]
    if isinstance(value, int):
        return value, _integer_type(types, value, value)
    if isinstance(value, float):
        return value, types.FLOAT32
    raise ValueError(f"{key}: GGUF holds no {type(value).__name__}")


def _plain(item: Any) -> Any:
    return item.item() if isinstance(item, np.generic) else item


def _integer_type(types: Any, low: int, high: int) -> Any:
    if low >= 0:
        return types.UINT32 if high < 1 << 32 else types.UINT64
    return types.INT32 if low >= -(1 << 31) and high < 1 << 31 else types.INT64
