"""A logits processor as users write them, to be named on the command line."""

from __future__ import annotations

import torch

__all__ = ["loudest"]


def loudest(token_ids, logits):
    """Whatever came before, say token 300."""
    out = torch.full_like(logits, -torch.inf)
    out[300] = 0
    return out
