"""Write a llama model of a known shape with random packed weights: something to time, not to read.

Blocks are random bytes; their float16 scales are set so that the weights of a row have variance
1 / K, as those of a trained model roughly do, and activations stay of order one. The tensors are
written in slices: memory stays small whatever the size of the file.

Shapes: N rows, K weights per row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.types import GGMLType, row_bytes
from oxillama_torch.kernels import formats

__all__ = ["MIXES", "SHAPES", "Shape", "write_synthetic"]

_ALIGNMENT = 32
_SLICE_BYTES = 1 << 24
# Token ids 0 to 255 are the bytes; the end token is the next one. The rest are never produced by
# encoding a text, but every id may be sampled and decoded.
_BYTES = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a llama model; ``ffn`` is the inner size of the MLP."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    rope_base: float = 10_000.0


SHAPES = {
    "tiny": Shape(2, 256, 512, 4, 2, 512, 512),
    "1.1b": Shape(22, 2048, 5632, 32, 4, 32_000, 2048),
    "8b": Shape(32, 4096, 14_336, 32, 8, 128_256, 8192, 500_000.0),
}
# The type of most tensors, and of those that a mix keeps at a higher precision.
MIXES = {"q4_k_m": ("Q4_K", "Q6_K"), "q8_0": ("Q8_0", "Q8_0"), "q4_0": ("Q4_0", "Q4_0")}
# Middle of the quants of types with an offset: offset = middle * scale makes the mean zero.
_MIDDLES = {"Q4_K": 7.5, "Q5_K": 15.5, "Q4_1": -7.5, "Q5_1": -15.5}


def write_synthetic(
    path: str | os.PathLike[str],
    shape: str | Shape = "1.1b",
    mix: str = "q4_k_m",
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a GGUF file of architecture ``llama``; the same arguments give the same bytes.

    Args:
        shape: a name in SHAPES, or sizes.
        mix: a name in MIXES.
        progress: called with (bytes written, bytes in all).

    Raises:
        UnsupportedError: unknown shape or mix, or gguf-py is not installed.
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise UnsupportedError(f"synthetic shape {shape!r}", sorted(SHAPES))
        shape = SHAPES[shape]
    if mix not in MIXES:
        raise UnsupportedError(f"mix {mix!r}", sorted(MIXES))
    tensors = list(_tensors(shape, *MIXES[mix]))
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    _write_header(partial, _metadata(shape, mix), tensors)
    total = sum(_nbytes(type_name, size) for _, type_name, size in tensors)
    rng, written = np.random.default_rng(seed), 0
    with partial.open("ab") as file:
        _pad(file)
        for _, type_name, size in tensors:
            for data in _blocks(rng, type_name, size):
                file.write(data)
                written += data.nbytes
                if progress is not None:
                    progress(written, total)
            _pad(file)
    partial.replace(path)


def _tensors(shape: Shape, most: str, some: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, type, (N, K) or (N,)) of every tensor, with llama.cpp's choice of the finer type."""
    hidden, ffn = shape.hidden, shape.ffn
    kv = hidden // shape.heads * shape.kv_heads
    yield "token_embd.weight", most, (shape.vocab, hidden)
    for i in range(shape.layers):
        finer = some if _use_more_bits(i, shape.layers) else most
        yield f"blk.{i}.attn_norm.weight", "F32", (hidden,)
        yield f"blk.{i}.attn_q.weight", most, (hidden, hidden)
        yield f"blk.{i}.attn_k.weight", most, (kv, hidden)
        yield f"blk.{i}.attn_v.weight", finer, (kv, hidden)
        yield f"blk.{i}.attn_output.weight", most, (hidden, hidden)
        yield f"blk.{i}.ffn_norm.weight", "F32", (hidden,)
        yield f"blk.{i}.ffn_gate.weight", most, (ffn, hidden)
        yield f"blk.{i}.ffn_up.weight", most, (ffn, hidden)
        yield f"blk.{i}.ffn_down.weight", finer, (hidden, ffn)
    yield "output_norm.weight", "F32", (hidden,)
    yield "output.weight", some, (shape.vocab, hidden)


