"""What every test gets: interpreted Triton where there is no GPU, marks, leak and memory traps."""

from __future__ import annotations

import importlib.util
import os
import threading
import time

import pytest

# isort: off
import oxillama_torch  # noqa: F401 (before torch: it sets how OpenMP waits)
import torch

# isort: on

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so it must be set before any kernel is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(min(2, os.cpu_count() or 1))

# Threads that libraries keep for the life of the process: Inductor's compile workers and tqdm's
# monitor.
_LIBRARY_THREADS = ("InductorSubproc", "SubprocPool", "TMonitor", "tqdm_monitor")
_LEAK_GRACE_S = 30.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason; leave out `slow` unless asked for."""
    if not torch.cuda.is_available():
        _skip(items, "gpu", "needs an NVIDIA GPU")
    if importlib.util.find_spec("llama_cpp") is None:
        _skip(items, "llama_cpp", "needs the llama_cpp package")
    if "slow" not in config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if not item.get_closest_marker("slow")]


def _skip(items: list[pytest.Item], mark: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(mark):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run and in any order of tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_leaked_threads():
    """Fail a test that leaves threads behind, after a short grace for those that are ending."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + _LEAK_GRACE_S
    while leaked := _new_threads(before):
        if time.monotonic() > deadline:
            pytest.fail(f"threads left running: {', '.join(t.name for t in leaked)}")
        time.sleep(0.01)


def _new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before and not thread.name.startswith(_LIBRARY_THREADS)
    ]


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floating memory holds NaN, so that an element nobody wrote is seen."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
