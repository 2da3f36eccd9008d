"""Figures: arrays in, matplotlib figures out. Needs numpy and matplotlib only, no torch."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.aggregate import locf, t_band

# Okabe and Ito's palette, which colour-blind people can tell apart. One algorithm has one colour in every figure.
COLOURS = {"vader": "#0072B2", "ddpo": "#D55E00", "grpo": "#009E73", "dpo": "#CC79A7", "online_vpo": "#56B4E9"}
_OTHERS = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F3C8D", "#A5AA99")
WIDE, NARROW = (7.2, 3.9), (3.7, 3.4)
"""Figure sizes in inches: a page, and a telephone (the same font size, so that it stays readable)."""
_GAP = ((0, 0), (1, 1), (1, 1), (0, 0))  # a white pixel around every frame
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


@dataclass(frozen=True, eq=False)
class Line:
    """One algorithm's runs: each a pair of arrays (x [N], y [N])."""

    algo: str
    runs: Sequence[tuple[np.ndarray, np.ndarray]]


def _new(
    size: tuple[float, float], *, left: float = 0.7, right: float = 0.75, top: float = 0.12
) -> tuple[Figure, Axes]:
    """A figure on the Agg canvas, outside of pyplot, which would keep it open and choose a window system.

    Margins are in inches and fixed: fitting them to the text would draw everything twice.
    """
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    figure.subplots_adjust(left=left / size[0], right=1 - right / size[0], bottom=0.55 / size[1], top=1 - top / size[1])
    return figure, axis


def colour(algo: str) -> str:
    """The algorithm's fixed colour; an algorithm of your own gets one by its name, the same in every figure."""
    if algo in COLOURS:
        return COLOURS[algo]
    return _OTHERS[hashlib.sha256(algo.encode()).digest()[0] % len(_OTHERS)]


