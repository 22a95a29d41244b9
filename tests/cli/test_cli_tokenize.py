"""``oxillama tokenize`` and ``detokenize``. Oracle: the small vocabulary's own tokenizer."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from oxillama_torch.cli.tokenize import detokenize, tokenize
from oxillama_torch.errors import RequestError
from tests.support.tiny_vocabulary import tiny_vocabulary

TEXT = "def dedent(text): <|im_end|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import gguf

    path = tmp_path_factory.mktemp("model") / "vocabulary.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    tiny_vocabulary().write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def run():
    app = typer.Typer()
    app.command()(tokenize)
    app.command()(detokenize)

    def run(*arguments, **options):
        result = CliRunner().invoke(app, [str(a) for a in arguments], **options)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return run


def test_ids_of_a_text(run, model):
    expected = tiny_vocabulary().tokenizer.encode(TEXT).ids
    assert run("tokenize", TEXT, "-m", model, "--bare") == " ".join(map(str, expected)) + "\n"
    assert run("tokenize", "-", "-m", model, "--bare", input=TEXT).split() == [*map(str, expected)]


def test_special_tokens_on_request(run, model):
    end = str(tiny_vocabulary().id("<|im_end|>"))
    assert end not in run("tokenize", TEXT, "-m", model).split()
    assert run("tokenize", TEXT, "-m", model, "--special").split()[-1] == end


def test_pieces_show_bytes(run, model):
    lines = run("tokenize", "é", "-m", model, "--pieces", "--bare").splitlines()
    assert "".join(line.split("  ")[-1].strip("'") for line in lines) in (r"\xc3\xa9", r"\xc3 \xa9")


def test_ids_come_back_as_text(run, model):
    ids = tiny_vocabulary().tokenizer.encode(TEXT).ids
    assert run("detokenize", "-m", model, *ids) == TEXT + "\n"


def test_errors_name_what_is_wrong(run, model, tmp_path):
    with pytest.raises(RequestError, match="99999 is not in the vocabulary"):
        run("detokenize", "-m", model, 99999)
    with pytest.raises(FileNotFoundError):
        run("tokenize", "x", "-m", tmp_path / "none.gguf")
