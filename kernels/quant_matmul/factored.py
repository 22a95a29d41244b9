"""Products of few rows on a CPU through torch.compile, with the scales taken out of the sums.

    y[n] = sum over groups g of  scale[n, g] (sum over k in g of q[n, k] x[k])  -  least[n, g] X[g]

with X[g] the sum of x over the group: one multiplication a weight instead of three. Quants are kept
once more, as fields of 32-bit words with the groups side by side in the lanes of a vector, so that
a weight costs one mask, one conversion and one fused multiply-add. A field is masked but not
shifted down: x carries the power of two instead, which changes no bit.

Everything is float32, so the results differ from the reference by the rounding of the sums alone.
The order of additions is the compiler's and differs with the number of rows: ``fast`` only.

Shapes: M rows, K inputs, N outputs, R rows of a tile; L lanes, S weights of a group (run) in J
words of F fields, C = K / (L S) chunks, rounded up.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.program import Program
from oxillama_torch.kernels.quant_matmul import compiled, unpacked
from oxillama_torch.kernels.registry import Call, register

__all__ = [
    "TYPES",
    "decode_rows",
    "kept",
    "pack",
    "permuted",
    "prepare",
    "serves",
    "wanted",
]

log = logging.getLogger(__name__)


class _Form(NamedTuple):
    """How a type's quants lie in words.

    Args:
        bits: of a field, 4 or 8.
        run: S, weights that share a scale.
        offset: what is added to a quant so that it is not negative.
        least: whether a run has a minimum beside its scale.
    """

    bits: int
    run: int
    offset: int = 0
    least: bool = False

    @property
    def fields(self) -> int:
        """Of a word."""
        return 32 // self.bits

    @property
    def words(self) -> int:
        """Of a run."""
        return self.run // self.fields

    @property
    def name(self) -> str:
        return f"factored_{self.bits}_{self.run}_{self.offset}" + "_least" * self.least


TYPES = {
    "IQ4_NL": _Form(8, 32, 128),
    "IQ4_XS": _Form(8, 32, 128),
    "Q2_K": _Form(4, 16, least=True),
    "Q3_K": _Form(4, 16, 4),
    "Q4_0": _Form(4, 32, 8),
    "Q4_1": _Form(4, 32, least=True),
    "Q4_K": _Form(4, 32, least=True),
    "Q5_0": _Form(8, 32, 16),
    "Q5_1": _Form(8, 32, least=True),
    "Q5_K": _Form(8, 32, least=True),
    "Q6_K": _Form(8, 16, 32),
    "Q8_0": _Form(8, 32, 128),
}

#: Types for which ATen has a packed product; with AVX-512 that is the faster one.
_ATEN_TYPES = ("Q4_0", "Q4_1", "Q4_K")
_ROW_TILE = 4
_ROWS_AT_ONCE = 1024  # packing wants some 10 bytes a weight meanwhile

_packed: weakref.WeakKeyDictionary[PackedTensor, dict[str, Tensor]]
_packed = weakref.WeakKeyDictionary()
_ready: set[str] = set()
# GGML type -> why its programs cannot be used here.
_broken: dict[str, str] = {}


def serves(type_name: str) -> bool:
    """Whether weights of a type are to be kept as words on this machine."""
    return type_name in _ready


def _cannot(call: Call) -> str | None:
    if call.type not in TYPES:
        return f"serves {', '.join(sorted(TYPES))}, not {call.type}"
    return _broken.get(call.type) or compiled.cannot(call)


def _not_by_default(call: Call) -> str | None:
    if call.type in _ATEN_TYPES and _has_avx512():
        return "the packed product of ATen is faster with AVX-512"
    if call.type not in _ready:
        return (
            f"not compiled when the model was loaded (worth it from {compiled.MIN_WEIGHTS:,} "
            "weights)"
        )
    return None


@functools.cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@register(
    "quant_matmul",
    "factored",
    devices=("cpu",),
    numerics=("fast",),
    capability=_cannot,
    unless_asked=_not_by_default,
    priority=30,
    error=1e-5,
)
def quant_matmul(x: Tensor, weight: PackedTensor, bias: Tensor | None = None) -> Tensor:
    """Arguments as those of :func:`oxillama_torch.kernels.quant_matmul.op.quant_matmul`."""
    y = _matmul(x.float(), weight)
    if bias is not None:
        y = y + bias.float()
    # "to" would return the same, and take longer over it than the checks of the launcher.
    return y if x.dtype == y.dtype else y.to(x.dtype)


def _matmul(x: Tensor, weight: PackedTensor) -> Tensor:
    form, rows = TYPES[weight.type_name], x.shape[0]
    tile = 1 if rows == 1 else _ROW_TILE
    missing = -x.shape[1] % (form.run * _lanes()), -rows % tile
    if any(missing):
        x = pad(x, (0, missing[0], 0, missing[1]))
    x, fields = x.contiguous(), _fields(weight).values()
    x_MCLS = x.view(x.shape[0], -1, _lanes(), form.run)
    if rows == 1:
        return _product_of_one(form)(*fields, x_MCLS, _powers(form))
    x_MCJFL, sums_MCJL = _inputs(form)(x_MCLS, _powers(form))
    run = _product(form)
    parts = [run(*fields, *tiles) for tiles in zip(x_MCJFL.split(tile), sums_MCJL.split(tile))]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:rows]


def prepare(weights: Iterable[PackedTensor], *, even_if_small: bool = False) -> None:
    """Pack a model's weights and compile their products, so that serving compiles nothing.

    Inductor keeps what it compiles on disk. A type whose compilation fails, or whose products do
    not agree with the reference, is refused from here on.

    Args:
        weights: all packed weights of the model; of those on the CPU and of a known type.
        even_if_small: also where no rule asks for this backend.
    """
    samples: dict[str, PackedTensor] = {}
    for weight in weights:
        if weight.device.type == "cpu" and wanted(weight.type_name, even_if_small):
            samples.setdefault(weight.type_name, weight)
            _fields(weight)
    if samples:
        log.info("compiling matrix products; takes a minute the first time")
    for type_name, weight in sorted(samples.items()):
        if (reason := _try(weight)) is None:
            _ready.add(type_name)
        else:
            _broken[type_name] = reason
            log.warning("quant_matmul.%s: factored %s", type_name, reason)
    registry.forget_choices()


def wanted(type_name: str, even_if_small: bool) -> bool:
    """Whether this backend will serve the type: a rule asks for it, or none speaks and it pays."""
    call = Call("cpu", torch.float32, "fast", type_name)
    if _cannot(call) is not None:
        return False
    rules = [rule for rule in registry.active_rules() if rule.matches("quant_matmul", call)]
    if rules:
        return rules[-1].names("factored")
    return even_if_small and not (type_name in _ATEN_TYPES and _has_avx512())


def _try(weight: PackedTensor) -> str | None:
    """Run every program of a type, on few rows of a weight; what is wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    part = weight.rows(0, min(weight.shape[0], 64))
    x = torch.randn(_ROW_TILE, weight.shape[1], generator=generator)
    wanted = x @ part.dequantize().T
    try:
        for rows in (1, _ROW_TILE):
            got = quant_matmul(x[:rows], part)
            if not torch.allclose(got, wanted[:rows], rtol=1e-3, atol=1e-3 * wanted.std().item()):
                return "compiled code does not agree with the reference on this machine"
    except RuntimeError as error:  # the base of Dynamo's, Inductor's and the compiler's errors
        return f"compiling failed: {str(error).strip().partition(chr(10))[0]}"
    return None


