"""Calls of ops with operands to check and time backends on: random ones, for every op.

A case keeps what a backend is called with. Running it gives every tensor that the call returns or
changes; operands that an op writes to are copied first, so that each run starts from the same ones.

Shapes: M rows, N outputs, K inputs, E experts; H heads of dim D, P pages of S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from oxillama_torch.gguf.types import row_bytes
from oxillama_torch.kernels import formats, registry
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.registry import Call, Kernel
from oxillama_torch.kernels.sampling.op import Settings

__all__ = ["PACKED_OPS", "WRITTEN", "Case", "cases_of", "known_ops", "random_weight"]

#: Ops whose second operand is a packed weight, so that its GGML type matters.
PACKED_OPS = (
    "embedding", "quant_matmul", "quant_matmul_experts", "quant_matmul_gated",
    "quant_matmul_residual",
)  # fmt: skip
#: Op -> positions of the operands that a call changes.
WRITTEN = {"lora": (0,), "rope_store_kv": (7, 8)}

_EXPERTS = 4
_HEADS, _KV_HEADS, _HEAD_DIM = 8, 2, 128
_PAGE_SIZE = 32
_CONTEXT = 512


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One call of an op.

    Args:
        op: its name.
        call: what selection sees of it.
        args, kwargs: what a backend is called with.
        label: tells cases of one op apart.
    """

    op: str
    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    def run(self, kernel: Kernel) -> tuple[torch.Tensor, ...]:
        """Call a backend. Returns: tensors returned, then those changed."""
        written = WRITTEN.get(self.op, ())
        args = [x.clone() if i in written else x for i, x in enumerate(self.args)]
        out = kernel.function(*args, **self.kwargs)
        returned = (out,) if isinstance(out, torch.Tensor) else tuple(out or ())
        return (*returned, *(args[i] for i in written))

    def time(self, kernel: Kernel) -> Callable[[], object]:
        """The call itself, without copies: operands that it changes are changed."""
        return lambda: kernel.function(*self.args, **self.kwargs)


def random_weight(type_name: str, rows: int, columns: int) -> PackedTensor:
    """Random blocks whose scales are small numbers, or random plain weights."""
    format = formats.get(type_name)
    format.check_columns(columns)
    data = torch.randint(0, 256, (rows * row_bytes(format.type, columns),), dtype=torch.uint8)
    _set_packed_scales(format.name, data.view(-1, format.block_bytes))
    weight = PackedTensor.from_bytes(type_name, data, (rows, columns))
    for plane in weight.planes.values():
        if plane.is_floating_point() and format.block_weights > 1:
            plane.copy_(torch.rand(plane.shape) * 0.01 + 0.001)
        elif plane.is_floating_point():
            plane.copy_(torch.randn(plane.shape))
    return weight


def _set_packed_scales(type_name: str, blocks: torch.Tensor) -> None:
    """Make small what scales are no floating planes of their own: blocks uint8 [B, block_bytes]."""
    if type_name == "MXFP4":
        blocks[:, 0] = 116 + blocks[:, 0] % 8  # 2^-12 to 2^-5
    elif type_name == "NVFP4":
        blocks[:, :4] &= 0x1F  # below 2^-4
    elif type_name == "IQ1_M":
        blocks[:, 55] = blocks[:, 55] & 0x0F | 0x10  # the float16's top nibble: 2^-11 to 2^-9


def known_ops() -> tuple[str, ...]:
    """Ops that cases can be made for, and that are registered."""
    registered = registry.registered_ops()
    return tuple(op for op in sorted(_MAKERS) if op in registered)


def cases_of(
    op: str, call: Call, shape: tuple[int, int], weight: PackedTensor | None = None
) -> list[Case]:
    """Cases of an op with random operands.

    Args:
        op: one of ``known_ops()``.
        call: device, dtype, numerics, GGML type (packed ops only) and rows M.
        shape: (N, K); ops without a weight take what fits of it.
        weight: packed weight of that type and shape, on the device; None: a random one.
    """
    if op in PACKED_OPS and weight is None:
        assert call.type is not None, f"{op} wants a type"
        experts = _EXPERTS if op == "quant_matmul_experts" else 1
        weight = random_weight(call.type, experts * shape[0], shape[1]).to(call.device)
    return _MAKERS[op](call, shape, weight)


def _randn(call: Call, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=call.device).to(call.dtype)


