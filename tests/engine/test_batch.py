"""The step's tensors, against values worked out by hand."""

from __future__ import annotations

from engine_driver import request_for

from oxillama_torch.engine.batch import BatchBuilder
from oxillama_torch.engine.state import RequestState, ScheduledBatch, ScheduledItem
from oxillama_torch.kvcache.holdings import HeldPages
from oxillama_torch.sampling.row import SamplingRow


def state(tokens, pages, slot, *, prompt=None, **params) -> RequestState:
    request = request_for(tokens[: prompt or len(tokens)], **params)
    made = RequestState(
        request,
        row=SamplingRow(request.params, request.prompt_token_ids),
        end_token_ids=frozenset(),
        max_context=1000,
        order=0,
    )
    made.token_ids, made.held, made.slot = list(tokens), HeldPages(pages=list(pages)), slot
    return made


def builder() -> BatchBuilder:
    return BatchBuilder(slots=4, max_pages=5, page_size=4, device="cpu")


def test_a_decode_a_chunk_and_a_scored_prompt():
    decode = ScheduledItem(state([1, 2, 3, 4, 5, 6], [7, 2], 3, prompt=4), 5, 1)
    chunk = ScheduledItem(state(list(range(10, 22)), [0, 9, 4], 0), 3, 6)
    scored = ScheduledItem(state([30, 31, 32], [5], 1, prompt_logprobs=0), 0, 3)
    inputs = builder().build(ScheduledBatch((decode, chunk, scored)))
    forward = inputs.forward
    assert forward.input_ids.tolist() == [6, 13, 14, 15, 16, 17, 18, 30, 31, 32]
    assert forward.positions.tolist() == [5, 3, 4, 5, 6, 7, 8, 0, 1, 2]
    assert forward.slot_mapping.tolist() == [9, 3, 36, 37, 38, 39, 16, 20, 21, 22]
    assert forward.page_table[0, :2].tolist() == [7, 2]
    assert forward.page_table[1].tolist() == [0, 9, 4]
    assert forward.page_table[2, :1].tolist() == [5]
    assert forward.query_start.tolist() == [0, 1, 7, 10]
    assert forward.seq_lens.tolist() == [6, 9, 3]
    assert (forward.max_query_len, forward.max_seq_len) == (6, 9)
    # The decode and the scored prompt choose a token; then positions 0 and 1 of the latter.
    assert forward.logits_rows.tolist() == [0, 9, 7, 8]
    assert (inputs.sampling, inputs.scoring) == ((decode, scored), (scored,))


def test_a_step_without_outputs():
    chunk = ScheduledItem(state(list(range(12)), [0, 1, 2], 0), 0, 4)
    inputs = builder().build(ScheduledBatch((chunk,)))
    assert inputs.forward.logits_rows.tolist() == [] and not inputs.sampling


def test_the_page_table_follows_growth_and_a_new_occupant():
    build = builder().build
    first = state([1, 2, 3, 4, 5], [3], 2)
    assert build(ScheduledBatch((ScheduledItem(first, 0, 4),))).forward.page_table.tolist() == [[3]]
    first.held.pages.append(1)
    table = build(ScheduledBatch((ScheduledItem(first, 4, 1),))).forward.page_table
    assert table.tolist() == [[3, 1]]
    second = state([1, 2, 3, 4, 5], [6, 5], 2)
    table = build(ScheduledBatch((ScheduledItem(second, 0, 5),))).forward.page_table
    assert table.tolist() == [[6, 5]]
    second.held.pages[0], second.held.synced = 4, 0
    table = build(ScheduledBatch((ScheduledItem(second, 4, 1),))).forward.page_table
    assert table.tolist() == [[4, 5]]
