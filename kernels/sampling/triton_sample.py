"""The sampler without sorting: one program per row looks for the keys at which rows are cut.

Three kernels: mask (whole grid), penalties (a few entries per row), and the sampler itself. That
one reads its row several times, from the level-2 cache: for the highest logit, for the total, for
each step of the two pivot searches, for the draw. A search halves the range of 32-bit keys, which
sort as the logits do, until the set above the pivot is the one looked for; equal logits at the
border are counted and taken by lower id. Weights are integers, so sums have no order.

Shapes: R rows, V vocabulary, W words of a mask, H tokens that a row has seen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.sampling.op import Penalties, Settings
from oxillama_torch.kernels.triton_support import (
    DEVICES,
    INTERPRET,
    Variant,
    launch_device,
    priority,
)

__all__ = ["mask_kernel", "penalise_kernel", "sample", "sample_kernel", "variants"]

_BLOCK = 2048
_WARPS = 8
_ONE = tl.constexpr(8796093022208.0)  # fixed_point.ONE
_LOWEST = tl.constexpr(-(1 << 31))
_WEIGHTLESS = tl.constexpr(-1107296257)  # key of -32.0: nothing below it has a weight


@triton.jit
def mask_kernel(logits, bitmask, x, V, W, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, tile): a copy with minus infinity for what is not allowed."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * V + v, mask=v < V, other=0.0)
    if HAS_MASK:
        word = tl.load(bitmask + row * W + v // 32, mask=v < V, other=0)
        value = tl.where((word >> (v % 32)) & 1 == 1, value, -float("inf"))
    tl.store(x + row * V + v, value, mask=v < V)


@triton.jit
def penalise_kernel(
    x, token_ids, counts, repetition, frequency, presence, V, H, BLOCK: tl.constexpr
):
    """Program (row, tile of entries); a token is listed once, so no two entries meet."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + row * H + h, mask=h < H, other=-1)
    count = tl.load(counts + row * H + h, mask=h < H, other=0).to(tl.float32)
    at = x + row * V + token
    value = tl.load(at, mask=token >= 0, other=0.0)
    factor = tl.load(repetition + row)
    value = tl.where(value > 0.0, tl.div_rn(value, factor), value * factor)
    value = value - tl.load(frequency + row) * count
    value = value - tl.load(presence + row) * (count > 0.0).to(tl.float32)
    tl.store(at, value, mask=token >= 0)


@triton.jit
def _key(x):
    """int32 that sorts as the float does; minus and plus zero are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weight(x, LIBDEVICE: tl.constexpr):
    """``round(exp(x) * 2**43)``, ties to even, as int64; the exponential is torch's."""
    if LIBDEVICE:
        e = libdevice.exp(x) * _ONE
    else:
        e = tl.exp(x) * _ONE
    # Adding and taking away 1.5 * 2**23 rounds; larger numbers are whole already.
    return tl.where(e < 4194304.0, (e + 12582912.0) - 12582912.0, e).to(tl.int64)


@triton.jit
def _scale(source, x, row, V, peak, t, BLOCK: tl.constexpr):
    """Write logits relative to the highest, divided by the temperature."""
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        value = tl.load(source + row * V + v, mask=v < V, other=0.0)
        tl.store(x + row * V + v, tl.div_rn(value - peak, t), mask=v < V)
    tl.debug_barrier()


@triton.jit
def _count(x, row, V, low, BLOCK: tl.constexpr):
    """Number of the tokens whose key is ``low`` or more."""
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * V + v, mask=v < V, other=-float("inf"))
        count += ((v < V) & (_key(value) >= low)).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def _above(x, row, V, low, LIBDEVICE: tl.constexpr, BLOCK: tl.constexpr):
    """Weight of the tokens whose key is ``low`` or more."""
    mass = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * V + v, mask=v < V, other=-float("inf"))
        inside = (v < V) & (_key(value) >= low)
        mass += tl.where(inside, _weight(value, LIBDEVICE), 0)
    return tl.sum(mass, axis=0)


@triton.jit
def _cut_by_count(x, row, V, k, BLOCK: tl.constexpr):
    """A key that has ``k`` tokens or more at it or above it, and fewer than ``k`` above it, unless
    it has exactly ``k``: then it may be any between two tokens'."""
    low = tl.full((), _LOWEST, tl.int64)
    high = tl.full((), 0, tl.int64)  # the key of the highest, which is 0.0
    while low < high:
        middle = (low + high + 1) >> 1
        count = _count(x, row, V, middle, BLOCK)
        low = tl.where(count >= k, middle, low)
        # With exactly k tokens above it, any pivot will do.
        high = tl.where(count > k, high, tl.where(count == k, middle, middle - 1))
    return low


