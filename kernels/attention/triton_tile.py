"""Device functions that the attention kernels share: one query tile against KV tiles.

Prefill and decode call the same functions in the same order, so that they round alike:

* A query tile holds TOKENS positions at a multiple of TOKENS; its row r is token r // GROUP, head
  r % GROUP of one KV head. Rows of one tile do not touch each other.
* KV tiles lie at multiples of BLOCK_N. A tile in which a row sees no key leaves that row's bits as
  they are: its weights are exact zeros, and its maximum stays.
* A segment, a run of KV tiles at multiples of the segment length, is summed up by itself, and
  segments are merged in order of position. Where they are cut among programs is then a matter of
  speed alone.
* Every product that feeds a sum is an explicit fma, or the compiler would choose, differently in
  different kernels, which to contract.

Shapes: BLOCK_M rows of a query tile, BLOCK_N keys of a KV tile, BLOCK_D and BLOCK_DV key and value
head dims rounded up to a power of two, S slots of a page.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oxillama_torch.kernels.kv_tile import load_tile

__all__ = ["FLOOR", "attend", "load_queries", "load_tilt", "merge", "place", "visible"]

# Below any score. It stands for minus infinity, of which the difference with itself is NaN.
FLOOR = tl.constexpr(-1e30)


@triton.jit
def place(query_start, seq_lens, request, tile, TOKENS: tl.constexpr):
    """(index of the first query token, its position, length, origin of the query tile)."""
    start = tl.load(query_start + request)
    length = tl.load(seq_lens + request)
    begin = length - (tl.load(query_start + request + 1) - start)
    # A request without query tokens begins at its end, and has no tile before it.
    origin = tl.where(begin < length, (begin // TOKENS + tile) * TOKENS, length)
    return start, begin, length, origin


@triton.jit
def load_queries(
    q, start, begin, length, origin, kv_head,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """(query tile, position of each row, index of each row among all T * Hq, which rows exist)."""
    r = tl.arange(0, BLOCK_M)
    position = origin + r // GROUP
    valid = (r < TOKENS * GROUP) & (position >= begin) & (position < length)
    token = (start + position - begin).to(tl.int64)
    row = (token * HKV + kv_head) * GROUP + r % GROUP
    d = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (d < D)[None, :]
    tile = tl.load(q + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    return tile.to(DOT_DTYPE), position, row, valid


@triton.jit
def load_tilt(slopes, kv_head, factor, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """ALiBi's slope of each row, in the units of scores."""
    head = kv_head * GROUP + tl.arange(0, BLOCK_M) % GROUP
    return tl.load(slopes + head) * 1.4426950408889634 / factor


