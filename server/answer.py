"""Sending a generation to its client: one JSON body, or a stream of server-sent events."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Protocol

from flask import Response, current_app, g

from oxillama_torch.errors import OxiLlamaError
from oxillama_torch.server import sse
from oxillama_torch.server.http import client_socket
from oxillama_torch.server.lifecycle import Lifecycle
from oxillama_torch.server.output import ClientGone, Generation, Output, Ping
from oxillama_torch.server.service import Service
from oxillama_torch.server.watcher import DisconnectWatcher

__all__ = ["Form", "answer", "deadline_of"]

log = logging.getLogger(__name__)


class Form(Protocol):
    """How a route words its outputs."""

    def chunks(self, output: Output) -> Iterator[dict]: ...
    def last_chunk(self) -> dict | None: ...
    def whole(self, outputs: Iterator[Output]) -> Response: ...


def deadline_of(service: Service) -> float | None:
    """``time.monotonic()`` at which a request that starts now must have ended."""
    timeout_s = service.config.request_timeout_s
    return None if timeout_s is None else time.monotonic() + timeout_s


def answer(
    service: Service, generation: Generation, form: Form, *, stream: bool, ignored: list[str]
) -> Response:
    """The response to a request whose generation has been submitted.

    Args:
        ignored: request fields that nothing read; named in a header, so that a typing error in
            a field's name does not pass unseen.
    """
    guard = contextlib.ExitStack()
    watcher: DisconnectWatcher = current_app.extensions["disconnect_watcher"]
    lifecycle: Lifecycle = current_app.extensions["lifecycle"]
    guard.callback(generation.cancel)
    guard.enter_context(lifecycle.running(generation.abort))
    guard.enter_context(watcher.watching(client_socket(), generation.client_gone))
    if stream:
        events = _stream(generation, form, service.config.ping_interval_s, g.request_id)
        response = Response(events, mimetype="text/event-stream", headers=sse.HEADERS)
        # Not in the generator: one that was never started runs no clean-up.
        response.call_on_close(guard.close)
    else:
        with guard:
            try:
                response = form.whole(generation.outputs())
            except ClientGone:
                response = Response(status=499)
    if ignored:
        response.headers["x-ignored-fields"] = ", ".join(ignored)
    return response


def _stream(
    generation: Generation,
    form: Form,
    ping_interval_s: float,
    request_id: str,
) -> Iterator[bytes]:
    """Events of a stream. No exception leaves it: a client would see a cut connection."""
    try:
        for output in generation.outputs(ping_interval_s):
            if isinstance(output, Ping):
                yield sse.PING
            for chunk in form.chunks(output):
                yield sse.frame(chunk)
        last = form.last_chunk()
        if last is not None:
            yield sse.frame(last)
    except ClientGone:
        return
    except Exception as error:
        if not isinstance(error, OxiLlamaError):
            log.exception("request %s failed while streaming", request_id)
        yield sse.error_frame(error)
    yield sse.DONE
