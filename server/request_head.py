"""How many bytes a request has, from its head alone; the parser judges whether it is valid."""

from __future__ import annotations

__all__ = ["MAX_HEAD_BYTES", "wanted_bytes"]

MAX_HEAD_BYTES = 64 * 1024


def wanted_bytes(received: bytes | bytearray, searched: int, max_body: int) -> int | None:
    """Bytes of head and body to collect, or None while the head is incomplete.

    Args:
        received: what has come so far.
        searched: bytes known not to hold the start of the blank line that ends the head.
        max_body: a longer body is left to the thread that handles the request, as is one that
            is chunked or waits for ``100 Continue``.
    """
    end = received.find(b"\r\n\r\n", searched)
    if end < 0:
        # Too long for a head: the parser answers 431.
        return len(received) if len(received) > MAX_HEAD_BYTES else None
    body = 0
    for line in bytes(received[:end]).lower().split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name == b"expect":
            return end + 4
        if name == b"content-length":
            digits = value.strip()
            body = int(digits) if digits.isdigit() and len(digits) < 16 else 0
    return end + 4 + (body if body <= max_body else 0)
