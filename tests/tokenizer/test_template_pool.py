"""Hostile templates against the worker process: each is answered within the limits."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from waiting import until

from oxillama_torch.errors import CapacityError
from oxillama_torch.tokenizer.template_pool import TemplateLimits, TemplatePool

LIMITS = TemplateLimits(seconds=0.3, memory=256 << 20, output=1 << 20)
BOMBS = {
    "time": [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 7 ** 77777777 }}",
        "{% set ns = namespace(x='a' * 100000) %}{% for i in range(100000) %}"
        "{% if ns.x.find('b' * 50000) %}{% endif %}{% endfor %}",
    ],
    "memory": [
        "{{ 'a' * 10 ** 9 }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ 'a' | center(999999999) }}",
        "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x * 2 %}"
        "{% endfor %}",
        "{{ ('a' * 10000) | replace('a', 'b' * 100000) }}",
        "{{ [0] * 10 ** 9 }}",
    ],
    "output": ["{% for i in range(100000) %}{{ 'a' * 100 }}{% endfor %}", "{{ 'a' * 2000000 }}"],
    "failed": [
        "{{ lipsum(n=10 ** 6) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10 ** 9) | list }}",
        "{{ messages | map('nothing') | list }}",
        "{% include 'x' %}",
    ],
}
REQUEST = {"context": {"messages": [{"role": "user", "content": "x"}]}, "marks": {}}


def ask(pool: TemplatePool, name: str = "default", **context) -> dict:
    now = "2026-01-31T12:00:00"
    return pool.render({**REQUEST, "context": {**REQUEST["context"], **context},
                        "name": name, "now": now})  # fmt: skip


@pytest.fixture
def make():
    pools = []

    def make(sources, limits=LIMITS, **options):
        pools.append(TemplatePool(sources, limits, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE
        and any("template_worker" in word for word in child.cmdline())
    ]


ALL_BOMBS = [(kind, source) for kind, sources in BOMBS.items() for source in sources]


@pytest.fixture(scope="module")
def shared():
    """One pool for all bombs: what one leaves behind, the next one meets."""
    sources = {source: source for _, source in ALL_BOMBS}
    pool = TemplatePool({**sources, "default": "{{ messages[0].content }}"}, LIMITS)
    yield pool
    pool.close()


@pytest.mark.parametrize(("kind", "source"), ALL_BOMBS)
def test_a_bomb_is_answered_and_the_next_request_served(shared, kind, source):
    answer = ask(shared, source)
    assert answer["error"] == kind and "text" not in answer
    assert ask(shared) == {"text": "x"}


def test_the_shared_workers_end(shared):
    shared.close()
    assert not workers()


def test_a_bomb_takes_little_more_than_its_limit(make):
    pool = make({"default": "ok", "bomb": BOMBS["time"][0]})
    ask(pool)
    worker = workers()[0]
    started = worker.cpu_times().user
    assert ask(pool, "bomb") == {"error": "time"}
    assert started < 5 and not worker.is_running()


CANARY = "canary-of-the-template-tests"
WRITES = [
    "{{ cycler.__init__.__globals__.os.system('touch %s') }}",
    "{{ self.__init__.__globals__.__builtins__.open('%s', 'w').write('x') }}",
    "{{ (lipsum | attr('__globals__'))['os'].popen('touch %s').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__()[132]('touch %s', shell=True) }}",
    "{{ ''['__cla' ~ 'ss__']['__ba' ~ 'se__']['__subcl' ~ 'asses__']() }}%s",
    "{{ request.application.__globals__.__builtins__.__import__('os').popen('touch %s') }}",
    "{{ namespace.__init__.__globals__['__builtins__']['exec']('open(\"%s\", \"w\")') }}",
    "{{ joiner.__init__.__globals__.os.popen('touch %s') }}",
    "{%% for c in [].__class__.__base__.__subclasses__() %%}{{ c('%s') }}{%% endfor %%}",
    "{{ ('{0.__class__.__init__.__globals__[os]}' | format).format(cycler) }}%s",
    "{{ raise_exception.__globals__.open('%s', 'w') }}",
    "{{ strftime_now.__self__.__init__.__globals__ }}%s",
    "{{ dict.fromkeys.__globals__.open('%s', 'w') }}",
    "{%% set x = messages.__class__.__init__.__globals__ %%}{{ x.open('%s', 'w') }}",
]


def test_no_payload_writes_a_file(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / CANARY
    sources = {str(i): source % canary for i, source in enumerate(WRITES)}
    pool = make(sources)
    answers = [ask(pool, name) for name in sources]
    assert not canary.exists() and not list(tmp_path.iterdir())
    for answer in answers:
        assert answer.get("error") in ("failed", "syntax") or "<" not in answer["text"]


def test_the_worker_gave_up_files_and_processes(make):
    pool = make({"default": "ok"})
    ask(pool)
    (worker,) = workers()
    limits = {name: worker.rlimit(getattr(psutil, f"RLIMIT_{name}"))[0]
              for name in ("AS", "FSIZE", "NOFILE", "NPROC", "CORE")}  # fmt: skip
    assert limits == {"AS": LIMITS.memory, "FSIZE": 0, "NOFILE": 3, "NPROC": 0, "CORE": 0}


def test_the_worker_inherits_no_sockets_and_no_environment(make, monkeypatch):
    monkeypatch.setenv("A_SECRET", "sk-123")
    listener = socket.create_server(("127.0.0.1", 0))
    os.set_inheritable(listener.fileno(), True)
    pool = make({"default": "ok"})
    ask(pool)
    (worker,) = workers()
    listener.close()
    assert len(list(Path(f"/proc/{worker.pid}/fd").iterdir())) == 3
    assert b"A_SECRET" not in Path(f"/proc/{worker.pid}/environ").read_bytes()


def test_a_killed_worker_is_replaced(make):
    pool = make({"default": "ok"})
    for _ in range(3):
        assert ask(pool) == {"text": "ok"}
        (worker,) = workers()
        worker.send_signal(signal.SIGKILL)
        while worker.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert ask(pool) == {"text": "ok"}
        assert [w.pid for w in workers()] != [worker.pid]


def test_many_threads_share_few_workers(make):
    pool = make({"default": "{{ messages[0].content }} {{ number }}"}, workers=2)
    wrong = []

    def client(number: int) -> None:
        for i in range(20):
            if ask(pool, number=1000 * number + i) != {"text": f"x {1000 * number + i}"}:
                wrong.append(number)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= len(workers()) <= 2


def test_when_all_workers_are_busy_a_request_is_turned_away(make):
    slow = replace(LIMITS, seconds=1.5)
    pool = make({"default": "ok", "bomb": BOMBS["time"][0]}, slow, workers=1, queue_s=0.05)
    ask(pool)
    thread = threading.Thread(target=ask, args=(pool, "bomb"))
    thread.start()
    until(pool._idle.empty, "the worker is not busy")
    with pytest.raises(CapacityError, match="busy"):
        ask(pool)
    thread.join()


def test_close_and_collection_end_the_processes(make):
    pool = make({"default": "ok"})
    ask(pool)
    assert len(workers()) == 1
    pool.close()
    assert not workers()
    with pytest.raises(CapacityError, match="closed"):
        ask(pool)
    forgotten = TemplatePool({"default": "ok"}, LIMITS)
    ask(forgotten)
    del forgotten
    gc.collect()
    assert not workers()


def test_close_while_a_request_is_under_way_leaves_no_process(make):
    pool = make({"default": "ok", "bomb": BOMBS["time"][0]}, workers=1)
    ask(pool)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(pool, "bomb")))
    thread.start()
    until(pool._idle.empty, "the worker is not busy")
    pool.close()
    thread.join()
    assert answers == [{"error": "time"}] and not workers()


def test_a_fork_gets_processes_of_its_own(make):
    pool = make({"default": "ok"})
    ask(pool)
    (ours,) = workers()
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads; other libraries' threads are idle here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        answered = ask(pool) == {"text": "ok"}
        pool.close()
        os._exit(0 if answered else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ours.is_running() and ask(pool) == {"text": "ok"}


def test_large_requests_and_answers_pass_through_the_pipes(make):
    pool = make({"default": "{{ text }}"}, TemplateLimits())
    text = "ä" * 3_000_000
    assert ask(pool, text=text) == {"text": text}


def test_the_worker_loads_no_tensor_library(make):
    pool = make({"default": "ok"})
    ask(pool)
    (worker,) = workers()
    maps = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "libtorch" not in maps and "numpy" not in maps and "tokenizers" not in maps
