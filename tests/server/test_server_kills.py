"""A real server that is killed in the middle of everything, again and again.

Oracle: what it has acknowledged to its clients. After every start all of that is there, runs that
were cut have ended, and in the end every batch and background response has.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import psutil
import pytest
from fault_clients import WRITERS, Api, Ledger, write_until_gone
from waiting import PATIENCE_S, until

WAYS = ("worker", "all", "worker", "master")
LEAST_PER_ROUND = 8


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
            until(lambda: not alive(worker), "the worker is not killed")
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
                if os.getpgid(process.pid) == self.process.pid and alive(process):
                    found.append(process)
        return found

    def stop(self):
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def write_and_kill(server, ledger, way):
    """One round: all writers at once, and the end of the server at a moment of chance."""
    api, before, errors, stop = Api(server.url), ledger.total, [], threading.Event()
    threads = [
        threading.Thread(target=write_until_gone, args=(writer, api, ledger, errors, stop))
        for writer in WRITERS
    ]
    for thread in threads:
        thread.start()
    until(lambda: errors or ledger.total >= before + LEAST_PER_ROUND, "nothing is acknowledged")
    time.sleep(random.uniform(0, 1.5))
    server.kill(way)
    stop.set()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), "a client hangs"
    assert not errors, errors


def check(server, ledger, since):
    """What was acknowledged after ``since`` entries is there; runs end.

    A new worker may have begun one: clients wait in the queue that the master keeps open.
    """
    api = Api(server.url)
    assert not ledger.wrong(api, list(ledger.allowed)[since:])
    for path, ended in ledger.ending.items():
        if "/runs/" in path:
            until(lambda p=path, e=ended: e(api.get(p)), f"{path} does not end")


def check_all(server, ledger):
    """Everything of all rounds, once what was cut has been finished."""
    api = Api(server.url)
    for path, ended in ledger.ending.items():
        until(lambda p=path, e=ended: e(api.get(p)), f"{path} does not end", 5 * PATIENCE_S)
    assert not ledger.wrong(api)


def run_rounds(settings, kills, folder):
    ledger = Ledger()
    with open(folder / "server.log", "wb") as log:
        server = Server(settings, log)
        try:
            server.start()
            for number in range(kills):
                way, since = WAYS[number % len(WAYS)], len(ledger.allowed)
                write_and_kill(server, ledger, way)
                server.restart(way)
                check(server, ledger, since)
                print(f"kill {number + 1} ({way}): {ledger.total} acknowledged", flush=True)
            check_all(server, ledger)
        finally:
            server.stop()
    print(f"{kills} kills, {ledger.total} acknowledged: {dict(ledger.counts)}")
    assert not list(folder.glob("**/*.part"))


def test_nothing_acknowledged_is_lost_by_two_kills(new_store, tmp_path):
    run_rounds(new_store("sqlite"), 2, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_nothing_acknowledged_is_lost_by_fifty_kills(store_settings, tmp_path):
    run_rounds(store_settings, 50, tmp_path)
