"""Waiting for what another thread or process does: long enough for a machine that is busy."""

import time

__all__ = ["PATIENCE_S", "idle", "until"]

#: How long a test waits for what will happen; only one that fails waits so long.
PATIENCE_S = 120.0
_PAUSE_S = 0.01


def until(condition, what="the condition did not come true", timeout_s=PATIENCE_S):
    """The first true value of ``condition()``; fails with ``what`` when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(_PAUSE_S)
    return value


def idle(engine):
    """Whether an engine has nothing to do."""
    stats = engine.stats()
    return stats["running"] + stats["waiting"] == 0
