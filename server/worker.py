"""A gunicorn thread worker that slow clients cannot stop.

gunicorn's own gthread gives a pool thread to a connection before its request has arrived, without a
limit on how long that takes, and waits for a client's close on the accept loop. Here:

* the poller reads the head, and a body of up to ``_BUFFERED_BODY_BYTES``, without a thread and
  within deadlines; a pool thread gets the connection when the request is there;
* sockets have send and receive timeouts, so that a thread never waits for ever;
* closing lingers in the poller;
* when there are as many connections as there may be, the one that has kept the server waiting for a
  request longest makes room for the next;
* on SIGTERM the worker keeps accepting while it drains: new requests get 503 at once, streams in
  progress end by themselves or with an error event shortly before the grace period is over.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import resource
import selectors
import socket
import struct
import threading
import time
from concurrent.futures import Future
from functools import partial

from gunicorn.workers.gthread import TConn, ThreadWorker

from oxillama_torch.config import ServerConfig, from_environment
from oxillama_torch.server.request_head import wanted_bytes

__all__ = ["Worker"]

_BUFFERED_BODY_BYTES = 1024 * 1024
_ACCEPTS_PER_EVENT = 64
_LINGER_S = 2.0
# Before the end of the grace period streams are ended with an error event.
_LAST_WORDS_S = 2.0
_READ_BYTES = 64 * 1024
# A step makes some objects per stream, which die with it: to look for cycles among them every 700
# objects, as Python does by itself, took a third of the batching thread's time at 1,000 streams.
_OBJECTS_PER_COLLECTION = 50_000
# Open files that are left to everything but connections.
_OTHER_FILES = 128
_NO_FILES_PAUSE_S = 0.05


class _Connection(TConn):
    """A connection whose next request is being collected."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.received = bytearray()
        self.deadline = 0.0
        # Bytes of head and buffered body together, once the head is there.
        self.wanted: int | None = None


