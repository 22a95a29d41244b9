"""Several engines, or one with several settings, timed by turns on the same file.

Turns and not one after the other: what else the machine does then falls on all of them alike.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from oxillama_torch.bench import peer_program
from oxillama_torch.bench.end_to_end import measure_engine
from oxillama_torch.config import EngineConfig
from oxillama_torch.errors import EngineError
from oxillama_torch.llm import LLM

__all__ = ["PEERS", "MissingPeer", "Ours", "Peer", "Side", "by_turns"]

PEERS = tuple(sorted(peer_program.PEERS))
_RATES = ("prefill_tok_s", "decode_tok_s")


class MissingPeer(EngineError):
    """The package of a peer is not installed for the interpreter; the message names both."""


class Side(Protocol):
    """What ``by_turns`` times. ``name`` tells sides apart."""

    name: str

    def measure(self, seed: int) -> dict[str, float]:
        """One round: ``prefill_tok_s``, ``decode_tok_s``."""


class Ours:
    """The engine of this package, in this process.

    Args:
        name: of the side.
        batch_size: equal requests at once.
        prompt_tokens, new_tokens: of each request.
        options: fields of EngineConfig.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        batch_size: int = 1,
        prompt_tokens: int,
        new_tokens: int,
        **options: Any,
    ) -> None:
        # A later round must not meet the pages of an earlier one.
        fields = {"model": path, "max_batch_size": batch_size, "prefix_cache": False} | options
        self.name = name
        self._sizes = {"batch_size": batch_size, "prompt_tokens": prompt_tokens}
        # The first token belongs to prefill.
        self._sizes["new_tokens"] = new_tokens + 1
        self._llm = LLM.from_config(EngineConfig(**fields))

    def measure(self, seed: int) -> dict[str, float]:
        return measure_engine(self._llm.engine, seed=seed, **self._sizes)

    def __enter__(self) -> Ours:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._llm.close()


class Peer:
    """Another engine in a process of its own; see ``peer_program``.

    Args:
        name: one of PEERS.
        python: the interpreter that has its package.
        threads: for computing.

    Raises:
        MissingPeer: the package is not there.
        EngineError: it ended or said something else; its own words stand on the standard error.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        python: str | Path = sys.executable,
        prompt_tokens: int,
        new_tokens: int,
        threads: int,
    ) -> None:
        command = [str(python), peer_program.__file__, name, str(path)]
        command += ["--threads", str(threads), "--prompt-tokens", str(prompt_tokens)]
        command += ["--new-tokens", str(new_tokens)]
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            hello = self._read()
        except EngineError:
            self.close()
            raise
        if "missing" in hello:
            self.close()
            raise MissingPeer(hello["missing"])
        self.name = f"{name} {hello['version']}"

    def measure(self, seed: int) -> dict[str, float]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{seed}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading tells how it ended
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"{self.name} ended with code {self._process.wait()}")
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            raise EngineError(f"{self.name} answered {line.strip()!r}") from None

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def by_turns(
    sides: Sequence[Side], rounds: int, progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Run every side once to warm up, then ``rounds`` times, by turns.

    Args:
        progress: called with (rounds done, rounds in all), of all sides together.

    Returns: per side its name, the medians of the rates, the rates of all rounds
        (``prefill_rounds``, ``decode_rounds``), and what the first side's medians are as multiples
        of its own (``prefill_ratio``, ``decode_ratio``).
    """
    taken: list[list[dict[str, float]]] = [[] for _ in sides]
    total = len(sides) * (rounds + 1)
    for seed in range(rounds + 1):
        for index, side in enumerate(sides):
            taken[index].append(side.measure(seed))
            if progress is not None:
                progress(seed * len(sides) + index + 1, total)
    rows: list[dict[str, Any]] = []
    for side, timings in zip(sides, taken):
        row: dict[str, Any] = {"side": side.name}
        for rate in _RATES:
            phase = rate.removesuffix("_tok_s")
            row[f"{phase}_rounds"] = [timing[rate] for timing in timings[1:]]
            row[rate] = statistics.median(row[f"{phase}_rounds"])
            row[f"{phase}_ratio"] = (rows[0] if rows else row)[rate] / row[rate]
        rows.append(row)
    return rows
