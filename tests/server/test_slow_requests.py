"""Clients that send slowly what they are allowed to send: the server still says how it is."""

import contextlib
import socket
import urllib.error
import urllib.parse
import urllib.request

import pytest
from server_process import running_server
from waiting import PATIENCE_S, until

from oxillama_torch.server.lifecycle import SPARE_THREADS

STREAMS = 2
# Longer than what is read before a thread gets the request, and never complete.
STALLED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: 3000000\r\n\r\n" + b" " * 1_200_000
)


def status(url):
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def url():
    with running_server("--max-streams", STREAMS) as url:
        yield url


def test_stalled_bodies_leave_threads_to_those_who_look_after_the_server(url):
    place = urllib.parse.urlsplit(url)
    with contextlib.ExitStack() as stalled:
        for _ in range(STREAMS + SPARE_THREADS + 4):
            sock = socket.create_connection((place.hostname, place.port), timeout=PATIENCE_S)
            stalled.enter_context(sock)
            sock.sendall(STALLED)
        until(lambda: status(f"{url}/v1/models") == 503, "a thread is free")
        assert status(f"{url}/health") == 200
        assert status(f"{url}/admin/stats") == 200
    # They have gone, and their threads are free.
    until(lambda: status(f"{url}/v1/models") == 200, "no thread is free again")
