"""Pictures of a kernel table: microseconds and share of the ceilings over the number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from oxillama_torch.bench.kernel_table import Row
from oxillama_torch.errors import UnsupportedError

__all__ = ["check_picture", "plot_table"]

_PANEL = (4.2, 3.2)  # inches
_COLUMNS = 4
_LETTERS_PER_INCH = 15


def check_picture(path: Path) -> None:
    """Raise unless a picture can be written to ``path``: to be called before measuring for it.

    Raises:
        UnsupportedError: matplotlib is not installed, or it knows no such kind of file.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        raise UnsupportedError("--plot without matplotlib", ("pip install matplotlib",)) from None
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise UnsupportedError(f"picture {path.name}", [f".{ending}" for ending in known])


def plot_table(rows: Sequence[Row], title: str, path: Path) -> None:
    """One panel per GGML type (or op): each backend's bandwidth and matmul rate against M.

    Solid: share of the measured copy bandwidth. Dashed: share of the measured matmul rate.

    Args:
        rows: of ``kernel_table``; those without a time are left out.
        title: what was measured, and where.
        path: a picture file; its ending says which kind.

    Raises:
        UnsupportedError: matplotlib is not installed, or it knows no such kind of file.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.microseconds is not None]
    panels = list(dict.fromkeys((row.type or row.op, row.label) for row in timed))
    if not panels:
        raise UnsupportedError("a plot of a table without times")
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure((columns * _PANEL[0], lines * _PANEL[1] + 0.8), layout="constrained")
    wide = int(columns * _PANEL[0] * _LETTERS_PER_INCH)
    lines_of_title = [part for line in title.splitlines() for part in wrap(line, wide)]
    figure.suptitle("\n".join(lines_of_title), fontsize=9)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, place)
        _draw(axes, [row for row in timed if (row.type or row.op, row.label) == panel])
        axes.set_title(" ".join(filter(None, panel)), fontsize=9)
    figure.savefig(path, dpi=130)


def _draw(axes, rows: Sequence[Row]) -> None:
    for number, backend in enumerate(dict.fromkeys(row.backend for row in rows)):
        mine = [row for row in rows if row.backend == backend]
        style = {"color": f"C{number}", "marker": "o", "markersize": 3, "linewidth": 1.2}
        m = [row.m for row in mine]
        axes.plot(m, [row.share_of_copy for row in mine], label=backend, **style)
        if mine[0].share_of_matmul is not None:
            axes.plot(m, [row.share_of_matmul for row in mine], linestyle="--", **style)
    axes.set_xscale("log", base=2)
    ticks = sorted({row.m for row in rows})
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows M", fontsize=8)
    axes.set_ylabel("share of ceiling: copy (—), matmul (- -)", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=6)