def permuted(x: Tensor, type_name: str) -> Tensor:
    """Inputs float32 [M, K] in the order of the words, [M, C, S, L]; zeros after the last one."""
    run, lanes = TYPES[type_name].run, _lanes()
    if missing := -x.shape[1] % (run * lanes):
        x = pad(x, (0, missing))
    return x.unflatten(1, (-1, lanes, run)).transpose(2, 3).contiguous()


def decode_rows(weight: PackedTensor, start: int, stop: int, out: Tensor) -> Tensor:
    """Write rows of a weight, in the order of ``permuted``, to ``out`` [.., C S L]; its top rows.

    Args:
        out: float32 or bfloat16, contiguous, of at least ``stop - start`` rows.
    """
    form = TYPES[weight.type_name]
    part = [field[start:stop] for field in _fields(weight).values()]
    rows = out[: stop - start]
    by_field = rows.view(len(rows), -1, form.words, form.fields, _lanes())
    _decode(form, out.dtype)(*part, _shifts(form), by_field)
    return rows


@functools.cache
def _lanes() -> int:
    """Float32 values of a vector register."""
    return 16 if _has_avx512() else 8


@functools.cache
def _powers(form: _Form) -> Tensor:
    """What x is multiplied by so that fields need no shift: [F, 1]; the last one is shifted."""
    exponents = [-form.bits * p for p in range(form.fields - 1)] + [0]
    return torch.tensor([2.0**e for e in exponents])[:, None]


