"""Figures: arrays in, matplotlib figures out. Needs numpy and matplotlib only, no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.aggregate import locf, t_band
from benchmarks.palette import Look, look
from benchmarks.saving import style

WIDE, NARROW = (7.2, 3.9), (3.7, 3.4)
"""Figure sizes in inches: a page, and a telephone (the same font size, so that it stays readable)."""
_LABEL_PT = 8.5  # size of the names at the ends of lines
_CHARACTER_IN = 0.078  # about the width of one of their characters
_LINE_IN = 0.15  # and their height


@dataclass(frozen=True, eq=False)
class Line:
    """One algorithm's runs: each a pair of arrays (x [N], y [N]).

    `failed`: which of the runs broke off, marked by a cross at their last value. `look`: None for the name's own.
    """

    algo: str
    runs: Sequence[tuple[np.ndarray, np.ndarray]]
    failed: Sequence[bool] = ()
    look: Look | None = None

    @property
    def style(self) -> Look:
        return self.look or look(self.algo)


def new_figure(
    size: tuple[float, float], *, left: float = 0.7, right: float = 0.15, top: float = 0.12, bottom: float = 0.55
) -> tuple[Figure, Axes]:
    """A figure on the Agg canvas, outside of pyplot, which would keep it open and choose a window system.

    Margins are in inches and fixed: fitting them to the text would draw everything twice.
    """
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    figure.subplots_adjust(
        left=left / size[0], right=1 - right / size[0], bottom=bottom / size[1], top=1 - top / size[1]
    )
    return figure, axis


def colour(algo: str) -> str:
    """The algorithm's fixed colour; an algorithm of your own gets one by its name, the same in every figure."""
    return look(algo).colour


def centre_and_band(line: Line) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Grid, mean, low and high over a line's runs, up to the end of the shortest run.

    The grid is every evaluation of every run: between two of them nothing changes, as the last one is carried forward.
    """
    last = min(x[-1] for x, _ in line.runs)
    first = max(x[0] for x, _ in line.runs)
    own = np.unique(np.concatenate([x for x, _ in line.runs]))
    # Runs that do not overlap have no common cost: then there is no mean to draw.
    grid = own[(own >= first) & (own <= last)]
    return grid, *t_band([locf(x, y, grid) for x, y in line.runs])


def wrapped(name: str, size: tuple[float, float]) -> str:
    """A name in lines short enough for a figure of this width."""
    return "\n".join(textwrap.wrap(name, 14 if size[0] < WIDE[0] else 26)) or name


def _with_room(lines: Sequence[Line], size: tuple[float, float], more: int = 0) -> tuple[tuple[float, float], float]:
    """The size with enough height for all names and `more` lines, and the right margin that the longest name needs."""
    names = [part for line in lines for part in wrapped(line.algo, size).split("\n")]
    height = max(size[1], _LINE_IN * (len(names) + more) + 0.8)
    return (size[0], height), 0.25 + _CHARACTER_IN * max(map(len, names), default=0)


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

    Dots are evaluations. Between two of them the line stays where it is: nothing is measured there. Where an algorithm
    ends so far below the untrained model that the others could not be told apart, the axis stops above it, and an arrow
    with its last value stands by its name.
    """
    nothing: np.ndarray = np.array(())
    drawn = [
        (line, centre_and_band(line) if len(line.runs) > 1 else (*line.runs[0], nothing, nothing)) for line in lines
    ]
    ends = [end for line, (grid, centre, *_) in drawn for end in _last_finite(line, grid, centre)]
    bottom = _bottom(base, [y for _, _, y in ends])
    with style():
        # A name whose curve ends below the axis has its last value on a line of its own.
        size, right = _with_room(lines, size, sum(y < bottom for _, _, y in ends) if bottom is not None else 0)
        figure, axis = new_figure(size, right=right)
        for line, (grid, centre, low, high) in drawn:
            own, dash = line.style.colour, line.style.dash
            many = len(line.runs) > 1
            for x, y in line.runs:
                thin: dict[str, Any] = {"lw": 0.7, "alpha": 0.4, "ms": 2} if many else {"lw": 1.8, "alpha": 1, "ms": 4}
                axis.plot(x, y, color=own, ls="-" if many else dash, marker="o", drawstyle="steps-post", **thin)
            for x, y in _broken_off(line):
                axis.plot(x[-1:], y[-1:], color=own, marker="x", ms=7, mew=1.8, ls="", zorder=5)
            if many:
                axis.plot(grid, centre, color=own, lw=2, ls=dash, drawstyle="steps-post")
                if np.isfinite(low).any():
                    axis.fill_between(grid, low, high, color=own, alpha=0.12, lw=0, step="post")
        if base is not None:
            axis.axhline(base, color="0.35", ls="--", lw=1)
            rises = sum(y - base for _, _, y in ends) >= 0
            axis.annotate(
                "untrained model", (1, base), xycoords=("axes fraction", "data"), xytext=(-2, -3 if rises else 3),
                textcoords="offset points", color="0.35", fontsize=8.5, ha="right", va="top" if rises else "bottom",
                bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5},
            )  # fmt: skip
        axis.margins(x=0.02, y=0.12)
        if bottom is not None:
            axis.set_ylim(bottom=bottom)
        if log_x:
            _log_x(axis, lines, size)
        else:
            axis.locator_params(axis="x", nbins=7 if size[0] >= WIDE[0] else 3)
        axis.set(xlabel=x_label, ylabel=y_label)
        _label_ends(axis, ends, size, bottom)
    return figure


