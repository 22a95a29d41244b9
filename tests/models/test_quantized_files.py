"""The demo model as llama.cpp quantizes it, against llama.cpp itself.

llama.cpp rounds activations before products with quantized weights, which we do not; so it reads
the same weights in float32, as it decodes them. Then nothing but the order of additions differs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oxillama_torch import LLM, read_gguf
from oxillama_torch.config import demo_model_path

pytestmark = pytest.mark.llama_cpp

# ``enum llama_ftype`` of llama.h. The first three mix types as files in use do.
FILE_TYPES = {"Q4_K_M": 15, "Q3_K_M": 12, "IQ3_M": 27, "Q5_0": 8, "IQ4_XS": 30, "TQ1_0": 36}
ALL_F32 = 0
TEXT = "def update(self, *args):\n    for name in sorted(args):\n        self.names[name] = 1\n"


def requantize(source: Path, path: Path, file_type: int) -> Path:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = file_type, True, 1
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(path), params) == 0
    return path


def logits_by_llama_cpp(path: Path, ids: list[int]) -> torch.Tensor:
    import llama_cpp

    llama = llama_cpp.Llama(
        str(path), n_ctx=len(ids), logits_all=True, verbose=False, n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False,
    )  # fmt: skip
    llama.eval(ids)
    logits = torch.tensor(llama.scores[: len(ids)])
    llama.close()
    return logits


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_logits_are_llama_cpps(file_type, tmp_path):
    path = requantize(demo_model_path(), tmp_path / "quantized.gguf", FILE_TYPES[file_type])
    with read_gguf(path) as gguf:
        assert {info.type.name for info in gguf.tensors.values()} - {"F32", "Q8_0"}
    with LLM(path, numerics="invariant") as llm:
        ids = llm.tokenize(TEXT)
        ours = llm.logits(ids)
    theirs = logits_by_llama_cpp(requantize(path, tmp_path / "f32.gguf", ALL_F32), ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.std().item())
