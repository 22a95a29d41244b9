"""The server-sent events of one generation, whoever writes them to the client."""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Protocol

from flask import Response

from oxillama_torch.engine.outbox import Listener
from oxillama_torch.errors import OxiLlamaError
from oxillama_torch.server import sse
from oxillama_torch.server.errors import code_of
from oxillama_torch.server.output import ClientGone, Generation, Output

__all__ = ["EventStream", "Form", "Frames"]

log = logging.getLogger(__name__)


class Form(Protocol):
    """How a route words its outputs. ``joins``: it needs no Piece per token."""

    joins: bool

    def frames(self, output: Output) -> bytes: ...
    def last_chunk(self) -> dict | None: ...
    def whole(self, outputs: Iterator[Output]) -> Response: ...


class Frames(Protocol):
    """A stream of frames, whoever writes them to the client. ``ended``: nothing more comes."""

    ended: bool

    def notify(self, listener: Listener, name: object) -> None:
        """Have ``listener`` called with ``[name]``, at once and whenever there is something."""

    def ready(self) -> bytes:
        """The frames that can be sent now."""

    def frames(self, ping_interval_s: float) -> Iterator[bytes]:
        """All frames as they come, with a ping after each silent interval."""

    def client_gone(self) -> None:
        """Nobody reads any more."""

    def abort(self, error: Exception) -> None:
        """End soon, and say why."""

    def close(self) -> None:
        """Let go of everything, whether it has ended or not."""


class EventStream:
    """Frames of one generation. No exception leaves it: a client would see a cut connection.

    Args:
        generation: where outputs come from.
        form: how they are worded.
        request_id: for the log.
        error_frame: how an error is worded; end: what follows the last frame.
        keep: called when all has been generated: the client is told of the end when its future is
            done, or of the error that it has.
    """

    __slots__ = (
        "_end", "_error_frame", "_form", "_keep", "_kept", "_request_id", "_tell", "abort",
        "client_gone", "close", "ended", "generation",
    )  # fmt: skip

    def __init__(
        self,
        generation: Generation,
        form: Form,
        request_id: str,
        *,
        error_frame: Callable[[Exception], bytes] = sse.error_frame,
        end: bytes = sse.DONE,
        keep: Callable[[], Future] | None = None,
    ) -> None:
        self._error_frame, self._end = error_frame, end
        self.generation = generation
        self.client_gone = generation.client_gone
        self.abort, self.close = generation.abort, generation.cancel
        self._form = form
        self._request_id = request_id
        self._keep, self._kept = keep, None
        self._tell: Callable[[], None] = lambda: None
        self.ended = False

    def notify(self, listener: Listener, name: object) -> None:
        """Have ``listener`` called with ``[name]``, at once and whenever there is something."""
        self._tell = lambda: listener([name])
        self.generation.notify(listener, name)

    def ready(self, timeout_s: float = 0.0) -> bytes:
        """The frames that can be sent now, after waiting up to ``timeout_s`` for the first."""
        frames: list[bytes] = []
        try:
            wait_s = timeout_s if self._kept is None else 0.0
            for output in self.generation.poll(wait_s, join=self._form.joins):
                frames.append(self._form.frames(output))
            if not (self.generation.finished and self._is_kept(timeout_s)):
                return b"".join(frames)
            if (last := self._form.last_chunk()) is not None:
                frames.append(sse.frame(last))
        except ClientGone:
            self.ended = True
            return b""
        except Exception as error:
            if not isinstance(error, OxiLlamaError):
                log.exception("request %s failed while streaming", self._request_id)
            self.generation.cancel()
            self.generation.meter.errors.append(code_of(error))
            frames.append(self._error_frame(error))
        self.ended = True
        return b"".join([*frames, self._end])

    def _is_kept(self, timeout_s: float) -> bool:
        if self._keep is None:
            return True
        if self._kept is None:
            self._kept = self._keep()
            self._kept.add_done_callback(lambda _: self._tell())
        if timeout_s:
            concurrent.futures.wait([self._kept], timeout_s)
        if self._kept.done():
            self._kept.result()
        return self._kept.done()

    def frames(self, ping_interval_s: float) -> Iterator[bytes]:
        """All frames as they come, with a ping after each silent interval."""
        while not self.ended:
            data = self.ready(ping_interval_s)
            if data or not self.ended:
                yield data or sse.PING