def centre_and_band(line: Line, points: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Grid, mean, low and high over a line's runs, up to the end of the shortest run."""
    last = min(x[-1] for x, _ in line.runs)
    first = max(x[0] for x, _ in line.runs)
    # Every run's own evaluations are in the grid: a mean drawn on a coarse grid would show steps late.
    own = np.concatenate([x for x, _ in line.runs])
    grid = np.unique(np.append(np.linspace(first, last, points), own[(own >= first) & (own <= last)]))
    return grid, *t_band([locf(x, y, grid) for x, y in line.runs])


def curves(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    base: float | None = None,
    log_x: bool = False,
    size: tuple[float, float] = WIDE,
) -> Figure:
    """Reward against a cost: every run thin, the mean thick, a t-band from three runs on, the untrained model dashed.

    One run alone is drawn through its evaluations, marked by dots: nothing is measured between them.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axis = _new(size)
        ends = []
        for line in lines:
            own = colour(line.algo)
            many = len(line.runs) > 1
            for x, y in line.runs:
                axis.plot(
                    x, y, color=own, lw=0.8 if many else 1.8, alpha=0.5 if many else 1, marker="o", ms=2 if many else 4
                )
            if many:
                grid, centre, low, high = centre_and_band(line)
                axis.plot(grid, centre, color=own, lw=2.2, drawstyle="steps-post")
                if np.isfinite(low).any():
                    axis.fill_between(grid, low, high, color=own, alpha=0.18, lw=0, step="post")
                ends.append((line.algo, grid[-1], centre[-1]))
            else:
                x, y = line.runs[0]
                ends.append((line.algo, x[-1], y[-1]))
        if base is not None:
            axis.axhline(base, color="0.35", ls="--", lw=1)
            rises = sum(y - base for _, _, y in ends) >= 0
            axis.annotate(
                "untrained model", (1, base), xycoords=("axes fraction", "data"), xytext=(-2, -3 if rises else 3),
                textcoords="offset points", color="0.35", fontsize=9, ha="right", va="top" if rises else "bottom",
            )  # fmt: skip
        axis.margins(x=0.02, y=0.12)
        if log_x:
            # Evaluations before training cost nothing: a plain log axis would lose them.
            positive = [value for line in lines for x, _ in line.runs for value in x if value > 0]
            axis.set_xscale("symlog", linthresh=min(positive, default=1.0))
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")  # plain numbers: 10^2 is drawn very slowly
            axis.set_xlim(left=0)
        axis.set(xlabel=x_label, ylabel=y_label)
        _label_ends(axis, ends)
    return figure


def plane(lines: Sequence[Line], *, x_label: str, y_label: str, size: tuple[float, float] = WIDE) -> Figure:
    """One reward against another in the course of training; an open circle marks the start, a filled one the end."""
    with matplotlib.rc_context(_STYLE):
        figure, axis = _new(size)
        ends = []
        for line in lines:
            own = colour(line.algo)
            for x, y in line.runs:
                axis.plot(x, y, color=own, lw=1.4, marker=".", ms=5)
                axis.plot(x[:1], y[:1], color=own, marker="o", ms=8, mfc="white", ls="")
                axis.plot(x[-1:], y[-1:], color=own, marker="o", ms=8, ls="")
            x, y = line.runs[0]
            ends.append((line.algo, x[-1], y[-1]))
        axis.set(xlabel=x_label, ylabel=y_label)
        _label_ends(axis, ends)
    return figure


def phases(costs: Mapping[str, Mapping[str, float]], *, size: tuple[float, float] = WIDE) -> Figure:
    """Seconds per update by phase, {algorithm: {phase: seconds}}, as stacked horizontal bars."""
    shades = ("#4C4C4C", "#7A7A7A", "#A8A8A8", "#D0D0D0")
    with matplotlib.rc_context(_STYLE):
        longest = max(map(len, costs), default=1)
        figure, axis = _new((size[0], 1.2 + 0.45 * len(costs)), left=0.3 + 0.08 * longest, right=0.15, top=0.4)
        names = sorted({phase for parts in costs.values() for phase in parts})
        left = np.zeros(len(costs))
        for index, phase in enumerate(names):
            widths = np.array([parts.get(phase, 0.0) for parts in costs.values()])
            axis.barh(list(costs), widths, left=left, color=shades[index % len(shades)], label=phase, height=0.6)
            left += widths
        axis.grid(axis="y", visible=False)
        axis.invert_yaxis()
        axis.set_xlabel("seconds per update")
        axis.legend(ncols=len(names), frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    return figure


def strip(rows: Sequence[tuple[str, np.ndarray]], *, frames: int = 8) -> Figure:
    """Frames of videos, one labelled row for each: (label, uint8 [F, H, W, 3], all of one size)."""
    pictures = []
    for _, video in rows:
        chosen = video[np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int)]
        pictures.append(np.concatenate(list(np.pad(chosen, _GAP, constant_values=255)), 1))
    height, width = pictures[0].shape[:2]
    with matplotlib.rc_context(_STYLE):
        longest = max((len(part) for label, _ in rows for part in label.split("\n")), default=1)
        left = 0.2 + 0.065 * longest
        figure, axis = _new((7.2, (7.1 - left) * height * len(rows) / width + 0.67), left=left, right=0.1)
        axis.imshow(np.concatenate(pictures), interpolation="nearest", aspect="equal")
        axis.set_yticks(height * (np.arange(len(rows)) + 0.5) - 0.5, [label for label, _ in rows], fontsize=8)
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    return figure


def _label_ends(axis: Axes, ends: Sequence[tuple[str, float, float]]) -> None:
    """Writes each algorithm's name at the end of its line, moved apart where two would overlap."""
    figure = axis.figure
    axis.get_xlim(), axis.get_ylim()  # settles the limits, which text is placed by
    known = [(algo, x, y) for algo, x, y in ends if np.isfinite(y)]
    known.sort(key=lambda end: axis.transData.transform((end[1], end[2]))[1])
    lowest = -np.inf
    spacing = 13 * figure.dpi / 72  # a line of text, in pixels
    for algo, x, y in known:
        at = axis.transData.transform((x, y))[1]
        wanted = max(at, lowest + spacing)
        lowest = wanted
        axis.annotate(algo, (x, y), xytext=(9, (wanted - at) * 72 / figure.dpi), textcoords="offset points",
                      color=colour(algo), fontweight="bold", va="center", annotation_clip=False)  # fmt: skip


def svg_text(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for a page: no prologue, no metadata, ids that differ from other figures'."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :]
    # The ids of matplotlib's groups ("figure_1", "axes_1") are in every figure of a page; nothing uses them.
    return re.sub(r'<g id="[^"]*">', "<g>", text)


def save_png(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        figure.savefig(path, dpi=150)


def save(figure: Figure, stem: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Writes <stem>.svg, <stem>.png and, with the numbers behind the figure, <stem>.csv."""
    save_png(figure, stem.with_suffix(".png"))
    stem.with_suffix(".svg").write_text(svg_text(figure, stem.name), encoding="utf-8")
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
