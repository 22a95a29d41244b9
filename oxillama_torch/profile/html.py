"""A profile as one self-contained HTML page: tables, bars and a roofline, no scripts."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from oxillama_torch.bench.ceilings import Ceilings
from oxillama_torch.profile.summary import Line

__all__ = ["page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: #1b1f24; background: #fff }
.wide { overflow-x: auto; margin-bottom: 1.5em }
.wide svg { display: block; width: 100%; min-width: 36em }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2em .6em; border-bottom: 1px solid #e3e6ea;
         white-space: nowrap }
th:first-child, td:first-child, th:nth-child(4), td:nth-child(4) { text-align: left }
.bar { background: #3566c8; height: .8em; display: inline-block; border-radius: 2px }
p.note { color: #59636e }
@media (max-width: 40em) { table { font-size: 12px } th, td { padding: .2em .3em } }
"""
_WIDTH, _HEIGHT, _MARGIN = 760, 340, 56


def page(
    title: str,
    machine: Mapping[str, str],
    phases: Mapping[str, tuple[Sequence[Line], Sequence[Line]]],
    ceilings: Ceilings,
) -> str:
    """The page.

    Args:
        machine: what was measured on, name to value.
        phases: name (``prefill``, ``decode``) -> lines by kernel and lines by layer.
        ceilings: measured on the same device.
    """
    facts = " · ".join(f"{html.escape(k)} {html.escape(str(v))}" for k, v in machine.items())
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="note">{facts}</p>']
    parts.append(
        f"<p>Ceilings measured here: copy {ceilings.copy / 1e9:,.1f} GB/s, "
        f"{ceilings.matmul_dtype} matmul {ceilings.matmul / 1e12:,.2f} TFLOP/s. "
        "Roofline 1.00 means as fast as these allow.</p>"
    )
    for name, (kernels, layers) in phases.items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        shown = (_roofline(kernels, ceilings), _table("kernel", kernels), _table("layer", layers))
        parts += [f'<div class="wide">{part}</div>' for part in shown if part]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>\n{body}</html>\n"
    )


def _table(what: str, lines: Sequence[Line]) -> str:
    rows = "\n".join(
        f"<tr><td>{html.escape(line.name)}</td><td>{line.calls}</td>"
        f"<td>{line.seconds * 1e3:,.2f}</td>"
        f'<td><span class="bar" style="width:{line.share * 8:.2f}em">'
        f"</span> {line.share:.1%}</td>"
        f"<td>{line.nbytes / 1e6:,.1f}</td><td>{line.flops / 1e6:,.1f}</td>"
        f"<td>{line.roofline:.3f}</td></tr>"
        for line in lines
    )
    head = (what, "calls", "ms", "share", "MB", "MFLOP", "roofline")
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<table><tr>{cells}</tr>\n{rows}</table>"


def _roofline(lines: Sequence[Line], ceilings: Ceilings) -> str:
    """Operations per byte against operations per second, both axes logarithmic."""
    points = [
        (line.flops / line.nbytes, line.flops / line.seconds, line)
        for line in lines
        if line.flops and line.nbytes and line.seconds
    ]
    if not points:
        return ""
    ridge = ceilings.matmul / ceilings.copy
    xs = [x for x, _, _ in points] + [ridge]
    ys = [y for _, y, _ in points] + [ceilings.matmul]
    x_range = math.log10(min(xs)) - 0.3, math.log10(max(xs)) + 0.5
    y_range = math.log10(min(ys)) - 0.3, math.log10(max(ys)) + 0.3

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_range[0]) / (x_range[1] - x_range[0])
        up = (math.log10(y) - y_range[0]) / (y_range[1] - y_range[0])
        up = min(max(up, 0.0), 1.0)
        return (
            _MARGIN + across * (_WIDTH - 2 * _MARGIN),
            _HEIGHT - _MARGIN - up * (_HEIGHT - 2 * _MARGIN),
        )

    start = max(10 ** x_range[0], 10 ** y_range[0] / ceilings.copy)
    roof = [(start, start * ceilings.copy), (ridge, ceilings.matmul)]
    roof.append((10 ** x_range[1], ceilings.matmul))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in roof))
    ticks = [(place(10.0**n, 1)[0], None, f"1e{n}") for n in _powers(x_range)]
    ticks += [(None, place(1, 10.0**n)[1], f"1e{n}") for n in _powers(y_range)]
    return _svg(path, [(*place(x, y), line.name) for x, y, line in points], ticks)


def _powers(range_: tuple[float, float]) -> range:
    """Exponents of the powers of ten between two logarithms."""
    return range(math.ceil(range_[0]), math.floor(range_[1]) + 1)


def _svg(
    path: str,
    points: Sequence[tuple[float, float, str]],
    ticks: Sequence[tuple[float | None, float | None, str]],
) -> str:
    """The drawing: a roof, points (x, y, name), and ticks on the axis whose place is given."""
    marks = "\n".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#3566c8"><title>{html.escape(name)}'
        f'</title></circle><text x="{min(x + 8, _WIDTH - 200):.1f}" y="{y - 8:.1f}" '
        f'font-size="11">{html.escape(name)}</text>'
        for x, y, name in points
    )
    bottom, right = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    marks += "".join(
        f'<path d="M{_MARGIN} {y:.1f} h-5" stroke="#59636e"/><text x="{_MARGIN - 8}" '
        f'y="{y + 4:.1f}" text-anchor="end" font-size="11">{label}</text>'
        if x is None
        else f'<path d="M{x:.1f} {bottom} v5" stroke="#59636e"/><text x="{x:.1f}" '
        f'y="{bottom + 17}" text-anchor="middle" font-size="11">{label}</text>'
        for x, y, label in ticks
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="roofline">'
        f'<path d="M{_MARGIN} {_MARGIN} V{bottom} H{right}" fill="none" stroke="#59636e"/>'
        f'<polyline points="{path}" fill="none" stroke="#c0392b" stroke-width="2"/>{marks}'
        f'<text x="{right}" y="{bottom + 36}" text-anchor="end" font-size="12">'
        "operations per byte (log)</text>"
        f'<text x="{_MARGIN}" y="{_MARGIN - 14}" font-size="12">operations per second (log)</text>'
        "</svg>"
    )
