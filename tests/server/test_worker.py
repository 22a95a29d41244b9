"""The gunicorn worker against slow clients, over real sockets, with a small application.

Oracle: the stock gthread worker fails these (a known-bad control is part of the run).
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from waiting import PATIENCE_S, until

APP = """
import time
from oxillama_torch.server.lifecycle import Lifecycle

class App:
    def __init__(self):
        self.extensions = {"lifecycle": Lifecycle()}

    def __call__(self, environ, start_response):
        lifecycle = self.extensions["lifecycle"]
        path = environ["PATH_INFO"]
        if path == "/slow":
            start_response("200 OK", [("Content-Type", "text/plain")])
            return self.slow(lifecycle)
        status = "503 Service Unavailable" if lifecycle.draining else "200 OK"
        body = environ["wsgi.input"].read()
        if path == "/big":
            body = b"x" * 50_000_000
        start_response(status, [("Content-Length", str(len(body)))])
        return [body]

    def slow(self, lifecycle):
        ended = []
        with lifecycle.running(ended.append):
            yield b"begun "
            while not ended:
                time.sleep(0.05)
            yield b"ended: " + str(ended[0]).encode()

app = App()
"""


OURS = "oxillama_torch.server.worker.Worker"


class Server:
    """gunicorn with 4 threads.

    Args:
        patience_s: deadline of heads, bodies and writes.
        grace_s: between SIGTERM and the end.
        connections: most at once.
        files: most that the process may have open.
    """

    def __init__(
        self, folder, worker_class=OURS, *, patience_s=600, grace_s=60, connections=1000, files=None
    ):
        (folder / "small_app.py").write_text(APP)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
            "OXILLAMA_HEADER_TIMEOUT_S": str(patience_s),
            "OXILLAMA_BODY_TIMEOUT_S": str(patience_s),
            "OXILLAMA_SEND_TIMEOUT_S": str(patience_s),
        }
        command = [sys.executable, "-m", "gunicorn", "small_app:app", "-k", worker_class]
        command += ["-b", f"127.0.0.1:{self.port}", "--threads", "4", "--no-control-socket"]
        command += ["--worker-connections", str(connections), "--timeout", "0"]
        command += ["--graceful-timeout", str(grace_s)]
        if files is not None:
            command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
        )
        until(self._answers, "the server does not start")

    def _answers(self):
        with contextlib.suppress(OSError):
            return self.ask(b"ready")

    def connect(self, data=b""):
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        sock.sendall(data)
        return sock

    def ask(self, body=b"hello", path="/"):
        """One request; (status, body)."""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        with self.connect(head.encode() + b"Connection: close\r\n\r\n" + body) as sock:
            answer = _read_all(sock)
        status = int(answer.split(b" ", 2)[1])
        return status, answer.partition(b"\r\n\r\n")[2]

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stderr.close()


def _read_all(sock):
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.fixture
def make_server(tmp_path):
    servers = []

    def make(*args, **options):
        servers.append(Server(tmp_path, *args, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def server(make_server):
    return make_server()


HALF_HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
STALLED_BODY = HALF_HEAD + b"Content-Length: 1000\r\n\r\nabc"


@pytest.mark.parametrize("start", [b"", HALF_HEAD, STALLED_BODY], ids=["silent", "head", "body"])
def test_slow_clients_hold_no_thread(server, start):
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(server.connect(start))
        for _ in range(5):
            assert server.ask(b"hello") == (200, b"hello")


ANSWERED = HALF_HEAD + b"Content-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    "limit", [{"connections": 60}, {"files": 200}, {"connections": 60, "files": 40}], ids=str
)
@pytest.mark.parametrize(
    "start", [b"", HALF_HEAD, STALLED_BODY, ANSWERED], ids=["silent", "head", "body", "idle"]
)
def test_who_waits_longest_makes_room(make_server, start, limit):
    """More clients than there may be connections, or files; none of them leaves by itself."""
    server = make_server(**limit)
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(server.connect(start))
        for _ in range(5):
            assert server.ask(b"hello") == (200, b"hello")
    assert server.process.poll() is None


@pytest.mark.parametrize("start", [b"", HALF_HEAD, STALLED_BODY], ids=["silent", "head", "body"])
def test_slow_clients_lose_their_connection_at_the_deadline(make_server, start):
    with make_server(patience_s=2).connect(start) as slow:
        assert slow.recv(10) == b""


def test_stock_worker_lets_slow_clients_hold_every_thread(make_server):
    """The control: half a head on each of 4 threads, and nobody else is served."""
    server = make_server("gthread")
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(server.connect(HALF_HEAD))
        time.sleep(0.3)
        with server.connect(HALF_HEAD + b"Content-Length: 0\r\n\r\n") as sock:
            sock.settimeout(2)
            with pytest.raises(TimeoutError):
                sock.recv(10)


def test_clients_that_never_close_cost_nothing(server):
    """gunicorn's own worker waits 2 s for each of them before it accepts anybody else."""
    with contextlib.ExitStack() as stack:
        request = HALF_HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\nhi"
        lingering = [stack.enter_context(server.connect(request)) for _ in range(40)]
        for sock in lingering:
            assert _read_all(sock).endswith(b"hi")
        started = time.monotonic()
        assert server.ask()[0] == 200
        assert time.monotonic() - started < 60


