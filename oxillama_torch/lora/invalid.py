"""The error of all readers of adapters."""

from __future__ import annotations

from oxillama_torch.errors import RequestError

__all__ = ["invalid_adapter"]


def invalid_adapter(name: str, why: str) -> RequestError:
    """The error for an adapter that this model cannot use."""
    return RequestError(f"adapter {name!r}: {why}", code="invalid_adapter", param="path")
