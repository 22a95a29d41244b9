"""Matrix products of many rows: decode the weight, multiply dense.

Decoding costs the same for any number of rows, so from some number on it hardly counts, and the
product is as fast as the library's (cuBLAS, oneDNN, MKL). On a GPU weights are rounded to the
activations' 16 bits, as on the tensor cores. On a CPU the product is bfloat16 where the processor
has instructions for it and float32 where it has none, whatever the activations are: without them a
bfloat16 product takes several times as long as a float32 one. The library picks its own order of
additions: ``fast`` numerics only.

Shapes: M rows, K inputs, N outputs, n rows of a chunk; G steps, P parts, L lanes: see ``lanes``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul import compiled, cpu, factored
from oxillama_torch.kernels.quant_matmul.lanes import LANES
from oxillama_torch.kernels.quant_matmul.unpacked import FORMS, name_of
from oxillama_torch.kernels.registry import Call, register

__all__ = ["prepare"]

# Below, the packed kernels cost less than decoding. The GPU's figure is from published work on
# other kernels (Machete, vLLM's dequantize path), not measured with these.
MIN_ROWS = {"cuda": 1024, "cpu": 32}
# Where int4pack serves these types, it keeps ahead for longer.
_CPU_MIN_ROWS_OF_4_BITS = 64
# So many rows of a few thousand inputs stay in the cache between decoding and the product.
_CPU_CHUNK_ROWS = 256
# MKL multiplies 256 x 2048 weights with so few rows up to a fifth faster than the rows with them.
_CPU_TURNED_ROWS = 128
_CUDA_CHUNK_BYTES = 1 << 28

_ready: set[str] = set()


def _cannot(call: Call) -> str | None:
    if call.device == "cpu":
        return compiled.cannot(call)
    if call.dtype == torch.float32:
        return "wants 16-bit activations on a GPU"
    return None


def _not_by_default(call: Call) -> str | None:
    least = MIN_ROWS[call.device]
    if call.device == "cpu" and call.type in cpu.TYPES and not factored.serves(call.type):
        least = _CPU_MIN_ROWS_OF_4_BITS
    if call.m < least:
        return f"pays from {least} rows on"
    if call.device == "cpu" and call.type not in _ready:
        return "not compiled when the model was loaded"
    return None


@register(
    "quant_matmul",
    "dense",
    numerics=("fast",),
    capability=_cannot,
    unless_asked=_not_by_default,
    priority=130,
    error=1e-2,
)
def quant_matmul(x: Tensor, weight: PackedTensor, bias: Tensor | None = None) -> Tensor:
    """Arguments as those of :func:`oxillama_torch.kernels.quant_matmul.op.quant_matmul`."""
    product = _on_cpu if x.device.type == "cpu" else _on_cuda
    y = product(x, weight)
    return (y if bias is None else y.float() + bias.float()).to(x.dtype)


def prepare(weights: Iterable[PackedTensor]) -> None:
    """Compile the decoders that CPU products of a model need, so that serving compiles nothing."""
    samples = {w.type_name: w for w in weights if w.device.type == "cpu" and w.type_name in LANES}
    for type_name, weight in samples.items():
        if compiled.cannot(Call("cpu", torch.bfloat16, "fast", type_name)) is None:
            part = weight.rows(0, 2) if factored.serves(type_name) else weight
            _on_cpu(torch.zeros(MIN_ROWS["cpu"], weight.shape[1]), part)
            _ready.add(type_name)
    registry.forget_choices()


def _on_cuda(x: Tensor, weight: PackedTensor) -> Tensor:
    """Rows are decoded by the kernel that looks up embeddings: it reads any rows of any type."""
    outputs, inputs = weight.shape
    call = Call("cuda", x.dtype, type=weight.type_name, m=outputs)
    decode = registry.select("embedding", call).function
    out = x.new_empty(len(x), outputs)
    chunk = max(1, _CUDA_CHUNK_BYTES // (inputs * x.element_size()))
    rows = torch.arange(outputs, device=x.device)
    for start in range(0, outputs, chunk):
        part = decode(rows[start : start + chunk], weight, x.dtype)
        out[:, start : start + chunk] = x @ part.T
    return out


def _on_cpu(x: Tensor, weight: PackedTensor) -> Tensor:
    """Inputs are put in the order in which the decoder writes the weights."""
    outputs, dtype = weight.shape[0], _cpu_dtype()
    out = torch.empty(len(x), outputs, dtype=dtype)
    with torch.inference_mode():
        # One kind of tensor for every call: the compiled code is guarded by it.
        if factored.serves(weight.type_name):
            inputs = factored.permuted(x.float(), weight.type_name).flatten(1).to(dtype)
            decode = factored.decode_rows
        else:
            inputs, decode = _by_parts(x, weight).to(dtype), _decode_rows
        scratch = torch.empty(min(_CPU_CHUNK_ROWS, outputs), inputs.shape[1], dtype=dtype)
        turned = inputs.T.contiguous() if _is_better_turned(inputs) else None
        for start in range(0, outputs, _CPU_CHUNK_ROWS):
            stop = min(start + _CPU_CHUNK_ROWS, outputs)
            part = decode(weight, start, stop, scratch)
            if turned is None:
                torch.mm(inputs, part.T, out=out[:, start:stop])
            else:
                out[:, start:stop] = torch.mm(part, turned).T
    return out


def _is_better_turned(inputs: Tensor) -> bool:
    """Whether the library multiplies the weight with the inputs faster than the inputs with it."""
    return inputs.dtype == torch.float32 and len(inputs) <= _CPU_TURNED_ROWS


@functools.cache
def _cpu_dtype() -> torch.dtype:
    """Of dense products: bfloat16 where the processor multiplies it."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _by_parts(x: Tensor, weight: PackedTensor) -> Tensor:
    """Inputs [M, K] in the order of ``_decode_rows``: part by part."""
    form = FORMS[name_of(weight)]
    return x.unflatten(1, (-1, form.parts, form.lanes)).transpose(1, 2).flatten(1)


def _decode_rows(weight: PackedTensor, start: int, stop: int, out: Tensor) -> Tensor:
    """Write rows of a weight to the top rows of ``out`` [.., K]; these rows."""
    name = name_of(weight)
    form = FORMS[name]
    rows = out[: stop - start]
    fields = compiled.scale_of(name)(compiled.rows_of(weight, start, stop))
    by_parts = rows.view(len(rows), form.parts, -1, form.lanes)
    _decode(name)(fields, compiled.dynamic(by_parts, 0, 2))
    return rows


@functools.cache
def _decode(name: str) -> Callable:
    decode = FORMS[name].decode

    def write(fields: dict[str, Tensor], out_nPGL: Tensor) -> None:
        for part, w in enumerate(decode(**fields)):
            out_nPGL[:, part].copy_(w.flatten(1, 2))

    return compiled.compile_lanes(write, f"decode16_{name.lower()}")
