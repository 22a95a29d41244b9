#!/usr/bin/env python3
"""A long load of every kind, in which no token may be lost and no memory grow.

    python scripts/soak.py --minutes 60
    python scripts/soak.py --short 100000

A server (gunicorn, the demo model, real sockets) and an engine in this process each work on a
catalogue of requests with few KV pages, so that requests make room for each other all the time: in
the server by swapping, here by computing again (``--preemption`` for both). Clients leave, adapters
are replaced and dropped. Every answer is compared, token by token and log-probabilities bit by bit,
with that of the same request run alone before. Memory, threads and open files are sampled and
fitted; at the end every page must be free.

``--short N`` instead sends N requests of 1 to 4 tokens through the engine alone.

Exit code 1: something was lost, is still held, or has grown beyond ``--growth``.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import psutil  # noqa: E402
from demo_adapters import write_adapter  # noqa: E402
from server_process import running_server  # noqa: E402
from soak_cases import FLEETING, HOT, engine_cases, http_cases, short_cases  # noqa: E402
from soak_load import (  # noqa: E402
    Tally,
    alone_engine,
    alone_http,
    call,
    engine_client,
    http_client,
    swap_adapters,
)
from soak_watch import Sample, Watch, slope_per_hour  # noqa: E402

from oxillama_torch.config import EngineConfig, demo_model_path  # noqa: E402
from oxillama_torch.engine.outbox import Outbox  # noqa: E402
from oxillama_torch.engine.request import ErrorEvent, FinishEvent, TokenEvent  # noqa: E402
from oxillama_torch.gguf.metadata import Metadata  # noqa: E402
from oxillama_torch.gguf.reader import read_gguf  # noqa: E402
from oxillama_torch.llm import LLM  # noqa: E402
from oxillama_torch.models.config import ModelConfig  # noqa: E402
from oxillama_torch.models.memory import memory_plan  # noqa: E402

_FIGURES = (
    "steps", "tokens_generated", "prompt_tokens", "prefix_hit_tokens", "preemptions",
    "swapped_out", "swapped_in", "swap_refused", "kv_pages_used", "swap_pages_used",
    "batch_size", "queue_depth", "step_failures",
)  # fmt: skip
_NAMES = {"generated_tokens": "tokens_generated", "pages_used": "kv_pages_used"}
_NAMES |= {"running": "batch_size", "waiting": "queue_depth"}


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(("red", "blue", f"{HOT}0", f"{HOT}1", f"{FLEETING}0")):
            write_adapter(Path(folder) / name, seed)
        if options.short:
            return short(options, Path(folder))
        return soak(options, Path(folder))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=60)
    add("--short", type=int, default=0, help="send so many short requests instead")
    add("--cases", type=int, default=36, help="requests in each catalogue")
    add("--clients", type=int, default=12, help="HTTP clients; as many of the engine by half")
    add("--pages", type=int, default=40, help="KV pages of each engine; with --short 4 times that")
    add("--swap-pages", type=int, default=60, help="host pages, where pages are swapped")
    add("--preemption", choices=("recompute", "swap"), help="of both engines")
    add("--kv-dtype", default="auto")
    add("--interval", type=float, default=5.0, help="seconds between samples")
    add("--growth", type=float, default=64.0, help="MiB that a process may grow by")
    return parser.parse_args()


def _engine_options(options: argparse.Namespace, preemption: str) -> dict:
    return {
        "device": "cpu",
        "numerics": "invariant",
        "threads": 1,
        "kv_pages": 4 * options.pages if options.short else options.pages,
        "kv_dtype": options.kv_dtype,
        "preemption": options.preemption or preemption,
        "swap_memory_bytes": options.swap_pages * _page_bytes(options.kv_dtype),
    }


def _page_bytes(kv_dtype: str) -> int:
    with read_gguf(demo_model_path()) as gguf:
        config = ModelConfig.from_metadata(Metadata(gguf.metadata))
        plan = memory_plan(gguf, config, kv_dtype=kv_dtype)
    return EngineConfig().page_size * plan.kv_bytes_per_token


def _open(options: argparse.Namespace, folder: Path, stack: ExitStack) -> LLM:
    batch_size = 64 if options.short else 12
    settings = _engine_options(options, "recompute")
    llm = stack.enter_context(LLM(max_batch_size=batch_size, **settings))
    for name in ("red", "blue"):
        llm.load_adapter(name, folder / name)
    return llm


def _serve(options: argparse.Namespace, folder: Path, stack: ExitStack) -> str:
    settings = _engine_options(options, "swap")
    for name in ("kv_pages", "swap_memory_bytes"):
        os.environ[f"OXILLAMA_{name.upper()}"] = str(settings.pop(name))
    arguments = ["--max-batch-size", 12, "--adapter-root", folder]
    for name, value in settings.items():
        if name != "device":
            arguments += [f"--{name.replace('_', '-')}", value]
    for name in ("red", "blue"):
        arguments += ["--lora", f"{name}={folder / name}"]
    return stack.enter_context(running_server(*arguments))


def soak(options: argparse.Namespace, folder: Path) -> int:
    """The mixed load. Returns: the exit code."""
    with ExitStack() as stack:
        llm = _open(options, folder, stack)
        url = _serve(options, folder, stack)
        load_here = lambda name, version: llm.load_adapter(name, folder / f"{name}{version}")  # noqa: E731

        def load_there(name: str, version: int) -> None:
            status, text = call(
                url, "POST", "/admin/loras", {"name": name, "path": f"{name}{version}"}
            )
            assert status == 201, text

        def drop_there(name: str) -> None:
            status, text = call(url, "DELETE", f"/admin/loras/{name}")
            assert status == 200, text

        here = engine_cases(options.cases, 1, llm)
        there = http_cases(options.cases, 2, llm.name)
        print(f"running {len(here) + len(there)} requests alone", flush=True)
        right_here = _alone(here, load_here, functools.partial(alone_engine, llm))
        right_there = _alone(there, load_there, functools.partial(alone_http, url))
        drop_there(FLEETING)
        llm.unload_adapter(FLEETING)
        tally = Tally()
        end = time.monotonic() + 60 * options.minutes
        over = lambda: time.monotonic() > end  # noqa: E731
        jobs = [
            functools.partial(http_client, url, there, right_there, tally, over, seed)
            for seed in range(options.clients)
        ]
        jobs += [
            functools.partial(engine_client, llm, here, right_here, tally, over, seed)
            for seed in range(options.clients // 2)
        ]
        jobs.append(functools.partial(swap_adapters, load_there, drop_there, over, tally, 0.5))
        jobs.append(
            functools.partial(swap_adapters, load_here, llm.unload_adapter, over, tally, 0.5)
        )
        server = next(p for p in psutil.Process().children() if "serve" in p.cmdline())
        processes = {
            "server": (server.pid, functools.partial(_metrics, url)),
            "engine": (os.getpid(), lambda: _renamed(llm.engine.stats())),
        }
        with Watch(processes, options.interval) as watch:
            threads = [threading.Thread(target=job) for job in jobs]
            for thread in threads:
                thread.start()
            _tell(threads, tally, watch, end)
        _wait_until_idle(watch)
        return _report(options, tally, watch)


def _alone(cases: list, load: Callable[[str, int], None], run: Callable) -> dict[int, list]:
    """The right answers by case: one for each version of its adapter."""
    right: dict[int, list] = {}
    for version in (0, 1):
        load(HOT, version)
        load(FLEETING, 0)
        for number, case in enumerate(cases):
            if version == 0 or case.adapter == HOT:
                right.setdefault(number, []).append(run(case))
    return right


def _tell(threads: list[threading.Thread], tally: Tally, watch: Watch, end: float) -> None:
    """Wait for the clients, and say every minute how things stand."""
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(60 / len(threads))
        latest = {name: samples[-1] for name, samples in watch.samples.items() if samples}
        memory = ", ".join(f"{name} {s.rss >> 20} MiB" for name, s in latest.items())
        left = max(0.0, end - time.monotonic()) / 60
        done = sum(tally.counts.values())
        print(
            f"{left:5.1f} minutes left, {done} done, {len(tally.losses)} wrong; {memory}",
            flush=True,
        )


def _wait_until_idle(watch: Watch) -> None:
    """Pages of clients that left a moment ago are freed within steps."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        watch.look()
        if not any(_held(samples[-1]) for samples in watch.samples.values()):
            return
        time.sleep(0.5)


