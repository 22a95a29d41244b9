"""Errors of the store, as requests see them."""

from __future__ import annotations

from oxillama_torch.errors import RequestError

__all__ = ["StoreError"]


class StoreError(RequestError):
    """The store cannot save or read now. Nothing of the request has been acknowledged.

    Args:
        reason: what is wrong, free of internals.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"The server's store is unavailable: {reason}.",
            status=503,
            code="store_unavailable",
            type="server_error",
        )