def plane(
    lines: Sequence[Line], *, x_label: str, y_label: str, log_x: bool = False, size: tuple[float, float] = WIDE
) -> Figure:
    """One measurement against another in the course of training; an open circle marks the start, a filled one the end.

    Of several runs each end is a small dot, and the way of their mean is drawn: run by run, evaluation by evaluation,
    so runs must have been evaluated equally often to have a mean.
    """
    with style():
        size, right = _with_room(lines, size)
        figure, axis = new_figure(size, right=right)
        ends = []
        for line in lines:
            own = line.style.colour
            several = len(line.runs) > 1 and len({len(x) for x, _ in line.runs}) == 1
            ways = [(np.mean(parts, 0)) for parts in zip(*line.runs, strict=True)] if several else []
            for x, y in line.runs if not several else [(ways[0], ways[1])]:
                axis.plot(x, y, color=own, lw=1.4, ls=line.style.dash, marker=".", ms=4)
                axis.plot(x[:1], y[:1], color=own, marker="o", ms=7, mfc="white", ls="")
                axis.plot(x[-1:], y[-1:], color=own, marker="o", ms=7, ls="")
            for x, y in line.runs if several else ():
                axis.plot(x[-1:], y[-1:], color=own, marker="o", ms=3, alpha=0.6, ls="")
            x, y = (ways[0], ways[1]) if several else line.runs[0]
            ends += _last_finite(line, x, y)
        axis.margins(x=0.05, y=0.08)
        if log_x:
            _log_x(axis, lines, size)
        else:
            axis.locator_params(axis="x", nbins=7 if size[0] >= WIDE[0] else 4)
        axis.set(xlabel=x_label, ylabel=y_label)
        _label_ends(axis, ends, size)
    return figure


def _log_x(axis: Axes, lines: Sequence[Line], size: tuple[float, float]) -> None:
    """A logarithmic x axis with a 0 at its left: what nothing was spent on yet is there, a plain one would lose it."""
    positive = [float(value) for line in lines for x, _ in line.runs for value in x if value > 0]
    low, high = min(positive, default=1.0), max(positive, default=1.0)
    if high < 10 * low:  # less than a decade: the way from 0 to it would be most of the axis
        return
    axis.set_xscale("symlog", linthresh=low, linscale=0.5)
    axis.set_xlim(0, high * 1.2)
    # A few decades with names, none of them so near the 0 that the two would overlap.
    decades = [exponent for exponent in range(-12, 19) if low * 2 <= 10.0**exponent <= high * 1.1]
    step = -(-len(decades) // (6 if size[0] >= WIDE[0] else 2)) or 1
    ticks = [0.0, *(10.0**exponent for exponent in decades[::-1][::step][::-1])]
    if not decades:
        ticks = [0.0, high]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: _short(value))  # plain numbers: 10^2 is drawn very slowly


