"""``oxillama verify``: what it says of files that are whole, changed or missing."""

from __future__ import annotations

import hashlib

import pytest
from tiny_models import write_tiny

from oxillama_torch.cli.main import exit_code
from oxillama_torch.cli.verify import verify
from oxillama_torch.errors import GGUFError


def test_checksum_and_no_progress_where_nobody_watches(tmp_path, capsys):
    path = tmp_path / "tiny.gguf"
    write_tiny("llama", path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    verify(path, sha256=digest.upper())
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [f"sha256 {digest}", "ok"]


def test_other_checksum(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny("llama", path)
    with pytest.raises(GGUFError, match="checksum differs"):
        verify(path, sha256="0" * 64)


def test_missing_file_has_the_code_of_missing_models(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        verify(tmp_path / "nope.gguf")
    assert exit_code(caught.value) == 2