def _matmul(call: Call, shape: tuple[int, int], weight: PackedTensor) -> list[Case]:
    bias = torch.randn(shape[0], device=call.device)
    return [Case("quant_matmul", call, (_randn(call, call.m, shape[1]), weight, bias))]


def _experts(call: Call, shape: tuple[int, int], weight: PackedTensor) -> list[Case]:
    ids = torch.randint(0, _EXPERTS, (call.m,), device=call.device)
    args = (_randn(call, call.m, shape[1]), weight, ids, _EXPERTS)
    return [Case("quant_matmul_experts", call, args)]


def _gated_matmul(call: Call, shape: tuple[int, int], weight: PackedTensor) -> list[Case]:
    """The N outputs are those of gate and up together."""
    x, numerics = _randn(call, call.m, shape[1]), {"numerics": call.numerics}
    return [Case("quant_matmul_gated", call, (x, weight, "silu"), numerics, "silu")]


def _residual(call: Call, shape: tuple[int, int], weight: PackedTensor) -> list[Case]:
    bias, residual = torch.randn(shape[0], device=call.device), _randn(call, call.m, shape[0])
    args, numerics = (_randn(call, call.m, shape[1]), weight, bias, residual), call.numerics
    return [Case("quant_matmul_residual", call, args, {"numerics": numerics})]