def _short(value: float) -> str:
    """1000 as 1,000, 1000000 as 1e6, 0.05 as it is."""
    if value >= 1e5:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _broken_off(line: Line) -> list[tuple[np.ndarray, np.ndarray]]:
    return [run for run, failed in zip(line.runs, line.failed, strict=True) if failed] if line.failed else []


def _bottom(base: float | None, ends: Sequence[float]) -> float | None:
    """Where the y axis is to stop, because an end below it would press the others together; None where none would.

    Half of the best gain is left below the untrained model; an end may lie as deep as the best gain is high.
    """
    gain = max(ends, default=0.0) - base if base is not None else 0.0
    if base is None or gain <= 0 or min(ends) >= base - gain:
        return None
    return base - 0.5 * gain


def _last_finite(line: Line, x: np.ndarray, y: np.ndarray) -> list[tuple[Line, float, float]]:
    """Where the line's name belongs: at its last finite point, else at the end of its first run."""
    for xs, ys in ((x, y), *line.runs):
        known = np.flatnonzero(np.isfinite(ys))
        if len(known):
            return [(line, float(xs[known[-1]]), float(ys[known[-1]]))]
    return []


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Centres of boxes that do not overlap, in the given order from below, each as near to where it belongs as can be.

    Args:
        wanted: where each box's centre belongs, not decreasing.
        heights: of the boxes; their sum must fit between `low` and `high`.
        low: lower end of the room.
        high: upper end of the room.
    """
    groups: list[tuple[list[int], float]] = []  # boxes that touch, and the bottom of the lowest
    for index in range(len(wanted)):
        members, bottom = [index], wanted[index] - heights[index] / 2
        while True:
            size = sum(heights[i] for i in members)
            bottom = min(max(bottom, low), high - size)
            if not groups or groups[-1][1] + sum(heights[i] for i in groups[-1][0]) <= bottom + 1e-9:
                break
            members = groups.pop()[0] + members
            offsets = np.cumsum([0.0, *(heights[i] for i in members[:-1])])
            bottom = float(np.mean([wanted[i] - heights[i] / 2 - o for i, o in zip(members, offsets, strict=True)]))
        groups.append((members, bottom))
    placed = []
    for members, bottom in groups:
        for index in members:
            placed.append(bottom + heights[index] / 2)
            bottom += heights[index]
    return placed


def _label_ends(
    axis: Axes, ends: Sequence[tuple[Line, float, float]], size: tuple[float, float], bottom: float | None = None
) -> None:
    """Writes each algorithm's name beside the axes, with a thin line to the end of its curve; no two overlap.

    A curve that ends below `bottom` has its last value beside its name.
    """
    axis.get_xlim(), axis.get_ylim()  # settles the limits, which text is placed by
    box = axis.get_window_extent()
    dpi = axis.figure.dpi
    known = sorted(ends, key=lambda end: axis.transData.transform((end[1], end[2]))[1])
    below = [bottom is not None and y < bottom for _, _, y in known]
    texts = [
        wrapped(line.algo, size) + (f"\n\N{DOWNWARDS ARROW} {y:.2g}" if under else "")
        for (line, _, y), under in zip(known, below, strict=True)
    ]
    known = [
        (line, x, bottom if under and bottom is not None else y)
        for (line, x, y), under in zip(known, below, strict=True)
    ]
    heights = [(text.count("\n") + 1) * _LINE_IN * dpi for text in texts]
    wanted = [float(axis.transData.transform((x, y))[1] - box.y0) for _, x, y in known]
    for (line, x, y), text, place in zip(
        known, texts, spread(wanted, heights, -0.35 * dpi, box.height + 0.1 * dpi), strict=True
    ):
        axis.annotate(
            text, (x, y), xytext=(1 + 0.14 * dpi / box.width, place / box.height), textcoords="axes fraction",
            color=line.style.colour, fontsize=_LABEL_PT, fontweight="bold", va="center", annotation_clip=False,
            linespacing=1.0,
            arrowprops={"arrowstyle": "-", "color": line.style.colour, "lw": 0.6, "alpha": 0.6,
                        "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)},
        )  # fmt: skip