@functools.cache
def _shifts(form: _Form) -> Tensor:
    """Where fields begin in a word: int32 [F, 1]."""
    return torch.arange(0, 32, form.bits, dtype=torch.int32)[:, None]


def _fields(weight: PackedTensor) -> dict[str, Tensor]:
    """words [N, C, J, L], scale float32 [N, C, L] and, where there are any, least.

    Words are held as float32 of the same bits: that is how compiled code loads whole vectors. Those
    of int32 it copies to the stack in halves first, which takes longer than the product (torch
    2.13, AVX2).
    """
    found = _packed.get(weight)
    if found is None:
        starts = range(0, weight.shape[0], _ROWS_AT_ONCE)
        parts = [pack(weight.rows(s, min(s + _ROWS_AT_ONCE, weight.shape[0]))) for s in starts]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        assert list(found) == ["words", "scale", "least"][: len(found)]
        _packed[weight] = found
    return found


def kept(weight: PackedTensor) -> dict[str, Tensor]:
    """What is kept of a weight now."""
    return _packed.get(weight, {})


def pack(weight: PackedTensor) -> dict[str, Tensor]:
    form, (rows, inputs) = TYPES[weight.type_name], weight.shape
    split = unpacked.split(weight)
    missing = -inputs % (form.run * _lanes())
    q = split.pop("q").reshape(rows, inputs).view(torch.uint8) + form.offset  # modulo 256
    assert q.max().item() < 1 << form.bits, f"{weight.type_name} has other quants"
    q = pad(q, (0, missing))
    if form.bits == 4:
        q = q[:, 0::2] | q[:, 1::2] << 4
    words = q.view(torch.float32).view(rows, -1, _lanes(), form.run // form.fields)
    result = {"words": words.transpose(2, 3).contiguous()}
    for name, value in split.items():
        value = value.reshape(rows, inputs // form.run)
        result[name] = pad(value, (0, missing // form.run)).view(rows, -1, _lanes()).contiguous()
    return result


def _field(words: Tensor, form: _Form, index: int) -> Tensor:
    """Field ``index`` of words int32 as float32, times 2^(bits index) but for the last one."""
    mask, shift = (1 << form.bits) - 1, form.bits * index
    if index == form.fields - 1:  # a mask would leave it negative
        return (words >> shift & mask).float()
    return (words & mask << shift).float()


def _shapes(form: _Form) -> list[tuple[int | str, ...]]:
    """Of the fields of a weight, as a program wants them."""
    scale = ("N", "C", _lanes())
    return [("N", "C", form.words, _lanes()), scale, *([scale] if form.least else [])]


@functools.cache
def _inputs(form: _Form) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """x [M, C, L, S] and powers of fields -> [M, C, J, F, L]; sums over F without the powers."""

    def inputs(x_MCLS: Tensor, powers_F1: Tensor) -> tuple[Tensor, Tensor]:
        x_MCJFL = _by_field(x_MCLS, form)
        return (x_MCJFL * powers_F1).contiguous(), x_MCJFL.sum(3).contiguous()

    shapes = [("M", "C", _lanes(), form.run), (form.fields, 1)]
    return _program(inputs, f"{form.name}_inputs", shapes)


def _by_field(x_MCLS: Tensor, form: _Form) -> Tensor:
    """[M, C, L, S] -> [M, C, J, F, L]."""
    return x_MCLS.transpose(2, 3).unflatten(2, (-1, form.fields))


@functools.cache
def _product_of_one(form: _Form) -> Callable:
    """The fields of a weight, x [1, C, L, S] and the powers of fields -> [1, N].

    The words of a run are added up before the scale is looked at.
    """

    def product(words: Tensor, scale: Tensor, *rest: Tensor) -> Tensor:
        *least, x_MCLS, powers_F1 = rest
        x_CJFL = _by_field(x_MCLS, form)[0]
        sums_CL, x_CJFL = _written(x_CJFL.sum((1, 2))), _written(x_CJFL * powers_F1)
        words = words.view(torch.int32)
        runs = [_run(words[:, :, j], x_CJFL[:, j], form) for j in range(form.words)]
        total = compiled.add_up(runs)
        return _scaled(total, sums_CL, form, scale, *least).sum(1).sum(-1)[None]

    shapes = [*_shapes(form), (1, "C", _lanes(), form.run), (form.fields, 1)]
    return _program(product, f"{form.name}_1", shapes)


def _written(x: Tensor) -> Tensor:
    """The same, computed once: Inductor keeps what it takes strides of in memory."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


@functools.cache
def _product(form: _Form) -> Callable:
    """The fields of a weight and what ``_inputs`` makes of R rows -> [R, N].

    There are not enough registers to add up the words of a run: each is scaled for itself.
    """

    def product(words: Tensor, scale: Tensor, *rest: Tensor) -> Tensor:
        *least, x_RCJFL, sums_RCJL = rest
        words = words.view(torch.int32)
        lanes = []
        factors = [factor[:, :, None] for factor in (scale, *least)]
        for x_CJFL, sums_CJL in zip(x_RCJFL, sums_RCJL):
            total = _run(words, x_CJFL, form)
            lanes.append(_scaled(total, sums_CJL, form, *factors).sum((1, 2)))
        return torch.stack(lanes).sum(-1)

    tile = (_ROW_TILE, "C", form.words, form.fields, _lanes())
    shapes = [*_shapes(form), tile, (*tile[:3], _lanes())]
    return _program(product, f"{form.name}_{_ROW_TILE}", shapes)


def _run(words: Tensor, x: Tensor, form: _Form) -> Tensor:
    """Quants times inputs, added up over the fields: x has one dimension more, before the lanes."""
    fields = range(form.fields)
    return compiled.add_up([_field(words, form, index) * x.select(-2, index) for index in fields])


def _scaled(
    total: Tensor, sums: Tensor | int, form: _Form, scale: Tensor, least: Tensor | None = None
) -> Tensor:
    """Of stored quants times inputs, with the sums of these inputs: what their weights make."""
    if form.offset:
        total = total - form.offset * sums
    total = total * scale
    return total if least is None else total - least * sums


@functools.cache
def _decode(form: _Form, dtype: torch.dtype) -> Callable:
    """The fields of some rows, written as weights to the last argument [n, C, J, F, L]."""

    def write(words: Tensor, scale: Tensor, *rest: Tensor) -> None:
        *least, shifts_F1, out_nCJFL = rest
        # The field is a dimension of one loop: written out one by one, each of them is stored by
        # a loop that computes all.
        fields = words.view(torch.int32)[:, :, :, None] >> shifts_F1 & (1 << form.bits) - 1
        factors = [factor[:, :, None, None] for factor in (scale, *least)]
        out_nCJFL.copy_(_scaled(fields.float(), 1, form, *factors))

    weight = _shapes(form)
    shapes = [*weight, (form.fields, 1), ("N", "C", form.words, form.fields, _lanes())]
    dtypes = [*[torch.float32] * len(weight), torch.int32, dtype]
    return _program(write, f"{form.name}_decode", shapes, dtypes)


def _program(
    function: Callable,
    name: str,
    shapes: list[tuple[int | str, ...]],
    dtypes: list[torch.dtype] | None = None,
) -> Callable:
    """One loop per function, whatever its length, with multiplications fused into additions."""
    limits = ("opcount", "reads", "acc_reads")
    options = compiled.OPTIONS | {f"realize_{limit}_threshold": 1 << 20 for limit in limits}
    options["cpp.enable_floating_point_contract_flag"] = "fast"
    return Program(function, name, shapes, dtypes=dtypes, options=options)
