"""kernels/attention/gathered.py. Oracle: plain attention in float64."""

import pytest
import torch

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.attention.gathered import attention
from oxillama_torch.kernels.registry import Call

FLAGS = {
    "plain": {},
    "window": {"window": 20},
    "cap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "slopes": {"slopes": True},
    "all": {"window": 20, "softcap": 5.0, "sinks": True, "slopes": True},
}
HEADS = [((4, 4), (32, 32)), ((8, 2), (64, 64)), ((7, 1), (40, 24))]


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize(("heads", "dims"), HEADS)
def test_equals_plain_attention(heads, dims, flags, flagged, make_request, part, run, truth):
    """Decoding, prefill from the start and from the middle, in one batch; pages hold NaN beyond."""
    flags = flagged(flags, heads[0])
    requests = [make_request(n, heads, dims) for n in (1, 33, 70, 64)]
    spans = [(0, 1), (32, 33), (17, 70), (0, 64)]
    parts = [part(r, *span) for r, span in zip(requests, spans)]
    for got, p in zip(run(attention, parts, **flags), parts, strict=True):
        wanted = truth(p, **flags)
        assert (got.double() - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())


@pytest.mark.parametrize("pages_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pages_of_another_dtype(pages_dtype, make_request, part, run, truth):
    request = make_request(50, (8, 2), (64, 64), pages_dtype)
    whole = type(request)(request.q.float(), request.k, request.v)
    parts = [part(whole, 20, 50), part(whole, 49, 50)]
    for got, p in zip(run(attention, parts), parts, strict=True):
        assert (got.double() - truth(p)).abs().max() < 1e-5


def test_a_request_without_query_tokens_is_passed_over(make_request, part, run, truth):
    requests = [make_request(n, (4, 2), (32, 32)) for n in (10, 20, 30)]
    parts = [part(requests[0], 5, 10), part(requests[1], 20, 20), part(requests[2], 29, 30)]
    first, none, last = run(attention, parts)
    assert none.shape[0] == 0
    assert (first.double() - truth(parts[0])).abs().max() < 1e-5
    assert (last.double() - truth(parts[2])).abs().max() < 1e-5


def test_it_serves_fast_calls_on_a_cpu_and_others_only_when_asked():
    def chosen(device, numerics):
        call = Call(device, torch.float32, numerics)
        return registry.select("attention", call).backend

    assert chosen("cpu", "fast") == "gathered"
    assert chosen("cpu", "invariant") == "reference"
    with registry.use_kernels("attention=gathered"):
        assert chosen("cuda", "fast") == "gathered"
