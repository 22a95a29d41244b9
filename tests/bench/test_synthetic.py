"""oxillama_torch/bench/synthetic.py. Oracle: gguf-py reads the file and decodes the weights."""

from __future__ import annotations

import gguf
import pytest

from oxillama_torch.bench.synthetic import Shape, write_synthetic
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.tokenizer.tokenizer import Tokenizer

# K of two sizes, a vocabulary of three rows per slice, more layers than one finer group of three
SHAPE = Shape(8, 256, 512, 4, 2, 600, 128)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "model.gguf"
    write_synthetic(path, SHAPE)
    return path


def test_weights_have_the_types_of_the_mix_and_a_sane_size(path):
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 8 * 9 + 3
    finer = {name for name, t in tensors.items() if t.tensor_type.name == "Q6_K"}
    # use_more_bits of 8 layers: the first, the last, and 3 and 6 between them
    layers = {f"blk.{i}.{name}.weight" for i in (0, 3, 6, 7) for name in ("attn_v", "ffn_down")}
    assert finer == layers | {"output.weight"}
    for name, tensor in tensors.items():
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if weights.ndim == 2:
            spread = weights.std() * weights.shape[1] ** 0.5
            assert 0.9 < spread < 1.1, name
            assert abs(weights.mean()) < 0.15 * weights.std(), name


def test_our_reader_and_tokenizer_take_it(path):
    with read_gguf(path) as file:
        assert file.architecture == "llama"
        tokenizer = Tokenizer.from_gguf(file.metadata)
    assert tokenizer.vocab_size == 600
    text = "One token per byte: ä\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_the_same_arguments_give_the_same_bytes(path, tmp_path):
    write_synthetic(tmp_path / "again.gguf", SHAPE)
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("shape, mix", [("70b", "q4_k_m"), ("tiny", "q3_k_s")])
def test_unknown_names_list_the_known(shape, mix, tmp_path):
    with pytest.raises(UnsupportedError, match="tiny" if shape == "70b" else "q8_0"):
        write_synthetic(tmp_path / "model.gguf", shape, mix)