@triton.jit
def _cut_by_mass(x, row, V, low, wanted, LIBDEVICE: tl.constexpr, BLOCK: tl.constexpr):
    """The highest key at or above which there is the weight ``wanted``; ``low`` has it."""
    high = tl.full((), 0, tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        mass = _above(x, row, V, middle, LIBDEVICE, BLOCK)
        enough = mass.to(tl.float64) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def sample_kernel(
    logits, source, x, temperature, top_k, top_p, min_p, seeds, positions, tokens, belows, totals,
    V, LIBDEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    k = tl.load(top_k + row).to(tl.int64)
    greedy = t < 1e-5
    t = tl.where(greedy, 1.0, t)
    k = tl.where(greedy, 1, tl.where((k <= 0) | (k > V), V, k))
    peak, raw_peak = _peaks(logits, source, row, V, BLOCK)
    _scale(source, x, row, V, peak, t, BLOCK)
    # A set is: all above a key, and some of those at it, by lower id.
    cut, ties = tl.full((), _LOWEST, tl.int64), tl.full((), 0, tl.int64) + V
    if k < V:
        cut = _cut_by_count(x, row, V, k, BLOCK)
        ties = k - _count(x, row, V, cut + 1, BLOCK)
    p = tl.load(top_p + row)
    if p < 1.0:
        share = _above(x, row, V, cut + 1, LIBDEVICE, BLOCK)
        if k < V:
            share += ties * _weight_at(cut, LIBDEVICE)
        wanted = p * share.to(tl.float64)
        inner = _cut_by_mass(x, row, V, tl.maximum(cut, _WEIGHTLESS), wanted, LIBDEVICE, BLOCK)
        above = _above(x, row, V, inner + 1, LIBDEVICE, BLOCK)
        need = _ties_for(wanted, above, _weight_at(inner, LIBDEVICE))
        need = tl.maximum(need, (_count(x, row, V, inner + 1, BLOCK) == 0).to(tl.int64))
        ties = tl.where(inner == cut, tl.minimum(ties, need), need)
        cut = inner
    least = tl.load(min_p + row) * _ONE
    total = _total(x, row, V, cut, ties, least, LIBDEVICE, BLOCK)
    u = _uniform(tl.load(seeds + row), tl.load(positions + row))
    target = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
    token = _find(x, row, V, cut, ties, least, target, LIBDEVICE, BLOCK)
    tl.store(tokens + row, token)
    tl.store(belows + row, tl.load(logits + row * V + token) - raw_peak)
    tl.store(totals + row, _raw_total(logits, row, V, raw_peak, LIBDEVICE, BLOCK))


@triton.jit
def _ties_for(wanted, above, each):
    """How many equal weights it takes from ``above`` to ``wanted``."""
    each = tl.maximum(each, 1)
    need = ((wanted - above.to(tl.float64)) / each.to(tl.float64)).to(tl.int64)
    short = (above + need * each).to(tl.float64) < wanted
    return need + short.to(tl.int64)


@triton.jit
def _raw_total(logits, row, V, peak, LIBDEVICE: tl.constexpr, BLOCK: tl.constexpr):
    """Weight of all tokens before every step."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * V + v, mask=v < V, other=-float("inf"))
        total += tl.where(v < V, _weight(value - peak, LIBDEVICE), 0)
    return tl.sum(total, axis=0)


@triton.jit
def _peaks(logits, source, row, V, BLOCK: tl.constexpr):
    """The highest logit, and the highest raw one."""
    peak = tl.full((BLOCK,), -float("inf"), tl.float32)
    raw = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < V
        peak = tl.maximum(peak, tl.load(source + row * V + v, mask=inside, other=-float("inf")))
        raw = tl.maximum(raw, tl.load(logits + row * V + v, mask=inside, other=-float("inf")))
    return tl.max(peak, axis=0), tl.max(raw, axis=0)


@triton.jit
def _weight_at(key, LIBDEVICE: tl.constexpr):
    """Weight of the logit that has this key."""
    bits = key.to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return _weight(bits.to(tl.float32, bitcast=True), LIBDEVICE)


@triton.jit
def _tile(x, row, v, V, cut, ties, before, least, LIBDEVICE: tl.constexpr):
    """Weights of a tile, 0 for what is not kept, and the ties that came so far."""
    value = tl.load(x + row * V + v, mask=v < V, other=-float("inf"))
    key = _key(value).to(tl.int64)
    tied = ((v < V) & (key == cut)).to(tl.int64)
    place = before + tl.cumsum(tied, axis=0)
    mass = _weight(value, LIBDEVICE)
    kept = (v < V) & ((key > cut) | ((key == cut) & (place <= ties)))
    kept &= mass.to(tl.float64) >= least
    return tl.where(kept, mass, 0), before + tl.sum(tied, axis=0)


@triton.jit
def _total(x, row, V, cut, ties, least, LIBDEVICE: tl.constexpr, BLOCK: tl.constexpr):
    """Weight of what is kept."""
    total, before = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        mass, before = _tile(x, row, v, V, cut, ties, before, least, LIBDEVICE)
        total += tl.sum(mass, axis=0)
    return total


@triton.jit
def _find(x, row, V, cut, ties, least, target, LIBDEVICE: tl.constexpr, BLOCK: tl.constexpr):
    """The first token whose cumulative weight is above ``target``."""
    done, before = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    token = tl.full((), 0, tl.int64) + V - 1
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        mass, before = _tile(x, row, v, V, cut, ties, before, least, LIBDEVICE)
        passed = done + tl.cumsum(mass, axis=0) > target
        first = tl.min(tl.where(passed, v, V), axis=0).to(tl.int64)
        token = tl.minimum(token, first)
        done += tl.sum(mass, axis=0)
    return token


@triton.jit
def _uniform(seed, position):
    """53 bits of Philox4x32-10 as float64 in [0, 1)."""
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    zero = low * 0
    c0, c1, _, _ = tl.philox(seed, low, high, zero, zero)
    bits = ((c0 >> 5).to(tl.int64) << 26) | (c1 >> 6).to(tl.int64)
    return bits.to(tl.float64) * 1.1102230246251565e-16


@register("sample", "triton", devices=DEVICES, priority=priority(1))
def sample(
    logits: torch.Tensor,
    settings: Settings,
    bitmask: torch.Tensor | None,
    penalties: Penalties | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton backend of :func:`oxillama_torch.kernels.sampling.op.sample`."""
    rows, vocabulary = logits.shape
    s = settings
    source, x = logits, torch.empty_like(logits)
    tokens, totals = logits.new_empty(2, rows, dtype=torch.int64).unbind(0)
    belows = logits.new_empty(rows)
    with launch_device(logits):
        if bitmask is not None or penalties is not None:
            source = x
            mask = logits if bitmask is None else bitmask
            mask_kernel[(rows, triton.cdiv(vocabulary, _BLOCK))](
                logits, mask, x, vocabulary, mask.shape[1],
                HAS_MASK=bitmask is not None, BLOCK=_BLOCK,
            )  # fmt: skip
        if penalties is not None:
            p, seen = penalties, penalties.token_ids.shape[1]
            penalise_kernel[(rows, max(1, triton.cdiv(seen, 1024)))](
                x, p.token_ids, p.counts, p.repetition, p.frequency, p.presence,
                vocabulary, seen, BLOCK=1024, enable_fp_fusion=False,
            )  # fmt: skip
        sample_kernel[(rows,)](
            logits, source, x, s.temperature, s.top_k, s.top_p, s.min_p, s.seeds, s.positions,
            tokens, belows, totals, vocabulary,
            LIBDEVICE=not INTERPRET, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return tokens, belows, totals


def variants() -> list[Variant]:
    """The compiled forms, for counting without a GPU what they take."""
    rows = {"temperature": "*fp32", "top_k": "*i32", "top_p": "*fp64", "min_p": "*fp64"}
    rows |= {"seeds": "*i64", "positions": "*i64", "tokens": "*i64", "totals": "*i64"}
    return [
        Variant(
            "sample",
            sample_kernel,
            {
                "logits": "*fp32",
                "source": "*fp32",
                "x": "*fp32",
                **rows,
                "belows": "*fp32",
                "V": "i32",
            },
            {"LIBDEVICE": True, "BLOCK": _BLOCK},
            ("logits", "source", "x", *rows, "belows", "V"),
            _WARPS,
        ),
        Variant(
            "sample-mask",
            mask_kernel,
            {"logits": "*fp32", "bitmask": "*i32", "x": "*fp32", "V": "i32", "W": "i32"},
            {"HAS_MASK": True, "BLOCK": _BLOCK},
            ("logits", "bitmask", "x", "V"),
        ),
        Variant(
            "sample-penalties",
            penalise_kernel,
            {"x": "*fp32", "token_ids": "*i64", "counts": "*i32", "V": "i32", "H": "i32"}
            | dict.fromkeys(("repetition", "frequency", "presence"), "*fp32"),
            {"BLOCK": 1024},
            ("x", "token_ids", "counts", "V"),
        ),
    ]
