"""Attention over pages in eager torch: the truth, vectorised, invariant to how work is cut.

Work is cut into fixed pieces at absolute positions, whatever the batch looks like:

* A *query tile* holds the tokens at positions [i n, i n + n) of one request, with
  n = tokens_per_tile(G). Row (position % n) * G + g of it is head g of a group; rows without a
  token are zero.
* A *KV tile* holds the keys at positions [j C, j C + C), C = KV_TILE, whatever the page size.
* An *item* is a query tile against a KV tile. Per KV head it is a [R, D] x [D, C] and a
  [R, C] x [C, Dv] product, the same shapes in every call.

The maximum of a row is exact in any order, its sums over KV tiles are added in order of position,
and a tile that a row cannot see adds an exact zero. Hence decoding, prefill in one piece and in any
chunks, alone or in a batch, give the same bits, provided that a matrix of ``torch.bmm`` does not
depend on the others of its batch. On CPU that holds for R and C that are multiples of 8 (tested;
with MKL and 7 rows it does not hold).

Query tiles are computed in order of falling number of items, and items step by step: step s holds
KV tile s of every query tile that has one. So the query tiles of a step are the first ones.

Shapes: T query tokens of B requests, N query tiles, I items, Hq query heads, Hkv key/value heads,
G = Hq / Hkv, R rows of a query tile, D key head dim, Dv value head dim, P pages of S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from oxillama_torch.kernels.kv_formats import KVFormat, decode, format_of, raw
from oxillama_torch.kernels.registry import register

__all__ = ["KV_TILE", "attention", "tokens_per_tile"]

KV_TILE = 32
_ROWS = 8  # rows of a query tile are a multiple of it
# Query tiles are computed in groups that gather about this much of K: a group stays in the cache,
# and the allocator hands the same memory to the next one.
_GROUP_BYTES = 4 << 20


def tokens_per_tile(group: int) -> int:
    """Query tokens of a tile of ``group`` heads each: few, as decoding fills only one of them."""
    return max(2, _ROWS // group)


@dataclass
class _Tiles:
    """Query tiles, by falling number of items; every field is int64 [N]."""

    request: np.ndarray
    origin: np.ndarray  # position of the first row
    first: np.ndarray  # position of the first query token
    last: np.ndarray  # position of the last query token
    kv_begin: np.ndarray  # first KV tile that a row sees
    kv_count: np.ndarray

    def __getitem__(self, which: slice | np.ndarray) -> _Tiles:
        return _Tiles(*(getattr(self, field.name)[which] for field in fields(self)))


@dataclass
class _Items:
    """The items of some query tiles, step by step."""

    tile: torch.Tensor  # int64 [I]
    ahead: torch.Tensor  # int64 [I]: position of its first key less that of its first row
    units: torch.Tensor  # int64 [I * units of a KV tile]: where its keys lie in the pool
    unwritten: torch.Tensor  # int64: slots of I * C past the end of their request
    edge: torch.Tensor  # int64 [edges]: items with a key that some row does not see
    hidden: torch.Tensor  # bool [edges, R, C]: these keys
    sizes: list[int]  # items of each step


@register("attention", "reference")
def attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of :func:`oxillama_torch.kernels.attention.op.attention`."""
    del max_query_len, max_seq_len  # the lengths themselves are at hand
    (_, page_size, kv_heads, _), dim = k_pages.shape, q.shape[2]
    format = format_of(k_pages, dim)
    group = q.shape[1] // kv_heads
    tokens = tokens_per_tile(group)
    rows = -(-tokens * group // _ROWS) * _ROWS
    table, starts, lens = (
        x.cpu().numpy().astype(np.int64) for x in (page_table, query_start, seq_lens)
    )
    tiles, tile_of, place_of = _query_tiles(starts, lens, tokens, window)
    tile_of, place_of = (torch.from_numpy(x).to(q.device) for x in (tile_of, place_of))

    count = len(tiles.request)
    packed = q.new_zeros(count, kv_heads, rows, dim, dtype=torch.float32)
    by_token = packed[:, :, : tokens * group].unflatten(2, (tokens, group))
    by_token[tile_of, :, place_of] = q.float().unflatten(1, (kv_heads, group)) * scale
    sinks, slopes = (
        x if x is None else x.view(kv_heads, 1, group).repeat(1, 1, -(-rows // group))[..., :rows]
        for x in (sinks, slopes)
    )

    out = q.new_empty(count, kv_heads, rows, format.dim(v_pages.shape[3]), dtype=torch.float32)
    item_bytes = KV_TILE * kv_heads * dim * 4
    for part in _parts(tiles.kv_count, max(1, _GROUP_BYTES // item_bytes)):
        items = _items(tiles[part], lens, table, page_size, group, rows, window, q.device)
        done = _attend(packed[part], k_pages, v_pages, format, items, group, softcap, sinks, slopes)
        out[part] = done.transpose(0, 1)
    by_token = out[:, :, : tokens * group].unflatten(2, (tokens, group))
    return by_token[tile_of, :, place_of].flatten(1, 2).to(q.dtype)


def _query_tiles(
    starts: np.ndarray, lens: np.ndarray, tokens: int, window: int | None
) -> tuple[_Tiles, np.ndarray, np.ndarray]:
    """All query tiles, and for each query token its tile and its place there."""
    new = np.diff(starts)
    begin = lens - new
    counts = np.where(new > 0, (lens - 1) // tokens - begin // tokens + 1, 0)
    before = np.cumsum(counts) - counts
    request = np.repeat(np.arange(len(new)), counts)
    origin = (begin[request] // tokens + np.arange(len(request)) - before[request]) * tokens
    first = np.maximum(origin, begin[request])
    last = np.minimum(origin + tokens, lens[request]) - 1
    kv_begin = np.maximum(first - window + 1, 0) // KV_TILE if window else np.zeros_like(first)
    kv_count = last // KV_TILE - kv_begin + 1
    order = np.argsort(-kv_count, kind="stable")
    tiles = _Tiles(request, origin, first, last, kv_begin, kv_count)[order]

    owner = np.repeat(np.arange(len(new)), new)
    position = np.arange(len(owner)) - starts[owner] + begin[owner]
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    tile_of = rank[before[owner] + position // tokens - begin[owner] // tokens]
    return tiles, tile_of, position % tokens


def _parts(kv_count: np.ndarray, limit: int) -> list[slice]:
    """Cut query tiles into runs of at most ``limit`` items, or of one query tile."""
    ends = np.cumsum(kv_count)
    parts, start = [], 0
    while start < len(ends):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + limit, side="right")))
        parts.append(slice(start, stop))
        start = stop
    return parts


def _items(
    tiles: _Tiles,
    lens: np.ndarray,
    table: np.ndarray,
    page_size: int,
    group: int,
    rows: int,
    window: int | None,
    device: torch.device,
) -> _Items:
    sizes = np.searchsorted(-tiles.kv_count, -np.arange(tiles.kv_count[0]))
    step = np.repeat(np.arange(len(sizes)), sizes)
    tile = np.arange(len(step)) - (np.cumsum(sizes) - sizes)[step]
    request = tiles.request[tile]
    key = (tiles.kv_begin[tile] + step)[:, None] * KV_TILE + np.arange(KV_TILE)
    ahead = key[:, 0] - tiles.origin[tile]

    # K and V are gathered by units: pages, or parts of pages that are larger than a KV tile. Units
    # past the end of a request become its last one: its page table says nothing about them.
    unit = min(page_size, KV_TILE)
    start = np.minimum(key[:, ::unit], lens[request, None] - 1)
    units = table[request[:, None], start // page_size] * (page_size // unit)
    units += start % page_size // unit

    hides = key[:, -1] > tiles.first[tile]
    if window is not None:
        hides |= key[:, 0] <= tiles.last[tile] - window
    edge = hides.nonzero()[0]
    key, at = key[edge], tile[edge]
    past_end = key >= lens[request[edge], None]
    unwritten = (edge[:, None] * KV_TILE + np.arange(KV_TILE))[past_end]
    # Rows without a token see what their neighbours see, so that no row is without a key.
    row = tiles.origin[at, None] + np.arange(rows) // group
    row = np.clip(row, tiles.first[at, None], tiles.last[at, None])[:, :, None]
    hidden = key[:, None] > row
    if window is not None:
        hidden |= key[:, None] <= row - window
    arrays = (tile, ahead, units.ravel(), unwritten, edge, hidden)
    return _Items(*(torch.from_numpy(x).to(device) for x in arrays), sizes.tolist())


def _gather(pages: torch.Tensor, units: torch.Tensor, format: KVFormat) -> torch.Tensor:
    """The KV tiles made of ``units``, float32 [I, C, Hkv, dim]."""
    _, page_size, kv_heads, row = pages.shape
    pool = raw(pages).view(-1, min(page_size, KV_TILE), kv_heads, row)
    return decode(pool.index_select(0, units).view(-1, KV_TILE, kv_heads, row), format)


def _attend(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    format: KVFormat,
    items: _Items,
    group: int,
    softcap: float | None,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of some query tiles.

    Args:
        q: float32 [N, Hkv, R, D], scaled.
        group: G.
        sinks, slopes: float32 [Hkv, 1, R] or None.

    Returns:
        float32 [Hkv, N, R, Dv].
    """
    tiles, kv_heads, rows, _ = q.shape
    k, v = (_gather(pages, items.units, format) for pages in (k_pages, v_pages))
    value_dim = v.shape[3]
    # A hidden key weighs zero, but zero times a stale NaN is NaN.
    v.flatten(0, 1).index_fill_(0, items.unwritten, 0.0)

    q = q.index_select(0, items.tile)
    scores = q.new_empty(kv_heads, len(q), rows, KV_TILE)
    for head in range(kv_heads):
        torch.bmm(q[:, head], k[:, :, head].transpose(1, 2), out=scores[head])
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if slopes is not None:
        row = torch.arange(rows, device=q.device)[:, None] // group
        distance = items.ahead[:, None, None] + torch.arange(KV_TILE, device=q.device) - row
        scores += slopes[..., None] * distance
    edge = scores.index_select(1, items.edge).masked_fill_(items.hidden, -torch.inf)
    scores.index_copy_(1, items.edge, edge)

    top = q.new_full((kv_heads, tiles, rows), -torch.inf)
    if sinks is not None:
        top.copy_(sinks)
    for size, peak in zip(items.sizes, scores.amax(-1).split(items.sizes, 1)):
        torch.maximum(top[:, :size], peak, out=top[:, :size])
    weights = scores.sub_(top.index_select(1, items.tile)[..., None]).exp_()
    values = q.new_empty(kv_heads, len(q), rows, value_dim)
    for head in range(kv_heads):
        torch.bmm(weights[head], v[:, :, head], out=values[head])

    total = torch.zeros_like(top) if sinks is None else torch.exp(sinks - top)
    out = q.new_zeros(kv_heads, tiles, rows, value_dim)
    for size, weight in zip(items.sizes, weights.sum(-1).split(items.sizes, 1)):
        total[:, :size] += weight
    for size, value in zip(items.sizes, values.split(items.sizes, 1)):
        out[:, :size] += value
    return out.div_(total[..., None])
