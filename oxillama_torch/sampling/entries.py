"""Single entries (row, token) of a step's logits, moved to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["entry_index"]


def entry_index(
    where: Sequence[np.ndarray], ids: Sequence[np.ndarray], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of single entries.

    Args:
        where: rows, in parts.
        ids: tokens, in parts of the same lengths.
        device: where the logits are.

    Returns: int64 [E] rows and int64 [E] columns.
    """
    both = np.stack([np.concatenate(where), np.concatenate(ids)]).astype(np.int64)
    rows, columns = torch.from_numpy(both).to(device).unbind(0)
    return rows, columns
