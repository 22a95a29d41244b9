"""Sending a generation to its client: one JSON body, or a stream of server-sent events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from flask import Response, current_app, g, request

from oxillama_torch.server import sse
from oxillama_torch.server.embedding import Embedding
from oxillama_torch.server.event_stream import EventStream, Form
from oxillama_torch.server.http import client_socket
from oxillama_torch.server.lifecycle import Lifecycle
from oxillama_torch.server.output import ClientGone, Generation
from oxillama_torch.server.output_thread import OutputThread
from oxillama_torch.server.service import Service
from oxillama_torch.server.watcher import DisconnectWatcher

__all__ = ["answer", "deadline_of"]


def deadline_of(service: Service) -> float | None:
    """``time.monotonic()`` at which a request that starts now must have ended."""
    timeout_s = service.config.request_timeout_s
    return None if timeout_s is None else time.monotonic() + timeout_s


def answer(
    generation: Generation | Embedding, form: Form, *, stream: bool, ignored: list[str]
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
        body = _stream(EventStream(generation, form, g.request_id))
        response = Response(body, mimetype="text/event-stream", headers=sse.HEADERS)
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


def _stream(events: EventStream) -> Iterator[bytes]:
    """The body of a stream.

    Where the socket is ours to write to, the output thread writes the events and the request's
    thread only waits: waking a thread for each token would cost more than the token. Elsewhere
    (the test client, TLS, another server) the events leave through the generator.
    """
    output: OutputThread = current_app.extensions["output_thread"]
    sock = client_socket()
    if sock is None or not OutputThread.can_write(sock):
        return events.frames(output.ping_interval_s)
    chunked = request.environ.get("SERVER_PROTOCOL") == "HTTP/1.1"
    return _written(events, output, sock, chunked)


def _written(events: EventStream, output: OutputThread, sock, chunked: bool) -> Iterator[bytes]:
    # The server writes the head of the response with its first bytes.
    yield sse.PING
    output.write(events, sock, chunked=chunked)
