"""Scheduler: invariants over random loads (hypothesis) and the order of things by hand.

No model: tokens are invented. What may never happen is written in ``Simulation.step``.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from oxillama_torch.engine.request import GenerationRequest
from oxillama_torch.engine.scheduler import Scheduler
from oxillama_torch.engine.state import RequestState
from oxillama_torch.kvcache.holdings import PageManager
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.sampling.row import SamplingRow

SIZE = 4


class Simulation:
    """A scheduler, and what its requests have received."""

    def __init__(
        self, *, pages=64, batch_size=8, budget=16, context=10**6, prefix_cache=True, run=1
    ):
        self.longest_run = run
        manager = PageManager(pages, SIZE, prefix_cache=prefix_cache)
        self.pages, self.budget = manager, budget
        self.scheduler = Scheduler(
            manager, max_batch_size=batch_size, max_batch_tokens=budget, max_context=context
        )
        self.received: dict[RequestState, int] = {}
        self.finished: dict[RequestState, str] = {}

    def add(self, prompt, max_tokens=4, **options) -> RequestState:
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0,
            prompt_logprobs=options.pop("prompt_logprobs", None),
        )
        number = len(self.received)
        request = GenerationRequest(
            prompt_token_ids=tuple(prompt), params=params, arrival=float(number), **options
        )
        state = RequestState(
            request,
            row=SamplingRow(params, prompt),
            end_token_ids=frozenset(),
            max_context=self.scheduler.max_context,
            order=number,
        )
        self.received[state] = 0
        self.scheduler.add(state)
        return state

    def step(self):
        batch = self.scheduler.schedule()
        assert batch.tokens <= self.budget, "the budget is never exceeded"
        states = [item.state for item in batch.items]
        assert len(set(states)) == len(states), "a request is in a batch once"
        for item in batch.items:
            assert item.count >= 1 and item.start == item.state.computed
            assert len(item.state.held.pages) * SIZE >= item.stop, "every token has its page"
        if batch.items:
            written = [
                (item.state.held.pages[position // SIZE], position % SIZE)
                for item in batch.items
                for position in range(item.start, item.stop)
            ]
            assert len(set(written)) == len(written), "no place is written twice"
            read_only = [
                page
                for page in {page for page, _ in written}
                if self.pages.allocator.references(page) > 1
            ]
            assert not read_only, "a shared page is never written"
        chosen = {item.state: self.new_tokens(item.state) for item in batch.items if item.samples}
        for state, tokens in chosen.items():
            self.received[state] += len(tokens)
        for state, reason in self.scheduler.postprocess(batch, chosen):
            self.finished[state] = reason
        self.check_pages()
        return batch

    def new_tokens(self, state) -> list[int]:
        """One token, or several as where a grammar leaves no choice."""
        known = len(state.token_ids)
        count = min(1 + known * 7 % self.longest_run, state.stop_at - known)
        return [100 + known + i for i in range(count)]

    def check_pages(self):
        allocator = self.pages.allocator
        held = [page for state in self.scheduler.running for page in state.held.pages]
        assert all(
            allocator.references(page) == held.count(page) for page in range(allocator.num_pages)
        )
        assert all(not state.held.pages for state in self.scheduler.waiting)

    def run(self, limit=2000) -> int:
        steps = 0
        while len(self.scheduler):
            assert self.step().items, "with work at hand, every step does some"
            steps += 1
            assert steps < limit, "requests do not come to an end"
        assert self.pages.allocator.used == 0, "what was taken was given back"
        return steps


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt tokens
        st.integers(0, 12),  # max_tokens
        st.integers(0, 2),  # priority
        st.booleans(),  # prompt_logprobs
        st.integers(0, 1),  # which of two shared prefixes
        st.integers(0, 6),  # steps before the next request arrives
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    pages=st.integers(11, 40),
    batch_size=st.integers(1, 6),
    budget=st.integers(1, 24),
    prefix_cache=st.booleans(),
    requests=REQUESTS,
    cancel_every=st.integers(2, 9),
    run=st.integers(1, 12),
)
def test_random_loads_come_to_an_end(
    pages, batch_size, budget, prefix_cache, requests, cancel_every, run
):
    sim = Simulation(
        pages=pages, batch_size=batch_size, budget=budget, prefix_cache=prefix_cache, run=run
    )
    cancelled = []
    for number, (length, max_tokens, priority, scored, prefix, pause) in enumerate(requests):
        state = sim.add(
            [prefix * 50 + i for i in range(length)],
            max_tokens,
            priority=priority,
            prompt_logprobs=0 if scored else None,
        )
        for _ in range(pause):
            sim.step()
        if number % cancel_every == 0 and state not in sim.finished:
            sim.scheduler.remove(state)
            cancelled.append(state)
            sim.check_pages()
    sim.run()
    for state, (_, max_tokens, *_) in zip(sim.received, requests):
        if state not in cancelled:
            assert sim.finished[state] == "length"
            assert sim.received[state] == state.generated == max_tokens


def test_decoding_requests_go_before_prompts_and_never_wait():
    sim = Simulation(budget=8)
    first = sim.add([1, 2, 3], max_tokens=20)
    sim.step()
    sim.add(list(range(10, 60)), max_tokens=1)
    for _ in range(7):
        batch = sim.step()
        assert batch.items[0].state is first and batch.items[0].count == 1
        assert batch.tokens == 8, "the prompt takes what is left"
    assert sim.received[first] == 8


def test_prompts_are_cut_into_chunks():
    sim = Simulation(budget=5)
    sim.add(list(range(12)), max_tokens=1)
    counts = [[item.count for item in sim.step().items] for _ in range(3)]
    assert counts == [[5], [5], [2]] and not len(sim.scheduler)


def test_priority_then_arrival_decides_who_is_admitted():
    sim = Simulation(batch_size=1)
    late = sim.add([1], priority=1)
    second = sim.add([2], priority=0)
    third = sim.add([3], priority=0)
    sim.run()
    assert list(sim.finished) == [second, third, late]


def test_nobody_overtakes_the_first_in_line_for_ever():
    """The big request does not fit beside the running one; small ones behind it must wait."""
    sim = Simulation(pages=8)
    sim.add(list(range(12)), max_tokens=10)
    sim.step()
    big, small = sim.add(list(range(20, 44)), max_tokens=1), sim.add([99], max_tokens=1)
    while sim.finished.keys() != {next(iter(sim.received))}:
        batch = sim.step()
        assert small not in [item.state for item in batch.items]
    sim.run()
    assert list(sim.finished)[1:] in ([big, small], [small, big])


def test_the_latest_request_is_preempted_and_continues_where_it_was():
    sim = Simulation(pages=6, prefix_cache=False)
    early, late = sim.add([1] * 8, max_tokens=12), sim.add([2] * 6, max_tokens=6)
    preempted = []
    while late not in sim.finished or early not in sim.finished:
        preempted += [(state, state.generated) for state in sim.step().preempted]
    assert [state for state, _ in preempted] == [late] and preempted[0][1] > 0
    assert sim.received[late] == 6 and sim.received[early] == 12, "nothing is sent twice"
    assert sim.scheduler.preemptions == 1


def test_low_priority_is_preempted_before_late_arrival():
    sim = Simulation(pages=6, prefix_cache=False)
    low, high = sim.add([1] * 8, max_tokens=12, priority=5), sim.add([2] * 6, max_tokens=12)
    preempted = []
    while len(sim.finished) < 2:
        preempted += sim.step().preempted
    assert set(preempted) == {low} and high in sim.finished


@pytest.mark.parametrize("sizes", [{"batch_size": 2}, {"pages": 6}], ids=["places", "pages"])
def test_low_priority_gives_way_at_once(sizes):
    """Nobody who is waited for stands behind work that nobody waits for."""
    sim = Simulation(prefix_cache=False, **sizes)
    low = [sim.add(range(8), max_tokens=12, priority=10) for _ in range(2)]
    sim.step()
    high = sim.add(range(8), max_tokens=3)
    seen = [sim.step() for _ in range(3)]
    assert high in {item.state for batch in seen for item in batch.items}
    assert {state for batch in seen for state in batch.preempted} == {low[1]}
    while sim.scheduler.waiting or sim.scheduler.running:
        sim.step()
    assert set(sim.finished) == {*low, high} and list(sim.finished)[0] is high


def test_equal_priority_gives_way_to_nobody():
    sim = Simulation(batch_size=1)
    first = sim.add(range(4), max_tokens=8)
    sim.step()
    sim.add(range(4), max_tokens=1)
    while first not in sim.finished:
        assert not sim.step().preempted


def test_a_preempted_request_finds_its_pages_in_the_cache():
    sim = Simulation(pages=6)
    sim.add([1] * 8, max_tokens=12)
    late = sim.add([2] * 7, max_tokens=6)
    hits = []
    while late not in sim.finished:
        batch = sim.step()
        hits += [i.start for i in batch.items if i.state is late and i.count > 1]
    assert sim.scheduler.preemptions and hits[-1] > 0
    assert sim.scheduler.prefix_hit_tokens == 0, "hits count for the prompt, once"


def test_equal_streams_get_equal_shares():
    """While all 32 run, each gets a token per step, whatever was admitted first."""
    sim = Simulation(pages=600, batch_size=32, budget=40)
    states = [sim.add([i] * 7, max_tokens=60) for i in range(32)]
    while min(sim.received.values()) == 0:
        sim.step()
    before = dict(sim.received)
    steps = 0
    while not sim.finished:
        sim.step()
        steps += 1
    got = [sim.received[state] - before[state] for state in states]
    assert steps > 20 and min(got) == max(got) == steps


def test_new_prompts_do_not_slow_running_streams_down():
    sim = Simulation(pages=600, batch_size=32, budget=40)
    running = [sim.add([i] * 3, max_tokens=100) for i in range(8)]
    for step in range(60):
        if step % 3 == 0 and step < 30:
            sim.add(list(range(50)), max_tokens=3)
        sim.step()
    got = [sim.received[state] for state in running]
    assert min(got) >= 59 and max(got) / min(got) < 1.5


def test_the_prefix_cache_serves_all_but_the_last_page_of_an_equal_prompt():
    sim = Simulation()
    prompt = list(range(12))
    sim.add(prompt, max_tokens=1)
    sim.run()
    again = sim.add(prompt, max_tokens=1)
    item = sim.step().items[0]
    assert (item.start, item.count, again.cached_tokens) == (8, 4, 8)
    assert sim.scheduler.prefix_hit_tokens == 8


def test_scored_prompts_are_computed_whole_but_fill_the_cache():
    sim = Simulation()
    prompt = list(range(12))
    for _ in range(2):
        scored = sim.add(prompt, max_tokens=0, prompt_logprobs=0)
        item = sim.step().items[0]
        assert (item.start, item.count) == (0, 12)
        assert item.scored_positions == range(11) and scored in sim.finished
    assert sim.add(prompt, max_tokens=1) and sim.step().items[0].start == 8


def test_salt_keeps_prompts_apart():
    sim = Simulation()
    prompt = list(range(12))
    sim.add(prompt, cache_salt="a")
    sim.run()
    sim.add(prompt, cache_salt="b")
    assert sim.step().items[0].start == 0


def test_context_is_cut_to_what_all_pages_hold():
    sim = Simulation(pages=3, context=100)
    assert sim.scheduler.max_context == 12
    state = sim.add([1] * 5, max_tokens=None)
    sim.run()
    assert len(state.token_ids) == 12 and sim.finished[state] == "length"


@pytest.mark.parametrize("budget", [1, 3])
def test_a_tiny_budget_still_serves_everybody(budget):
    sim = Simulation(budget=budget, batch_size=8)
    for i in range(6):
        sim.add([i] * 5, max_tokens=5)
    sim.run()
    assert set(sim.received.values()) == {5}
    assert len(sim.scheduler.running) == 0 and sim.scheduler.max_running == budget
