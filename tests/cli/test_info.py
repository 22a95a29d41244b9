"""``oxillama info`` on tiny files."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_surgery import rewrite
from tiny_models import write_tiny

from oxillama_torch.cli.info import info
from oxillama_torch.errors import GGUFError, UnsupportedError


def test_shape_types_and_memory(tmp_path, capsys):
    write_tiny("mixtral", tmp_path / "tiny.gguf", type_name="Q8_0")
    info(tmp_path / "tiny.gguf")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "architecture llama" in lines
    assert "heads 4 x 32, 2 for keys and values" in lines
    assert "experts 2 of 4" in lines
    assert "Q8_0 16 2,755,072 2,927,264 8.50" in lines
    # 2 layers x 2 heads x (32 + 32) elements
    assert "keys and values, per token 1.0 KiB 512 B" in lines
    assert not any(line.startswith("blk.") for line in lines)


def test_every_tensor_and_key_on_request(tmp_path, capsys):
    write_tiny("llama", tmp_path / "tiny.gguf")
    info(tmp_path / "tiny.gguf", tensors=True, metadata=True)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "blk.1.attn_k.weight F32 64 x 256 65,536" in lines
    assert "llama.attention.layer_norm_rms_epsilon 9.999999747378752e-06" in lines
    assert "tokenizer.ggml.merges 130: [i n, Ġ a, d e, t e, ...]" in lines


def test_a_file_that_cannot_be_loaded_is_described_before_the_reason(tmp_path, capsys):
    write_tiny("llama", tmp_path / "tiny.gguf")
    odd = {"general.architecture": "rwkv9", "general.name": "odd\x1b[31m"}
    path = rewrite(tmp_path / "tiny.gguf", tmp_path / "odd.gguf", metadata=odd)
    with pytest.raises(UnsupportedError, match="'rwkv9'"):
        info(path)
    out = capsys.readouterr().out
    assert "rwkv9" in out
    assert "\x1b" not in out, "a name must not command the terminal"


def test_a_type_that_is_only_stored_is_shown_before_it_is_refused(tmp_path, capsys):
    write_tiny("llama", tmp_path / "tiny.gguf")
    stored = {"blk.0.attn_k.weight": (np.ones((64, 256 * 8), np.uint8), "F64")}
    path = rewrite(tmp_path / "tiny.gguf", tmp_path / "stored.gguf", tensors=stored)
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_k\.weight.*F64"):
        info(path, tensors=True)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "F64 1 16,384 131,072 64.00" in lines
    assert "blk.0.attn_k.weight F64 64 x 256 131,072" in lines


def test_no_file_and_no_gguf(tmp_path):
    with pytest.raises(FileNotFoundError):
        info(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(GGUFError):
        info(tmp_path / "text.gguf")