def test_unread_answer_ends(make_server):
    """As many readers that do not read as threads: all are free again after the send timeout."""
    server = make_server(patience_s=2)
    with contextlib.ExitStack() as stack:
        request = HALF_HEAD.replace(b"/ ", b"/big ") + b"Content-Length: 0\r\n\r\n"
        for _ in range(4):
            stack.enter_context(server.connect(request))
        assert server.ask()[0] == 200


def test_keep_alive_and_pipelining(server):
    request = HALF_HEAD + b"Content-Length: 2\r\n\r\n"
    with server.connect(request + b"ab" + request + b"cd") as sock:
        received = b""
        while received.count(b"HTTP/1.1 200") < 2 or not received.endswith(b"cd"):
            received += sock.recv(4096)
        sock.sendall(request + b"ef")
        while not received.endswith(b"ef"):
            received += sock.recv(4096)


@pytest.mark.parametrize("size", [0, 1, 65_535, 1_048_576, 3_000_000])
def test_bodies_arrive_whole(server, size):
    body = os.urandom(size)
    assert server.ask(body) == (200, body)


def test_request_in_single_bytes(server):
    request = HALF_HEAD + b"Content-Length: 3\r\nConnection: close\r\n\r\nabc"
    with server.connect() as sock:
        for byte in request:
            sock.sendall(bytes([byte]))
        assert _read_all(sock).endswith(b"abc")


def test_chunked_body(server):
    head = HALF_HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    with server.connect(head + b"3\r\nabc\r\n") as sock:
        time.sleep(0.1)
        sock.sendall(b"2\r\nde\r\n0\r\n\r\n")
        assert _read_all(sock).endswith(b"abcde")


def test_sigterm_drains(make_server):
    """New requests get 503 at once; a stream in progress ends with a last word, not a cut."""
    server = make_server(grace_s=10)
    with server.connect(HALF_HEAD.replace(b"/ ", b"/slow ") + b"\r\n") as stream:
        assert b"200 OK" in stream.recv(4096)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask()[0] == 503, "new requests are taken")
        assert b"ended: the server is shutting down" in _read_all(stream)
    assert server.process.wait(timeout=PATIENCE_S) == 0


def test_sigterm_without_work_is_quick(server):
    """It does not wait for the end of the grace period."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=50) == 0


def test_many_clients_at_once(server):
    errors = []

    def client(index):
        try:
            for _ in range(10):
                body = json.dumps(index).encode()
                assert server.ask(body) == (200, body)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(index,)) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
