"""Server-sent events: framing, the keep-alive comment and errors inside a stream."""

from __future__ import annotations

import orjson

from oxillama_torch.server.errors import envelope

__all__ = ["DONE", "HEADERS", "PING", "error_frame", "frame", "named_frame"]

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
_TYPE = b'{"type":"'
# Proxies must neither buffer nor transform a stream.
HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


def frame(payload: dict) -> bytes:
    """One ``data:`` event."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def named_frame(line: bytes) -> bytes:
    """An event whose name is its ``type``, which must be the first key of the JSON object."""
    assert line.startswith(_TYPE), "events begin with their type"
    name = line[len(_TYPE) : line.index(b'"', len(_TYPE))]
    return b"event: " + name + b"\ndata: " + line + b"\n\n"


def error_frame(error: Exception) -> bytes:
    """An error after the headers have left: the SDKs raise on a top-level ``error``."""
    return frame(envelope(error))
