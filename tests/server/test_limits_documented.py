"""The table of limits in docs/serving.md. Oracle: the code's own constants and defaults."""

import importlib
import re
from pathlib import Path

import pytest

from oxillama_torch.config import EngineConfig, ServerConfig

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ROW = r"^\| ([^|]+) \| ([\d,]+)( KiB| MiB| s|) \| `([\w.]+)` \| [^|]+ \|$"
ROWS = re.findall(ROW, TEXT, re.MULTILINE)
UNITS = {"": 1, " s": 1, " KiB": 1 << 10, " MiB": 1 << 20}


def in_code(name):
    """A field's default, or a module's constant."""
    module, _, constant = name.rpartition(".")
    if module:
        return getattr(importlib.import_module(f"oxillama_torch.{module}"), constant)
    return getattr(ServerConfig(), name, None) or getattr(EngineConfig(), name)


def test_every_row_of_the_table_is_understood():
    table = TEXT.split("|---|---|---|---|\n")[1].split("\n\n")[0]
    assert len(ROWS) == len(table.splitlines()) > 25


@pytest.mark.parametrize(("what", "number", "unit", "name"), ROWS, ids=[row[3] for row in ROWS])
def test_a_limit_is_the_one_of_the_code(what, number, unit, name):
    assert in_code(name) == int(number.replace(",", "")) * UNITS[unit]
