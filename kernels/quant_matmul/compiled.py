"""Matrix products on a CPU through torch.compile: decoding fused with the sums, in float32.

Few rows: one pass over the planes, decoding in registers (``dot``). More rows: a chunk of rows of
the weight is decoded into a scratch that stays in the cache (``decode``), and tiles of ROW_TILE x
COLUMN_TILE outputs are summed from it (``product``). Both spell out one and the same order of
additions, so that a row's bits depend on nothing but that row and the weight:

    lane (m, n, l) = sum over g, in order, of (sum over p, in order, of x[m, g, p, l] w[n, g, p, l])
    output (m, n)  = sum of its lanes

Nothing may reorder this: only the lanes are vectorized, the compiler runs without -ffast-math and
without contraction of a * b + c. ``prepare`` compares the bits of the two ways all the same.

Shapes: M rows, K inputs, N outputs, n rows of a chunk, B blocks per row, E experts; K = G * P * L
(steps, parts, lanes: see ``lanes``); R = ROW_TILE, C = COLUMN_TILE, T = M / R tiles.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.program import compiler, named
from oxillama_torch.kernels.quant_matmul.lanes import LANES
from oxillama_torch.kernels.quant_matmul.unpacked import FORMS, fields_of, name_of, unpack
from oxillama_torch.kernels.registry import Call, register

__all__ = [
    "MIN_WEIGHTS",
    "OPTIONS",
    "add_up",
    "cannot",
    "compile_lanes",
    "dynamic",
    "prepare",
    "rows_of",
    "scale_of",
    "wanted",
]

log = logging.getLogger(__name__)

ROW_TILE = 8
COLUMN_TILE = 2
# Up to this many rows, one pass per row costs less than decoding into the scratch.
_DOT_ROWS = 3
_CHUNK_WEIGHTS = 1 << 20
_TILES_AT_ONCE = 16
# Below this many weights in a model, the seconds of compiling are not worth it.
MIN_WEIGHTS = 200_000_000

#: Of Inductor: what the order of additions relies on.
OPTIONS = {
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
    "compile_threads": 1,
}

_ready: set[str] = set()
# GGML type -> why its programs cannot be used here.
_broken: dict[str, str] = {}


def cannot(call: Call) -> str | None:
    """Why weights of a type cannot be decoded by compiled code here, or None."""
    if call.type not in LANES:
        return f"serves {', '.join(sorted(LANES))}, not {call.type}"
    return _broken.get(call.type) if compiler() else "no C++ compiler found"


def _not_by_default(call: Call) -> str | None:
    if call.type in _ready:
        return None
    return f"not compiled when the model was loaded (worth it from {MIN_WEIGHTS:,} weights)"


def prepare(weights: Iterable[PackedTensor], *, even_if_small: bool = False) -> None:
    """Compile what a model's weights need; Inductor keeps the results on disk for the next time.

    Every shape is run with every kind of batch, so that nothing is compiled while serving. A type
    whose compilation fails, or whose two ways of computing a row differ, is refused from here on.

    Args:
        weights: all packed weights of the model; of those on the CPU and of a known type.
        even_if_small: compile for models of under MIN_WEIGHTS weights too.
    """
    ours = [w for w in weights if w.device.type == "cpu" and w.type_name in LANES]
    large = even_if_small or sum(w.shape[0] * w.shape[1] for w in ours) >= MIN_WEIGHTS
    samples = {(w.type_name, w.shape): w for w in ours if wanted(w.type_name, large)}
    if not samples:
        return
    types = {type_name for type_name, _ in samples}
    for weight in ours:
        if weight.type_name in types:
            unpack(weight)
    log.info("compiling matrix products; takes a minute the first time")
    for key in sorted(samples):
        if key[0] not in _broken:
            _try(samples[key])
    _ready.update({type_name for type_name, _ in samples} - _broken.keys())
    registry.forget_choices()


def wanted(type_name: str, large: bool) -> bool:
    """Whether ``compiled`` will serve the type: a rule asks for it, or none speaks and it pays."""
    if compiler() is None:
        return False
    call = Call("cpu", torch.float32, type=type_name)
    rules = [rule for rule in registry.active_rules() if rule.matches("quant_matmul", call)]
    return rules[-1].names("compiled") if rules else large


def _try(weight: PackedTensor) -> None:
    """Run a weight with one row, one tile and several; compare the bits of the first row."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3 * ROW_TILE, weight.shape[1], generator=generator)
    try:
        one, tile, many = (_matmul(x[:rows], weight)[0] for rows in (1, ROW_TILE, len(x)))
    except RuntimeError as error:  # the base of Dynamo's, Inductor's and the compiler's errors
        reason = str(error).strip().partition("\n")[0]
        _broken[weight.type_name] = f"compiling failed: {reason}"
    else:
        if not (torch.equal(one, tile) and torch.equal(one, many)):
            _broken[weight.type_name] = "compiled code is not invariant on this machine"
    if weight.type_name in _broken:
        log.warning("quant_matmul.%s: %s", weight.type_name, _broken[weight.type_name])


@register(
    "quant_matmul",
    "compiled",
    devices=("cpu",),
    capability=cannot,
    unless_asked=_not_by_default,
    priority=10,
)
def quant_matmul(x: Tensor, weight: PackedTensor, bias: Tensor | None = None) -> Tensor:
    """Compiled form of :func:`oxillama_torch.kernels.quant_matmul.op.quant_matmul`."""
    out = _matmul(x, weight)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _matmul(x: Tensor, weight: PackedTensor) -> Tensor:
    """``x @ dequantize(weight)^T`` in float32, [M, N]."""
    # One mode and one kind of tensor for every call: the compiled code is guarded by both.
    with torch.inference_mode():
        x = x.to(torch.float32, copy=True)
        if len(x) > _DOT_ROWS:
            return _many_rows(x, weight)
        return torch.stack([_one_row(row, weight) for row in x])


