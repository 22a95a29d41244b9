"""docs/formats.md says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from oxillama_torch.gguf.types import TYPE_SIZES, GGMLType
from oxillama_torch.gguf.writer import ENCODABLE
from oxillama_torch.kernels import formats
from oxillama_torch.kernels.quant_matmul.lanes import LANES

pytest.importorskip("triton")

from oxillama_torch.kernels.quant_matmul.dp4a_units import UNITS  # noqa: E402

TEXT = (Path(__file__).parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")


def row(name: str) -> str:
    """The line of a type that has a format."""
    format = formats.get(name)
    bits = f"{8 * format.block_bytes / format.block_weights:.4g}"
    block = f"{format.block_weights} in {format.block_bytes}"
    planes = ", ".join(f"{plane} {width}" for plane, width in format.fields.items())
    cells = [name, str(int(format.type)), bits, block, planes, "yes" if name in UNITS else "-"]
    return f"| {' | '.join(cells)} |"


def test_table_has_every_format() -> None:
    names = sorted(formats.known(), key=lambda name: int(GGMLType[name]))
    wanted = "\n".join(row(name) for name in names)
    assert wanted in TEXT, f"the table should be\n{wanted}"


def test_compiled_products_serve_all_types_of_blocks() -> None:
    assert set(LANES) == {name for name in formats.known() if formats.get(name).block_weights > 1}


@pytest.mark.parametrize("type", [t for t in GGMLType if t.name not in formats.known()])
def test_other_types_are_listed_as_stored_only(type: GGMLType) -> None:
    assert f"| {type.name} | {int(type)} | {TYPE_SIZES[type].block_bytes} |" in TEXT


def test_encoders_are_listed() -> None:
    assert f"gguf-py encodes {', '.join(sorted(ENCODABLE))}." in " ".join(TEXT.split())
