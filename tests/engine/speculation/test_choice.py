"""Which settings go together, and what a server makes of them for its other models."""

from __future__ import annotations

from pathlib import Path

import pytest

from oxillama_torch.config import EngineConfig, demo_model_path
from oxillama_torch.errors import UnsupportedError


def test_settings_that_go_together():
    assert EngineConfig().draft_path is None
    assert EngineConfig(speculation="lookup").draft_path is None
    own = EngineConfig(speculation="draft", draft_model=Path("small.gguf"), model=Path("m.gguf"))
    assert own.draft_path == Path("small.gguf")
    for model in (None, demo_model_path()):
        shipped = EngineConfig(speculation="draft", model=model).draft_path
        assert shipped == demo_model_path().with_name("demo_draft.gguf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculation": "guess"}, "speculation 'guess'"),
        ({"draft_model": Path("small.gguf")}, "a draft model with speculation 'none'"),
        ({"speculation": "draft", "model": Path("m.gguf")}, "without a draft model"),
        ({"speculation": "lookup", "draft_tokens": 0}, "draft_tokens must be at least 1"),
    ],
)
def test_settings_that_do_not(settings, message):
    with pytest.raises(UnsupportedError, match=message):
        EngineConfig(**settings)