class Worker(ThreadWorker):
    """See the module's docstring."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        limits = from_environment(ServerConfig())
        self._header_timeout_s = limits.header_timeout_s
        self._body_timeout_s = limits.body_timeout_s
        self._send_timeout_s = limits.send_timeout_s
        # In the order in which they began to be collected.
        self._collecting: dict[_Connection, None] = {}
        self._lingering: dict[socket.socket, float] = {}
        self._draining = False

    def init_process(self) -> None:
        # Shells leave 1024 files to a process, for the sake of programs that use select().
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if most != resource.RLIM_INFINITY:
            room = max(most - _OTHER_FILES, most // 2)
            self.worker_connections = min(self.worker_connections, room)
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        # Modules and models stay for good: they need not be searched for garbage again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_OBJECTS_PER_COLLECTION, *gc.get_threshold()[1:])

    # Accepting and collecting, on the poller's thread

    def accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS_PER_EVENT):
            if self.nr_conns >= self.worker_connections:
                return
            try:
                sock, address = listener.accept()
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.ECONNABORTED):
                    return
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                if self._lingering:
                    self._end_linger(next(iter(self._lingering)))
                elif not self._drop_oldest():
                    # The listener stays readable: without a pause this would spin.
                    time.sleep(_NO_FILES_PAUSE_S)
                    return
                continue
            self.nr_conns += 1
            self._set_timeouts(sock)
            connection = _Connection(self.cfg, sock, address, listener.getsockname())
            if self.cfg.is_ssl:
                # Encrypted bytes cannot be looked at from outside.
                self.enqueue_req(connection)
            else:
                self._collect(connection)
            self._keep_room(connection)

    def _keep_room(self, newest: _Connection) -> None:
        """Stay below the limit, at which the loop would accept nobody until somebody leaves."""
        if self.nr_conns >= self.worker_connections:
            self._drop_oldest(newest)

    def _drop_oldest(self, newest: _Connection | None = None) -> bool:
        """Close the connection whose request is awaited longest; False: there is none."""
        oldest = next(iter(self._collecting), newest)
        if oldest is newest and self.keepalived_conns and self.keepalived_conns[0] is not newest:
            oldest = self.keepalived_conns.popleft()
        if oldest is newest:
            return False
        self._drop(oldest)
        return True

    def _set_timeouts(self, sock: socket.socket) -> None:
        timeout = struct.pack("ll", int(self._send_timeout_s), 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        timeout = struct.pack("ll", int(self._body_timeout_s), 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # Also when every write still makes a little progress.
            milliseconds = int(self._send_timeout_s * 1000)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def _collect(self, connection: _Connection) -> None:
        connection.sock.setblocking(False)
        connection.deadline = time.monotonic() + self._header_timeout_s
        self._collecting[connection] = None
        self.poller.register(
            connection.sock, selectors.EVENT_READ, partial(self._on_readable, connection)
        )

    def _on_readable(self, connection: _Connection, _sock: socket.socket) -> None:
        if connection not in self._collecting:
            return  # it has made room since its event was reported
        try:
            data = connection.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if connection.wanted is None:
                self._drop(connection)
            else:
                # A half-closed client: the application finds the body too short and says so.
                self._hand_over(connection)
            return
        searched = max(0, len(connection.received) - 3)
        connection.received += data
        if connection.wanted is None:
            connection.wanted = wanted_bytes(connection.received, searched, _BUFFERED_BODY_BYTES)
            if connection.wanted is not None:
                connection.deadline = time.monotonic() + self._body_timeout_s
        if connection.wanted is not None and len(connection.received) >= connection.wanted:
            self._hand_over(connection)

    def _hand_over(self, connection: _Connection) -> None:
        self._forget(connection)
        connection.data_ready = True
        self.enqueue_req(connection)

    def _forget(self, connection: _Connection) -> None:
        self._collecting.pop(connection, None)
        with contextlib.suppress(KeyError, ValueError, OSError):
            self.poller.unregister(connection.sock)

    def _drop(self, connection: _Connection) -> None:
        self._forget(connection)
        self.nr_conns -= 1
        connection.close()

    def on_client_socket_readable(self, conn: _Connection, client: socket.socket) -> None:
        """A kept-alive connection has its next request coming."""
        try:
            self.keepalived_conns.remove(conn)
        except ValueError:
            return  # as above
        self.poller.unregister(client)
        if self.cfg.is_ssl:
            self.enqueue_req(conn)
        else:
            self._collect(conn)

    def murder_pending(self) -> None:
        """Called by the loop at least once a second: end what is past its deadline."""
        now = time.monotonic()
        for connection in [c for c in self._collecting if c.deadline < now]:
            self._drop(connection)
        for sock in [s for s, until in self._lingering.items() if until < now]:
            self._end_linger(sock)
        super().murder_pending()

    # Handling, on a pool thread

    def handle(self, conn: _Connection):
        try:
            conn.sock.setblocking(True)
            conn.init()
            if conn.received and not conn.is_http2:
                conn.parser.unreader.unread(bytes(conn.received))
            conn.received, conn.wanted = bytearray(), None
            return super().handle(conn)
        except OSError:
            return False

    def handle_request(self, req, conn):
        try:
            return super().handle_request(req, conn)
        except (TimeoutError, BlockingIOError):
            # SO_SNDTIMEO or SO_RCVTIMEO: the client does not read, or does not send.
            self.log.debug("client of %s timed out", req.uri)
            return False

    # Closing, on the poller's thread

    def finish_request(self, conn: _Connection, fs: Future) -> None:
        keep = not fs.cancelled() and fs.exception() is None and fs.result()
        if keep:
            super().finish_request(conn, fs)
            self._keep_room(conn)
            return
        self.nr_conns -= 1
        try:
            # The peer may still be sending; closing now would reset what it has not read.
            conn.sock.setblocking(False)
            conn.sock.shutdown(socket.SHUT_WR)
            self.poller.register(conn.sock, selectors.EVENT_READ, self._on_linger)
            self._lingering[conn.sock] = time.monotonic() + _LINGER_S
        except (OSError, ValueError, KeyError):
            conn.close()

    def _on_linger(self, sock: socket.socket) -> None:
        if sock not in self._lingering:
            return  # as above
        try:
            data = sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end_linger(sock)

    def _end_linger(self, sock: socket.socket) -> None:
        self._lingering.pop(sock, None)
        with contextlib.suppress(KeyError, ValueError, OSError):
            self.poller.unregister(sock)
        sock.close()

    # Draining

    def handle_exit(self, sig, frame) -> None:
        """SIGTERM: drain, then stop. The listener stays open, so that nobody is left waiting."""
        # Without an application it is still being loaded.
        application = getattr(self, "wsgi", None)
        lifecycle = getattr(application, "extensions", {}).get("lifecycle")
        if lifecycle is None:
            super().handle_exit(sig, frame)
        elif not self._draining:
            self._draining = True
            threading.Thread(target=self._drain, args=(lifecycle, sig), daemon=True).start()

    def _drain(self, lifecycle, sig: int) -> None:
        lifecycle.drain()
        if not lifecycle.wait_idle(max(0.0, self.cfg.graceful_timeout - _LAST_WORDS_S)):
            lifecycle.abort()
            lifecycle.wait_idle(_LAST_WORDS_S / 2)
        super().handle_exit(sig, None)
