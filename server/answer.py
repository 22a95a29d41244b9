"""Sending a generation to its client: one JSON body, or a stream of server-sent events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from flask import Response, current_app, g, request

from oxillama_torch.server import sse
from oxillama_torch.server.embedding import Embedding
from oxillama_torch.server.event_stream import EventStream, Form, Frames
from oxillama_torch.server.http import client_socket, name_ignored
from oxillama_torch.server.lifecycle import Lifecycle
from oxillama_torch.server.output import ClientGone, Generation
from oxillama_torch.server.output_thread import OutputThread
from oxillama_torch.server.service import Service
from oxillama_torch.server.watcher import DisconnectWatcher

__all__ = ["answer", "deadline_of", "stream_frames", "watch"]


def deadline_of(service: Service) -> float | None:
    """``time.monotonic()`` at which a request that starts now must have ended."""
    timeout_s = service.config.request_timeout_s
    return None if timeout_s is None else time.monotonic() + timeout_s


def answer(
    generation: Generation | Embedding,
    form: Form,
    *,
    stream: bool,
    ignored: list[str],
    keep: Callable[[], Future] | None = None,
) -> Response:
    """The response to a request whose generation has been submitted.

    Args:
        ignored: request fields that nothing read; named in a header, so that a typing error in
            a field's name does not pass unseen.
        keep: stores what has been generated, before the client is told of the end.
    """
    if stream:
        response = stream_frames(EventStream(generation, form, g.request_id, keep=keep))
    else:
        with contextlib.ExitStack() as guard:
            guard.callback(generation.cancel)
            watch(guard, generation.abort, generation.client_gone)
            try:
                response = form.whole(generation.outputs())
                if keep is not None:
                    keep().result()
            except ClientGone:
                response = Response(status=499)
    name_ignored(response, ignored)
    return response


def watch(
    guard: contextlib.ExitStack,
    abort: Callable[[Exception], None],
    client_gone: Callable[[], None],
) -> None:
    """Until ``guard`` closes, have what is in progress ended with the server or the client."""
    watcher: DisconnectWatcher = current_app.extensions["disconnect_watcher"]
    lifecycle: Lifecycle = current_app.extensions["lifecycle"]
    guard.enter_context(lifecycle.running(abort))
    guard.enter_context(watcher.watching(client_socket(), client_gone))


def stream_frames(frames: Frames) -> Response:
    """A response that streams ``frames``."""
    guard = contextlib.ExitStack()
    guard.callback(frames.close)
    try:
        watch(guard, frames.abort, frames.client_gone)
    except BaseException:
        guard.close()
        raise
    response = Response(_stream(frames), mimetype="text/event-stream", headers=sse.HEADERS)
    # Not in the generator: one that was never started runs no clean-up.
    response.call_on_close(guard.close)
    return response


def _stream(events: Frames) -> Iterator[bytes]:
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


def _written(events: Frames, output: OutputThread, sock, chunked: bool) -> Iterator[bytes]:
    # The server writes the head of the response with its first bytes.
    yield sse.PING
    output.write(events, sock, chunked=chunked)
