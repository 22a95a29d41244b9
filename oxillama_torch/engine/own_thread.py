"""Work that computes, in a thread of its own that ends with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["Interrupted", "in_own_thread"]

T = TypeVar("T")


class Interrupted(Exception):
    """Whoever waited for the work does so no longer."""


def in_own_thread(work: Callable[[Callable[[], None]], T], name: str) -> T:
    """Do ``work`` in another thread and return what it returns, or raise what it raises.

    A thread that has once computed on several processors keeps its OpenMP workers. While there are
    more of those than processors, they sleep between two operations instead of waiting awake, and
    whoever comes next, the engine's thread, has to wake them for each: a quarter of the time of a
    decoding step with two processors.

    Args:
        work: gets a function to call now and then, which raises Interrupted when nobody waits for
            the result any more (Ctrl-C).
        name: of the thread.
    """
    outcome: Future[T] = Future()
    abandoned, ended = threading.Event(), threading.Event()

    def check() -> None:
        if abandoned.is_set():
            raise Interrupted(name)

    def run() -> None:
        try:
            outcome.set_result(work(check))
        except BaseException as error:
            outcome.set_exception(error)
        finally:
            ended.set()

    # A second Ctrl-C leaves it behind.
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        ended.wait()  # not join: Python 3.11 takes a thread for ended when that is interrupted
    except BaseException:
        abandoned.set()
        ended.wait()  # torch must not be computing when the interpreter ends
        raise
    thread.join()
    return outcome.result()