def _held(sample: Sample) -> list[str]:
    names = ("kv_pages_used", "swap_pages_used", "batch_size", "queue_depth")
    return [name for name in names if sample.figures.get(name)]


def _metrics(url: str) -> dict[str, float]:
    _, text = call(url, "GET", "/metrics")
    found = re.findall(r"^oxillama_(\w+)\{model=[^}]*\} (\S+)$", text.decode(), re.MULTILINE)
    return {name.removesuffix("_total"): float(value) for name, value in found}


def _renamed(stats: dict[str, float]) -> dict[str, float]:
    return {_NAMES.get(name, name): value for name, value in stats.items()}


def _report(options: argparse.Namespace, tally: Tally, watch: Watch) -> int:
    print(f"\n{_commit()}, {' '.join(sys.argv)}\n")
    outcomes = ["equal", "left", "refused", "replaced", "dropped", "wrong"]
    print("| requests | " + " | ".join(outcomes) + " |\n|---|" + "---|" * len(outcomes))
    for kind in sorted({kind for kind, _ in tally.counts}):
        print(
            f"| {kind} | " + " | ".join(str(tally.counts[kind, o] or "") for o in outcomes) + " |"
        )
    totals = Counter()
    for (_, outcome), count in tally.counts.items():
        totals[outcome] += count
    print("| all | " + " | ".join(str(totals[o]) for o in outcomes) + " |\n")
    failures = [*tally.losses[:20], *_memory(options, watch)]
    if watch.error is not None:
        failures.append(f"a process could not be looked at: {watch.error!r}")
    for failure in failures:
        print(f"FAILED {failure}")
    print("nothing was lost" if not failures else f"{len(failures)} failures")
    return 1 if failures else 0