def _use_more_bits(layer: int, layers: int) -> bool:
    """The layers whose attn_v and ffn_down are finer (``use_more_bits`` in llama-quant.cpp)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _metadata(shape: Shape, mix: str) -> dict[str, Any]:
    tokens = [_byte_token(byte) for byte in range(_BYTES)] + ["<|end|>"]
    tokens += [f"<|unused_{index}|>" for index in range(shape.vocab - len(tokens))]
    # A pair of letters that is among the tokens: readers want at least one merge.
    tokens[-1] = "zq"
    normal, control, unused = 1, 3, 5
    types = [normal] * _BYTES + [control] + [unused] * (shape.vocab - _BYTES - 1)
    types[-1] = normal
    return {
        "general.architecture": "llama",
        "general.name": f"synthetic {mix}",
        "llama.block_count": shape.layers,
        "llama.context_length": shape.context,
        "llama.embedding_length": shape.hidden,
        "llama.feed_forward_length": shape.ffn,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": shape.rope_base,
        "llama.rope.dimension_count": shape.hidden // shape.heads,
        "llama.vocab_size": shape.vocab,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["z q"],
        "tokenizer.ggml.eos_token_id": _BYTES,
    }


def _byte_token(byte: int) -> str:
    """GPT-2's printable stand-in for a byte (``bytes_to_unicode`` in its encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sum(b not in printable for b in range(byte)))


def _write_header(
    path: Path, metadata: dict[str, Any], tensors: list[tuple[str, str, tuple[int, ...]]]
) -> None:
    try:
        import gguf
    except ModuleNotFoundError:
        raise UnsupportedError("writing GGUF without the gguf package (pip install gguf)") from None
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        kind = gguf.GGUFValueType.get_type(value)
        if kind == gguf.GGUFValueType.INT32:
            kind = gguf.GGUFValueType.UINT32
        writer.add_key_value(key, value, kind)
    for name, type_name, size in tensors:
        kind = gguf.GGMLQuantizationType[type_name]
        writer.add_tensor_info(
            name, size, np.dtype(np.float32), _nbytes(type_name, size), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _nbytes(type_name: str, size: tuple[int, ...]) -> int:
    *rows, columns = size
    return row_bytes(GGMLType[type_name], columns) * (rows[0] if rows else 1)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _blocks(
    rng: np.random.Generator, type_name: str, size: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """The bytes of a tensor, in slices of at most _SLICE_BYTES."""
    if len(size) == 1:  # a norm
        yield np.ones(size, np.float32)
        return
    format = formats.get(type_name)
    rows, columns = size
    count = rows * columns // format.block_weights
    scale = columns**-0.5 / _deviation(type_name)
    step = _SLICE_BYTES // format.block_bytes
    for start in range(0, count, step):
        blocks = rng.integers(
            0, 256, (min(step, count - start), format.block_bytes), dtype=np.uint8
        )
        yield _with_scale(format, torch.from_numpy(blocks), scale).numpy()


def _deviation(type_name: str) -> float:
    """Standard deviation of the weights of random blocks whose scale is one."""
    format = formats.get(type_name)
    blocks = np.random.default_rng(0).integers(0, 256, (4096, format.block_bytes), dtype=np.uint8)
    return format.dequantize(_with_scale(format, torch.from_numpy(blocks), 1.0)).std().item()


def _with_scale(format: formats.Format, blocks: torch.Tensor, scale: float) -> torch.Tensor:
    """The blocks with their float16 scale, and where there is one the offset, overwritten."""
    factors = torch.tensor([scale, scale * _MIDDLES.get(format.name, 0.0)])
    for values in format.split(blocks).values():
        if values.dtype == torch.float16:  # a view of the blocks
            values.copy_(factors[: values.shape[-1]])
    return blocks