def _one_row(x: Tensor, weight: PackedTensor) -> Tensor:
    name = name_of(weight)
    form = FORMS[name]
    blocks = weight.shape[1] // weight.format.block_weights
    x = x.view(blocks, -1, form.parts, form.lanes)
    return _dot(name)(rows_of(weight), dynamic(x, 0))


def _many_rows(x: Tensor, weight: PackedTensor) -> Tensor:
    rows, inputs = x.shape
    outputs = weight.shape[0]
    name = name_of(weight)
    form = FORMS[name]
    tiles = _tiles(x, form.parts, form.lanes)
    out = torch.empty(len(tiles) * ROW_TILE, outputs)
    chunk = _chunk_rows(outputs, inputs)
    shape = (chunk + chunk % COLUMN_TILE, inputs // (form.parts * form.lanes), form.lanes)
    scratch = [torch.empty(shape) for _ in range(form.parts)]
    scale, decode = scale_of(name), _decode(name)
    product = _product(form.parts, form.lanes)
    for start in range(0, outputs, chunk):
        stop = min(start + chunk, outputs)
        count = stop - start
        fields = scale(rows_of(weight, start, stop))
        decode(fields, [dynamic(part[:count], 0, 1) for part in scratch])
        # An odd last row is paired with a stale one, whose sums are dropped.
        even = [dynamic(part[: count + count % COLUMN_TILE], 0, 1) for part in scratch]
        for top in range(0, len(tiles), _TILES_AT_ONCE):
            sums = product(dynamic(tiles[top : top + _TILES_AT_ONCE], 0, 2), even)
            at = top * ROW_TILE
            out[at : at + len(sums), start:stop] = sums[:, :count]
    return out[:rows]


def _tiles(x: Tensor, parts: int, lanes: int) -> Tensor:
    """Rows of x in tiles, [T, R, G + 1, P, L]; zeros below them and after each.

    The step added to each row keeps rows of 2^n bytes out of each other's way in the cache. T is
    one or even, so that two threads share the tiles evenly.
    """
    rows, inputs = x.shape
    tiles = -(-rows // ROW_TILE)
    tiles += tiles > 1 and tiles % 2
    padded = x.new_zeros(tiles * ROW_TILE, inputs + parts * lanes)
    padded[:rows, :inputs] = x
    return padded.view(tiles, ROW_TILE, -1, parts, lanes)


def _chunk_rows(outputs: int, inputs: int) -> int:
    """Rows of a weight to decode at a time: equal chunks, even in length, of a bounded size."""
    chunks = -(-outputs * inputs // _CHUNK_WEIGHTS)
    rows = -(-outputs // chunks)
    return min(outputs, rows + rows % COLUMN_TILE)


def rows_of(weight: PackedTensor, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
    """Fields of some rows, as compiled code wants them."""
    return {name: dynamic(x[start:stop], 0, 1) for name, x in fields_of(weight).items()}


def dynamic(tensor: Tensor, *dims: int) -> Tensor:
    """Mark dimensions whose size the compiled code must not depend on."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


@functools.cache
def _dot(name: str) -> Callable:
    form = FORMS[name]

    def dot(fields: dict[str, Tensor], x_BSPL: Tensor) -> Tensor:
        """One row: [N]."""
        parts = form.decode(**form.scale(**fields))
        terms = [w * x_BSPL[:, :, p] for p, w in enumerate(parts)]
        return add_up(terms).sum((1, 2)).sum(-1)

    return compile_lanes(dot, f"dot_{name.lower()}")


@functools.cache
def scale_of(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Fields -> what the decoder of one of FORMS takes; see ``LaneFormat.scale``."""
    scale = FORMS[name].scale

    def scaled(fields: dict[str, Tensor]) -> dict[str, Tensor]:
        return scale(**fields)

    run = compile_lanes(scaled, f"scale_{name.lower()}")
    return lambda fields: {field: dynamic(x, 0, 1) for field, x in run(fields).items()}


@functools.cache
def _decode(name: str) -> Callable:
    decode = FORMS[name].decode

    def write(fields: dict[str, Tensor], out: list[Tensor]) -> None:
        """Parts of the weights into ``out``, [n, G, L] each."""
        for part, w in zip(out, decode(**fields)):
            part.copy_(w.flatten(1, 2))

    return compile_lanes(write, f"decode_{name.lower()}")


@functools.cache
def _product(parts: int, lanes: int) -> Callable:
    def product(x_TRGPL: Tensor, parts_nGL: list[Tensor]) -> Tensor:
        """Every row with every row of the chunk: [T * R, n]."""
        x = x_TRGPL[:, :, :-1]
        w = [part.unflatten(0, (-1, COLUMN_TILE)) for part in parts_nGL]
        sums = []
        for r in range(ROW_TILE):
            for c in range(COLUMN_TILE):
                terms = [x[:, r, :, p].unsqueeze(1) * w[p][:, c] for p in range(parts)]
                sums.append(add_up(terms).sum(2))
        y = torch.stack(sums).sum(-1).unflatten(0, (ROW_TILE, COLUMN_TILE))
        return y.permute(2, 0, 3, 1).flatten(2, 3).flatten(0, 1)

    return compile_lanes(product, f"product_{parts}_{lanes}")


def add_up(terms: list[Tensor]) -> Tensor:
    """The sum, term by term in order."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def compile_lanes(function: Callable, name: str) -> Callable:
    """torch.compile with the options that the order of additions relies on."""
    own = named(function, name)
    return torch.compile(own, fullgraph=True, dynamic=False, options=dict(OPTIONS))
