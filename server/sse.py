"""Server-sent events: framing, the keep-alive comment and errors inside a stream."""

from __future__ import annotations

import orjson

from oxillama_torch.server.errors import envelope

__all__ = ["DONE", "HEADERS", "PING", "TextFrame", "error_frame", "frame", "named_frame"]

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
_TYPE = b'{"type":"'
# Proxies must neither buffer nor transform a stream.
HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


def frame(payload: dict) -> bytes:
    """One ``data:`` event."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


class TextFrame:
    """Frames that differ in one text: all else in them is serialised once.

    Args:
        payload: the event, with ``HOLE`` in place of the text.
    """

    #: No text of ours: names of models come from command lines and files, which have no NUL.
    HOLE = "\0text\0"

    __slots__ = ("_after", "_before")

    def __init__(self, payload: dict) -> None:
        self._before, hole, self._after = frame(payload).partition(orjson.dumps(self.HOLE))
        assert hole, "the payload has a place for the text"

    def __call__(self, text: str) -> bytes:
        """The ``data:`` event with this text."""
        return b"".join((self._before, orjson.dumps(text), self._after))


def named_frame(line: bytes) -> bytes:
    """An event whose name is its ``type``, which must be the first key of the JSON object."""
    assert line.startswith(_TYPE), "events begin with their type"
    name = line[len(_TYPE) : line.index(b'"', len(_TYPE))]
    return b"event: " + name + b"\ndata: " + line + b"\n\n"


def error_frame(error: Exception) -> bytes:
    """An error after the headers have left: the SDKs raise on a top-level ``error``."""
    return frame(envelope(error))
