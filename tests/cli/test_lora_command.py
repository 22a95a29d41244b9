"""``oxillama lora`` on the demo model and its adapter.

Oracle: the safetensors file that peft wrote; the parser of the written model.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from oxillama_torch.cli.main import app
from oxillama_torch.config import demo_model_path
from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.gguf.reader import read_gguf

FOLDER = demo_model_path().parent / "adapters" / "json"


def lora(*arguments):
    """What the command prints, blanks as single ones."""
    result = CliRunner().invoke(app, ["lora", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return [" ".join(line.split()) for line in result.output.splitlines()]


def test_there_and_back(tmp_path):
    lines = lora("info", FOLDER)
    assert "kind LoRA" in lines and "rank 8" in lines and "alpha 16" in lines
    assert lora("export", FOLDER, tmp_path / "json.gguf")[-1].endswith("42 changes")
    lines = lora("info", tmp_path / "json.gguf")
    assert "made for llama" in lines and "rank 8" in lines and "alpha 16" in lines
    lora("export", tmp_path / "json.gguf", tmp_path / "back")
    before = load_file(FOLDER / "adapter_model.safetensors")
    after = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], values.float()) for key, values in before.items())


def test_merging_says_what_each_matrix_became(tmp_path):
    out = tmp_path / "new.gguf"
    lines = lora("merge", FOLDER, out, "--scale", "0.5")
    row = next(line for line in lines if line.startswith("blk.0.attn_q"))
    name, before, after, error, of_the_change = row.split()
    assert (before, after) == ("Q8_0", "Q8_0")
    assert 0 < float(error) < 0.01 < float(of_the_change) < 0.2
    assert lines[-1].endswith("42 matrices changed")
    lora("merge", FOLDER, out, "--merge-dtype", "bf16")
    with read_gguf(out) as file, read_gguf(demo_model_path()) as old:
        assert file.tensors["blk.3.ffn_up.weight"].type.name == "BF16"
        assert file.tensors["token_embd.weight"].type == old.tensors["token_embd.weight"].type
        assert file.metadata.keys() == old.metadata.keys()


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(UnsupportedError, match="merge dtype 'q4'"):
        lora("merge", FOLDER, tmp_path / "x.gguf", "--merge-dtype", "q4")
    with pytest.raises(RequestError, match="--scale nan"):
        lora("merge", FOLDER, tmp_path / "x.gguf", "--scale", "nan")
    with pytest.raises(FileNotFoundError, match="no such model file"):
        lora("export", FOLDER, tmp_path / "x.gguf", "--model", tmp_path / "none.gguf")
    with pytest.raises(FileNotFoundError, match="no such adapter"):
        lora("info", tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
