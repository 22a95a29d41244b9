"""Custom processors: registered by name, loaded from modules and files, watched while they run.

Oracle: what the functions say they do.
"""

from __future__ import annotations

import pytest
import torch

from oxillama_torch import SamplingParams, register_processor
from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.sampling.custom import apply_processors, find_processors, load_processor
from oxillama_torch.sampling.row import SamplingRow

FILE = "def shout(token_ids, logits):\n    return logits + len(token_ids)\n"


def row_with(*names: str) -> SamplingRow:
    params = SamplingParams(seed=1, processors=names)
    return SamplingRow(params, [5, 6], processors=find_processors(names))


def test_a_file_is_loaded_once(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    assert load_processor(f"from-file={path}:shout") == "from-file"
    load_processor(f"from-file={path}:shout")
    logits = torch.randn(2, 9)
    out, failed = apply_processors(logits, [row_with("from-file"), row_with()])
    assert torch.equal(out[0], logits[0] + 2) and torch.equal(out[1], logits[1])
    assert not failed


@pytest.mark.parametrize(
    "spec",
    ["", "x", "x=", "x=json", "x=json:", "=json:dumps", "x=no.such:f", "x=json:no", "x=/no/f.py:f"],
)
def test_what_cannot_be_loaded_is_refused(spec):
    with pytest.raises(UnsupportedError, match="processor"):
        load_processor(spec)


def test_a_name_stands_for_one_function():
    @register_processor("test-once")
    def first(token_ids, logits):
        return logits

    register_processor("test-once", first)
    with pytest.raises(RequestError, match="already"):
        register_processor("test-once", lambda token_ids, logits: logits)
    with pytest.raises(RequestError, match="test-once"):
        find_processors(["test-twice"])


def test_several_run_one_after_the_other():
    register_processor("test-add", lambda token_ids, logits: logits + 1)
    register_processor("test-double", lambda token_ids, logits: logits * 2)
    logits = torch.randn(1, 9)
    out, _ = apply_processors(logits, [row_with("test-add", "test-double")])
    assert torch.equal(out[0], (logits[0] + 1) * 2)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("test-none", None),
        ("test-short", torch.zeros(8)),
        ("test-nan", torch.full((9,), torch.nan)),
        ("test-infinite", torch.full((9,), torch.inf)),
    ],
)
def test_a_wrong_answer_fails_its_row_and_no_other(name, wrong):
    register_processor(name, lambda token_ids, logits: wrong)
    logits = torch.randn(2, 9)
    out, failed = apply_processors(logits, [row_with(), row_with(name)])
    assert list(failed) == [1] and name in str(failed[1])
    assert torch.equal(out[0], logits[0])
