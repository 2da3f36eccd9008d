"""Figures as files: SVG, PNG, and the numbers behind them as CSV. Needs matplotlib only, no torch."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
}


def style() -> Any:
    """The fonts and axes of all figures, as a context."""
    return matplotlib.rc_context(_STYLE)


def svg_text(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for a page: no prologue, no metadata, ids that differ from other figures'."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :]
    # The ids of matplotlib's groups ("figure_1", "axes_1") are in every figure of a page; nothing uses them.
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)


def save_png(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with style():
        figure.savefig(path, dpi=150)


def save(figure: Figure, stem: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Writes <stem>.svg, <stem>.png and, with the numbers behind the figure, <stem>.csv."""
    save_png(figure, stem.with_suffix(".png"))
    stem.with_suffix(".svg").write_text(svg_text(figure, stem.name), encoding="utf-8")
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
