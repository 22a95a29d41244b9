"""One JSON line per request: who asked for what, and what it cost; never what it said."""

from __future__ import annotations

import sys
import threading
from datetime import datetime, timezone

import orjson

from oxillama_torch.errors import UnsupportedError

__all__ = ["AccessLog"]


class AccessLog:
    """Writes lines to a file that is appended to, or to stderr (``-``). Thread-safe.

    Raises:
        UnsupportedError: the file cannot be written.
    """

    def __init__(self, target: str) -> None:
        self._lock = threading.Lock()
        try:
            # Unbuffered: a line is one write, and is there when the process dies.
            self._own = None if target == "-" else open(target, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UnsupportedError(f"access log {target}: {error.strerror}") from None

    def write(self, entry: dict) -> None:
        """Add a line; ``entry`` gets the time."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = orjson.dumps({"time": now, **entry}) + b"\n"
        with self._lock:
            if self._own is not None:
                self._own.write(line)
            else:
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._own is not None:
            self._own.close()