def _memory(options: argparse.Namespace, watch: Watch) -> list[str]:
    """Print what was sampled. Returns: what is wrong with it."""
    failures = []
    print("| process | MiB after a quarter | at the end | MiB per hour | threads | files |")
    print("|---|---|---|---|---|---|")
    for name, samples in watch.samples.items():
        busy = samples[len(samples) // 4 :]
        slope, error = slope_per_hour(samples)
        grown = (busy[-1].rss - busy[0].rss) / (1 << 20)
        print(
            f"| {name} | {busy[0].rss >> 20} | {busy[-1].rss >> 20} | {slope:+.1f} ± {error:.1f} "
            f"| {min(s.threads for s in busy)} to {max(s.threads for s in busy)} "
            f"| {min(s.files for s in busy)} to {max(s.files for s in busy)} |"
        )
        if grown > options.growth:
            failures.append(f"{name} has grown by {grown:.0f} MiB")
        if held := _held(samples[-1]):
            failures.append(f"{name} still has {', '.join(held)}")
    print("\n| counted | " + " | ".join(watch.samples) + " |\n|---|" + "---|" * len(watch.samples))
    last = [samples[-1].figures for samples in watch.samples.values()]
    for figure in _FIGURES:
        print(f"| {figure} | " + " | ".join(f"{f.get(figure, 0):.0f}" for f in last) + " |")
    print()
    return failures


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return f"commit {found.stdout.strip() or 'unknown'}"


def short(options: argparse.Namespace, folder: Path) -> int:
    """Many short requests through the engine. Returns: the exit code."""
    with ExitStack() as stack:
        llm = _open(options, folder, stack)
        cases = short_cases(options.cases, 3, llm)
        right = [alone_engine(llm, case) for case in cases]
        wanted = [[e.token_id for e in events if isinstance(e, TokenEvent)] for events in right]
        tally, room, outbox = Tally(), threading.Semaphore(128), Outbox()
        got: dict[str, tuple[int, list[int]]] = {}

        def read() -> None:
            for _ in range(options.short):
                ended = None
                while ended is None:
                    handle, event = outbox.get()
                    number, tokens = got[handle.request_id]
                    if isinstance(event, TokenEvent):
                        tokens.append(event.token_id)
                    elif isinstance(event, FinishEvent | ErrorEvent):
                        ended = event
                del got[handle.request_id]
                if isinstance(ended, FinishEvent) and tokens == wanted[number]:
                    tally.book(cases[number].kind, "equal")
                else:
                    tally.lose(cases[number].kind, f"case {number}: {tokens}, {ended}")
                room.release()

        processes = {"engine": (os.getpid(), lambda: _renamed(llm.engine.stats()))}
        with Watch(processes, options.interval) as watch:
            started = time.monotonic()
            reader = threading.Thread(target=read)
            reader.start()
            for index in range(options.short):
                room.acquire()
                request = cases[index % len(cases)].fresh()
                got[request.request_id] = index % len(cases), []
                llm.engine.submit(request, outbox)
                if index % 10_000 == 9_999:
                    print(f"{index + 1} sent, {len(tally.losses)} wrong", flush=True)
            reader.join()
            seconds = time.monotonic() - started
        _wait_until_idle(watch)
        print(f"{options.short} requests in {seconds:.0f} s")
        return _report(options, tally, watch)


if __name__ == "__main__":
    sys.exit(main())