def _segments(call: Call, shape: tuple[int, int], _: None) -> list[Case]:
    """The two types that Q4_K_M mixes, in the sizes of queries with keys, and of values."""
    types, sizes = ("Q4_K", "Q6_K"), (shape[0] * 5 // 6, shape[0] - shape[0] * 5 // 6)
    weights = [random_weight(t, n, shape[1]).to(call.device) for t, n in zip(types, sizes)]
    biases = [torch.randn(sizes[0], device=call.device), None]
    call, x = call._replace(type="+".join(types)), _randn(call, call.m, shape[1])
    args = (x, weights, biases)
    return [Case("quant_matmul_segments", call, args, {"numerics": call.numerics})]


def _embedding(call: Call, shape: tuple[int, int], weight: PackedTensor) -> list[Case]:
    ids = torch.randint(0, shape[0], (call.m,), device=call.device)
    return [Case("embedding", call, (ids, weight, call.dtype))]


def _norm(call: Call, shape: tuple[int, int], _: None) -> list[Case]:
    x, weight = _randn(call, call.m, shape[1]), torch.rand(shape[1], device=call.device)
    return [
        Case("rms_norm", call, (x, weight, 1e-5), {"residual": residual}, label)
        for label, residual in (("", None), ("+residual", torch.randn_like(x)))
    ]


def _norm_quantized(call: Call, shape: tuple[int, int], _: None) -> list[Case]:
    x, weight = _randn(call, call.m, shape[1]), torch.rand(shape[1], device=call.device)
    other = {"residual": torch.randn_like(x)}
    return [Case("rms_norm_quantized", call, (x, weight, 1e-5), other, "+residual")]


def _layer_norm(call: Call, shape: tuple[int, int], _: None) -> list[Case]:
    x, weight = _randn(call, call.m, shape[1]), torch.rand(shape[1], device=call.device)
    bias, other = torch.randn(shape[1], device=call.device), torch.randn_like(x)
    return [
        Case("layer_norm", call, (x, weight, None, 1e-5), {"residual": None}),
        Case("layer_norm", call, (x, weight, bias, 1e-5), {"residual": other}, "+residual"),
    ]


def _gated(call: Call, shape: tuple[int, int], _: None) -> list[Case]:
    gate, up = _randn(call, call.m, shape[0]), _randn(call, call.m, shape[0])
    return [Case("gated", call, (gate, up, kind), {}, kind) for kind in ("silu", "gelu_tanh")]


def _pages(call: Call, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (pages, _PAGE_SIZE, _KV_HEADS, _HEAD_DIM)
    return _randn(call, *shape), _randn(call, *shape)


def _rope(call: Call, shape: tuple[int, int], _: None) -> list[Case]:
    rows, device = call.m, call.device
    heads = [_randn(call, rows, h, _HEAD_DIM) for h in (_HEADS, _KV_HEADS, _KV_HEADS)]
    positions = torch.arange(rows, device=device) + 5
    frequencies = 10000 ** (-torch.arange(0, _HEAD_DIM, 2, device=device) / _HEAD_DIM)
    slots = torch.randperm(rows + 7, device=device)[:rows]
    pages = _pages(call, -(-(rows + 7) // _PAGE_SIZE))
    norm = torch.rand(_HEAD_DIM, device=device) + 0.5
    plain = {"q_norm": None, "k_norm": None, "norm_eps": 1e-6}
    return [
        Case(
            "rope_store_kv",
            call,
            (*heads, positions, frequencies, 1.0, style, *pages, slots),
            options,
            label,
        )
        for label, style, options in (
            ("norm", "norm", plain),
            ("neox+qk-norm", "neox", {**plain, "q_norm": norm, "k_norm": norm}),
        )
    ]


def _attention(call: Call, shape: tuple[int, int], _: None) -> list[Case]:
    """M requests of one new token each, and one request of M new tokens."""
    decode = _attention_case(call, [1] * call.m, [_CONTEXT - 3 * i % 64 for i in range(call.m)])
    return [decode] if call.m == 1 else [decode, _attention_case(call, [call.m], [call.m])]


def _attention_case(call: Call, queries: list[int], lengths: list[int]) -> Case:
    width = -(-max(lengths) // _PAGE_SIZE)
    table = torch.randperm(len(queries) * width).view(len(queries), width)
    starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
    tables = [table, torch.tensor(starts), torch.tensor(lengths)]
    longest = max(queries)
    return Case(
        "attention",
        Call(call.device, call.dtype, call.numerics, m=longest),
        (
            _randn(call, sum(queries), _HEADS, _HEAD_DIM),
            *_pages(call, len(queries) * width),
            *(x.to(call.device, torch.int32) for x in tables),
        ),
        {
            **{"scale": _HEAD_DIM**-0.5, "max_query_len": longest, "max_seq_len": max(lengths)},
            **{"window": None, "softcap": None, "sinks": None},
        },
        f"decode x{len(queries)}" if longest == 1 else "prefill",
    )


def _lora(call: Call, shape: tuple[int, int], _: None) -> list[Case]:
    """M rows of one adapter or of several, and of higher rank; a row each where M is small."""
    shares = {(1, 16), (min(call.m, 8), 16), (1, 64)}
    return [_lora_case(call, shape, adapters, rank) for adapters, rank in sorted(shares)]


def _lora_case(call: Call, shape: tuple[int, int], adapters: int, rank: int) -> Case:
    from oxillama_torch.kernels.lora.op import FactorTable, LowRank, RowGroups

    (outputs, inputs), device = shape, torch.device(call.device)
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[call.dtype]
    tables = []
    for _ in range(adapters):
        a = random_weight(name, rank, inputs).to(device)
        b = random_weight(name, outputs, rank).to(device)
        tables.append(FactorTable([LowRank(a, b)], device))
    slots = [row * adapters // call.m for row in range(call.m)]
    groups = RowGroups(tables, slots, range(call.m), [0.5] * call.m, device)
    args = (_randn(call, call.m, outputs), _randn(call, call.m, inputs), groups, 0, (outputs,))
    return Case("lora", call, args, {}, f"rank {rank} x{adapters}")


def _sample(call: Call, shape: tuple[int, int], _: None) -> list[Case]:
    """The sampling that most requests ask for, over a vocabulary as large as the outputs."""
    rows, device = torch.arange(call.m, device=call.device), call.device
    logits = torch.randn(call.m, shape[0], device=device) * 3
    column = torch.ones(call.m, device=device)
    share = column.to(torch.float64)
    settings = Settings(
        column * 0.8, (column * 40).int(), share * 0.95, share * 0.05, rows, rows + 100
    )
    return [Case("sample", call, (logits, settings, None, None))]


_MAKERS: dict[str, Callable[[Call, tuple[int, int], Any], list[Case]]] = {
    "attention": _attention,
    "embedding": _embedding,
    "gated": _gated,
    "layer_norm": _layer_norm,
    "lora": _lora,
    "quant_matmul": _matmul,
    "quant_matmul_experts": _experts,
    "quant_matmul_gated": _gated_matmul,
    "quant_matmul_residual": _residual,
    "quant_matmul_segments": _segments,
    "rms_norm": _norm,
    "rms_norm_quantized": _norm_quantized,
    "rope_store_kv": _rope,
    "sample": _sample,
}