@triton.jit
def visible(
    begin, length, origin, window,
    TOKENS: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """KV positions [low, high) that a query tile sees; those in [left, right) need no mask."""
    first = tl.maximum(origin, begin)
    high = tl.minimum(origin + TOKENS, length)
    right = (first + 1) // BLOCK_N * BLOCK_N
    low = first * 0
    left = first * 0
    if HAS_WINDOW:
        low = tl.maximum(first + 1 - window, 0) // BLOCK_N * BLOCK_N
        left = tl.maximum(high - window + BLOCK_N - 1, 0) // BLOCK_N * BLOCK_N
        right = tl.maximum(left, right)
    return low, left, right, high


@triton.jit
def _attend_range(
    q, position, top, total, acc, k_pages, v_pages, table, kv_head, start, stop, length,
    factor, inner, cap, window, tilt,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DOT_DTYPE: tl.constexpr, KV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the KV tiles in [start, stop)."""
    n = tl.arange(0, BLOCK_N)
    for at in range(start, stop, BLOCK_N):
        key = at + n
        inside = key < length
        if S >= BLOCK_N:
            slot = tl.load(table + at // S).to(tl.int64) * S + at % S + n
        elif MASKED:
            slot = tl.load(table + key // S, mask=inside, other=0).to(tl.int64) * S + key % S
        else:
            slot = tl.load(table + key // S).to(tl.int64) * S + key % S
        k = load_tile(k_pages, slot, kv_head, inside, HKV, D, BLOCK_D, MASKED, KV, DOT_DTYPE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HAS_CAP:
            # tanh(x) = sign(x) (1 - e) / (1 + e) with e = exp(-2 |x|)
            e = tl.exp2(-tl.abs(scores * inner))
            capped = cap * (1.0 - e) / (1.0 + e)
            scores = tl.where(scores < 0.0, -capped, capped)
        if HAS_SLOPES:
            distance = (key[None, :] - position[:, None]).to(tl.float32)
            scores = tl.fma(distance, tilt[:, None], scores)
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if HAS_WINDOW:
                seen &= key[None, :] > position[:, None] - window
            scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(tl.fma(scores, factor, -(peak * factor)[:, None]))
        fade = tl.exp2((top - peak) * factor)
        total = tl.fma(total, fade, tl.sum(weights, axis=1))
        v = load_tile(v_pages, slot, kv_head, inside, HKV, DV, BLOCK_DV, MASKED, KV, DOT_DTYPE)
        acc = tl.dot(weights.to(DOT_DTYPE), v, acc * fade[:, None], input_precision="ieee")
        top = peak
    return top, total, acc


@triton.jit
def attend(
    q, position, top, total, acc, k_pages, v_pages, table, kv_head, start, stop, left, right,
    length, factor, inner, cap, window, tilt,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT_DTYPE: tl.constexpr,
    KV: tl.constexpr,
):  # fmt: skip
    """Go on from (top, total, acc) over the KV tiles in [start, stop).

    Args:
        q: query tile [BLOCK_M, BLOCK_D]; position: of its rows.
        top, total, acc: maximum score, sum of weights, weighted values of each row so far.
        table: the request's page table.
        left, right: no row needs a mask in [left, right).
        factor: turns scores into powers of two.
        tilt: of ``load_tilt``; anything without slopes.
        inner, cap: the score is cap * tanh(dot * scale / cap) with inner = 2 log2(e) scale / cap.
    """
    middle = tl.minimum(tl.maximum(left, start), stop)
    end = tl.minimum(tl.maximum(right, middle), stop)
    if HAS_WINDOW:
        top, total, acc = _attend_range(
            q, position, top, total, acc, k_pages, v_pages, table, kv_head, start, middle, length,
            factor, inner, cap, window, tilt, HKV, D, DV, S, HAS_WINDOW, HAS_CAP, HAS_SLOPES,
            BLOCK_N, BLOCK_D, BLOCK_DV, DOT_DTYPE, KV, True,
        )  # fmt: skip
    top, total, acc = _attend_range(
        q, position, top, total, acc, k_pages, v_pages, table, kv_head, middle, end, length,
        factor, inner, cap, window, tilt, HKV, D, DV, S, HAS_WINDOW, HAS_CAP, HAS_SLOPES,
        BLOCK_N, BLOCK_D, BLOCK_DV, DOT_DTYPE, KV, False,
    )  # fmt: skip
    return _attend_range(
        q, position, top, total, acc, k_pages, v_pages, table, kv_head, end, stop, length,
        factor, inner, cap, window, tilt, HKV, D, DV, S, HAS_WINDOW, HAS_CAP, HAS_SLOPES,
        BLOCK_N, BLOCK_D, BLOCK_DV, DOT_DTYPE, KV, True,
    )  # fmt: skip


@triton.jit
def merge(top, total, acc, segment_top, segment_total, segment_acc, factor):
    """Add a segment: (top, total, acc) of shapes [M], [M], [M, BLOCK_DV]."""
    peak = tl.maximum(top, segment_top)
    fade = tl.exp2((top - peak) * factor)
    weight = tl.exp2((segment_top - peak) * factor)
    total = tl.fma(total, fade, segment_total * weight)
    acc = tl.fma(acc, fade[:, None], segment_acc * weight[:, None])
    return peak, total, acc
