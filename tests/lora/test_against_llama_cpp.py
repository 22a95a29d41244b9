"""Files that are written here, read by llama.cpp.

Oracle: llama.cpp (``pip install llama-cpp-python``) and peft; the three must agree.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapter_runner import assert_close, open_tiny
from tiny_adapters import EXPERTS, peft_logits, save_adapter

from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.lora.adapter import read_adapter
from oxillama_torch.lora.base import BaseFile
from oxillama_torch.lora.merge_file import merge_file
from oxillama_torch.lora.merged import Merge
from oxillama_torch.lora.write_gguf import write_adapter_gguf

pytestmark = pytest.mark.llama_cpp

IDS = torch.randint(0, 389, (40,), generator=torch.Generator().manual_seed(1)).tolist()
_F32 = 0  # ggml_type of its cache

CASES = {
    "linear": ("llama", {}),
    "neox": ("qwen3", {}),
    "embedding": ("llama", {"targets": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"targets": ["lm_head"]}),
    "mixtral": ("mixtral", {"targets": ["q_proj"], "target_parameters": EXPERTS}),
    "qwen3moe": ("qwen3moe", {"targets": ["k_proj"], "target_parameters": EXPERTS}),
}


def logits_by_llama_cpp(model, adapter=None):
    """float32 [tokens, V]."""
    import llama_cpp

    lora = None if adapter is None else str(adapter)
    llama = llama_cpp.Llama(
        str(model), lora_path=lora, n_ctx=64, logits_all=True, verbose=False, n_threads=2,
        type_k=_F32, type_v=_F32,
    )  # fmt: skip
    try:
        llama.eval(IDS)
        return torch.from_numpy(np.array(llama.scores[: len(IDS)]))
    finally:
        llama.close()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_adapter_and_a_merged_model_are_read_alike(case, tmp_path):
    arch, options = case
    oracle, _, targets = open_tiny(arch, tmp_path)
    wrapped = save_adapter(oracle, tmp_path / "a", **options)
    adapter = read_adapter("a", tmp_path / "a", targets)
    model, expected = tmp_path / "tiny.gguf", peft_logits(wrapped, IDS)
    write_adapter_gguf(adapter, tmp_path / "a.gguf", targets)
    assert_close(logits_by_llama_cpp(model, tmp_path / "a.gguf"), expected)
    with read_gguf(model) as file:
        read = read_adapter("a", tmp_path / "a.gguf", BaseFile(file))
        merge_file(file, [Merge(read, 1.0, "f32")], tmp_path / "merged.gguf")
    assert_close(logits_by_llama_cpp(tmp_path / "merged.gguf"), expected)
    assert not torch.allclose(logits_by_llama_cpp(model), expected, atol=0.05)
