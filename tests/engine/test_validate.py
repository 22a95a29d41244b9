"""What is refused at submission, and under which field."""

from __future__ import annotations

import pytest
from engine_driver import request_for

from oxillama_torch.engine.request import GenerationRequest
from oxillama_torch.engine.validate import check_request
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.params import SamplingParams

LIMITS = {"vocab_size": 100, "max_context": 16}


@pytest.mark.parametrize(
    ("prompt", "params", "param", "code"),
    [
        ([], {}, "prompt", "invalid_value"),
        ([1, -1], {}, "prompt", "invalid_value"),
        ([1, 100], {}, "prompt", "invalid_value"),
        ([1], {"logit_bias": {100: 1.0}}, "logit_bias.100", "invalid_value"),
        ([1], {"logit_bias": {-1: 1.0}}, "logit_bias.-1", "invalid_value"),
        ([1], {"stop_token_ids": (100,)}, "stop_token_ids", "invalid_value"),
        ([1], {"stop_token_ids": (2**70,), "min_tokens": 1}, "stop_token_ids", "invalid_value"),
        ([1], {"stop_token_ids": ("1",)}, "stop_token_ids", "invalid_value"),
        ([1] * 17, {}, "prompt", "context_length_exceeded"),
        ([1] * 16, {}, "prompt", "context_length_exceeded"),
        ([1] * 17, {"max_tokens": 0}, "prompt", "context_length_exceeded"),
    ],
)
def test_refused(prompt, params, param, code):
    with pytest.raises(RequestError) as caught:
        check_request(request_for(prompt, **params), **LIMITS)
    assert (caught.value.param, caught.value.code, caught.value.status) == (param, code, 400)


@pytest.mark.parametrize(
    ("prompt", "params"),
    [([0, 99], {}), ([1] * 15, {}), ([1] * 16, {"max_tokens": 0}), ([1], {"max_tokens": 10**6})],
)
def test_accepted(prompt, params):
    check_request(request_for(prompt, **params), **LIMITS)


def test_unknown_adapter_is_named():
    request = GenerationRequest(
        prompt_token_ids=(1,), params=SamplingParams(), adapters=(("pirate", 1.0),)
    )
    with pytest.raises(RequestError, match="pirate") as caught:
        check_request(request, **LIMITS)
    assert caught.value.status == 404
