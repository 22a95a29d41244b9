"""One vector out of the hidden states of a prompt, kept up chunk by chunk.

The result does not depend on how the prompt was cut: a mean is summed row after row in float64.

R rows of a chunk, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from oxillama_torch.engine.request import Pooling

__all__ = ["finish_pooling", "pool_rows"]


def pool_rows(pooling: Pooling, so_far: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """Take the rows of a chunk into the pooled row.

    Args:
        pooling: how.
        so_far: [1, D] of the chunks before, None for the first; float64 for ``mean``.
        rows: float32 [R, D], the positions that ``RequestState`` asks for with this pooling.

    Returns: [1, D].
    """
    return _POOLINGS[pooling](so_far, rows)


def finish_pooling(pooling: Pooling, pooled: np.ndarray, tokens: int) -> np.ndarray:
    """float32 [1, D] of a prompt of ``tokens`` tokens, of what ``pool_rows`` has come to."""
    return (pooled / tokens if pooling == "mean" else pooled).astype(np.float32)


def _sum(so_far: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    if so_far is not None:
        rows = np.concatenate([so_far, rows])
    # accumulate goes row by row; sum() may pair rows up, depending on how many there are.
    return np.add.accumulate(rows, axis=0)[-1:]


def _max(so_far: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    top = rows.max(0, keepdims=True)
    return top if so_far is None else np.maximum(so_far, top)


def _only(so_far: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    assert so_far is None and len(rows) == 1, "one position makes the embedding"
    return rows


_POOLINGS: dict[Pooling, Callable[[np.ndarray | None, np.ndarray], np.ndarray]] = {
    "last": _only,
    "first": _only,
    "mean": _sum,
    "max": _max,
}
