"""Calls of ops as a model really makes them: the operands of one prompt, kept for checking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from oxillama_torch.bench.cases import Case
from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.loading import open_model
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.registry import Call, Kernel
from oxillama_torch.llm import LLM
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["capture"]

_NEW_TOKENS = 3


def capture(config: EngineConfig, prompt: str) -> list[Case]:
    """Run a prompt and a few tokens greedily; keep the first call of each kind.

    Calls are of one kind when op, type, rows and the weight's shape are the same.

    Args:
        config: model, device, dtype, numerics and kernels.
        prompt: text.
    """
    # One request needs few pages, and every case of attention keeps a copy of them all.
    with open_model(config) as gguf:
        tokens = len(Tokenizer.from_gguf(gguf.metadata).encode(prompt)) + _NEW_TOKENS
    pages = -(-tokens // config.page_size) + 1
    config = replace(config, max_batch_size=1, max_context=tokens, kv_pages=pages)
    keeper = _Keeper()
    with LLM.from_config(config) as llm, registry.observed(keeper.observe):
        llm.generate(prompt, SamplingParams(max_tokens=_NEW_TOKENS, temperature=0, ignore_eos=True))
    return list(keeper.cases.values())


class _Keeper:
    """Wraps every kernel that is chosen and copies what it is called with."""

    def __init__(self) -> None:
        self.cases: dict[tuple, Case] = {}

    def observe(self, kernel: Kernel, call: Call) -> Kernel:
        """The kernel, wrapped so that its next call may be kept."""
        return replace(kernel, function=self._keeping(kernel, call))

    def _keeping(self, kernel: Kernel, call: Call) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            shapes = tuple(x.shape for x in args if isinstance(x, PackedTensor))
            key = (kernel.op, call, shapes)
            if key not in self.cases:
                copies = tuple(_copied(x) for x in args)
                # The 8-bit form is x again, which every backend can make for itself.
                kept = {name: _copied(x) for name, x in kwargs.items() if name != "quantized"}
                label = " ".join("{}x{}".format(*shape) for shape in shapes)
                self.cases[key] = Case(kernel.op, call, copies, kept, label)
            return kernel.function(*args, **kwargs)

        return run


def _copied(value: Any) -> Any:
    """Activations and pages are overwritten later; weights are not."""
    return value.clone() if isinstance(value, torch.Tensor) else value
