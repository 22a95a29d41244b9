"""engine/own_thread.py: results, errors and Ctrl-C of work in another thread."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from oxillama_torch.engine.own_thread import Interrupted, in_own_thread


def test_results_and_errors_come_back_from_a_thread_that_has_ended():
    names = []

    def work(check):
        check()
        names.append(threading.current_thread().name)
        return 7

    assert in_own_thread(work, "worker") == 7
    assert names == ["worker"] and "worker" not in [t.name for t in threading.enumerate()]

    def fail(check):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        in_own_thread(fail, "worker")


@pytest.fixture
def ctrl_c_raises():
    """Whoever started the tests may have had SIGINT ignored, as shells do in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_work_at_its_next_check(ctrl_c_raises):
    ended = []

    def work(check):
        time.sleep(0.2)  # until it waits
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        try:
            while True:
                check()
                time.sleep(0.001)
        except Interrupted:
            ended.append(True)
            raise

    with pytest.raises(KeyboardInterrupt):
        in_own_thread(work, "worker")
    assert ended == [True]
