"""One document for every schema of ``scripts/check_constraints``, all in one batch; see there.

Oracle: jsonschema. The whole check, thousands of documents by two models, is the script's.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import jsonschema
import pytest

from oxillama_torch import LLM, SamplingParams
from oxillama_torch.completion import Collector
from oxillama_torch.engine.request import GenerationRequest
from oxillama_torch.sampling.constraint import Constraint

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_constraints"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))  # the scripts import each other by name
    loader = importlib.machinery.SourceFileLoader("check_constraints", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def test_a_document_of_every_schema(script):
    requests = [
        GenerationRequest(
            prompt_token_ids=(7, number),
            params=SamplingParams(
                max_tokens=400, seed=number, constraint=Constraint.json_schema(schema)
            ),
        )
        for number, schema in enumerate(script.SCHEMAS)
    ]
    with LLM(device="cpu", max_batch_size=64) as llm:
        documents = Collector(llm.engine, llm.tokenizer).completions(requests)
    for schema, document in zip(script.SCHEMAS, documents):
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        verdict = script._verdict(document.text, document.finish_reason, validator)
        assert verdict == "valid", (schema, document.text)


def test_the_verdict_tells_what_is_wrong(script):
    validator = jsonschema.Draft202012Validator({"type": "integer"})
    texts = {"1": "valid", '"a"': "INVALID", "{": "INVALID"}
    for text, verdict in texts.items():
        assert script._verdict(text, "stop", validator) == verdict
    assert script._verdict("1", "length", validator) == "unfinished"
