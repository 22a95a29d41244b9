"""``oxillama serve`` as a process of its own, on a free port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from waiting import PATIENCE_S

__all__ = ["killed_server", "running_server"]


@contextmanager
def running_server(*options: object) -> Iterator[str]:
    """Serve the demo model on the CPU for the duration of a block; gives its address."""
    command, url = _command(options)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            _wait_until_ready(process, url)
            yield url
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=PATIENCE_S) == 0
        finally:
            process.kill()
        output = process.stdout.read()
    assert "Traceback" not in output, output


@contextmanager
def killed_server(*options: object) -> Iterator[str]:
    """As ``running_server``; at the end of the block the server is killed without notice."""
    command, url = _command(options)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            _wait_until_ready(process, url)
            yield url
        finally:
            # The master alone would leave its worker behind.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _command(options: Sequence[object]) -> tuple[list[str], str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "oxillama_torch.cli", "serve", "--port", str(port)]
    return [*command, "--device", "cpu", *map(str, options)], f"http://127.0.0.1:{port}"


def _wait_until_ready(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + 2 * PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10) as response:
                if json.load(response)["status"] == "ok":
                    return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not become ready")
