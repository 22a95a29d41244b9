"""``oxillama serve`` that is killed and started again, over one store."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import psutil
from waiting import PATIENCE_S, until

__all__ = ["Server"]


class Server:
    """``oxillama serve`` in a process group of its own, on a port of its own."""

    def __init__(self, store, log):
        self._options = ["--device", "cpu", "--threads", "1", "--store", store["store"]]
        if "blobs" in store:
            self._options += ["--blobs", str(store["blobs"])]
        self._log = log
        self.process = None

    def start(self):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "oxillama_torch.cli", "serve", "--port", str(port)]
        self.process = subprocess.Popen(
            [*command, *self._options], stdout=subprocess.DEVNULL, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        self.wait()

    def wait(self):
        until(self._answers, "the server does not start", 2 * PATIENCE_S)

    def _answers(self):
        assert self.process.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return json.load(answer)["status"] == "ok"
        except OSError:
            return False

    def kill(self, way):
        """kill -9 of everything, of the worker (its master starts another), of the master."""
        if way == "all":
            os.killpg(self.process.pid, signal.SIGKILL)
        elif way == "master":
            self.process.kill()
        else:
            [worker] = psutil.Process(self.process.pid).children()
            worker.kill()
            until(lambda: not _alive(worker), "the worker is not killed")
            return
        self.process.wait()

    def restart(self, way):
        if way != "worker":
            until(lambda: not self.left_over(), "processes are left over")
            self.start()
        else:
            self.wait()

    def left_over(self):
        """Processes of the group: an orphaned worker has to notice by itself."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == self.process.pid and _alive(process):
                    found.append(process)
        return found

    def stop(self):
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
