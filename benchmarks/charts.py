"""Figures that are no curves: bars, dots with intervals, small multiples and frames. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.aggregate import Interval, Reached
from benchmarks.plots import NARROW, WIDE, Line, centre_and_band, new_figure, wrapped
from benchmarks.saving import style

_GAP = ((0, 0), (1, 1), (1, 1), (0, 0))  # a white pixel around every frame
_SHADES = ("#3D3D3D", "#6E6E6E", "#9A9A9A", "#C4C4C4", "#E2E2E2")


def _names(labels: Sequence[str], size: tuple[float, float]) -> tuple[list[str], float, float]:
    """Labels in lines, the left margin in inches that they need, and the height of one row."""
    lines = [wrapped(label, size) for label in labels]
    parts = [part for line in lines for part in line.split("\n")]
    rows = max((line.count("\n") + 1 for line in lines), default=1)
    return lines, 0.3 + 0.075 * max(map(len, parts), default=0), max(0.3, 0.17 * rows + 0.08)


def bars(costs: Mapping[str, Mapping[str, float]], *, x_label: str, size: tuple[float, float] = WIDE) -> Figure:
    """Stacked horizontal bars, {algorithm: {part: amount}}; a legend where there is more than one part."""
    labels, left, row = _names(list(costs), size)
    names = list(dict.fromkeys(part for parts in costs.values() for part in parts))
    per_line = len(names) if size[0] >= WIDE[0] else 2
    top = 0.15 + (0.22 * -(-len(names) // per_line) if len(names) > 1 else 0)
    with style():
        figure, axis = new_figure((size[0], 0.6 + top + row * len(costs)), left=left, top=top)
        at, start = np.arange(len(costs)), np.zeros(len(costs))
        for index, part in enumerate(names):
            widths = np.array([parts.get(part, 0.0) for parts in costs.values()])
            axis.barh(at, widths, left=start, color=_SHADES[index % len(_SHADES)], label=part, height=0.65)
            start += widths
        axis.set_yticks(at, labels, fontsize=8.5)
        axis.grid(axis="y", visible=False)
        axis.set_ylim(len(costs) - 0.5, -0.5)
        axis.set_xlabel(x_label)
        axis.locator_params(axis="x", nbins=6 if size[0] >= WIDE[0] else 4)
        if len(names) > 1:
            place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0}
            axis.legend(ncols=per_line, frameon=False, fontsize=8.5, **place)
    return figure


@dataclass(frozen=True, eq=False)
class Dots:
    """One row of a dot plot: the values of single runs, and their centre where there is one."""

    line: Line
    values: Sequence[Reached]
    centre: Interval | None


def dots(rows: Sequence[Dots], *, x_label: str, size: tuple[float, float] = WIDE) -> Figure:
    """Small dots for runs, a large one with its interval for their mean; an open triangle says "later than this"."""
    labels, left, row = _names([one.line.algo for one in rows], size)
    with style():
        figure, axis = new_figure((size[0], 0.75 + row * len(rows)), left=left)
        for at, one in enumerate(rows):
            own = one.line.style.colour
            for value in one.values:
                look: dict[str, Any] = {"marker": "o", "ms": 3.5}
                if value.censored:
                    look = {"marker": ">", "mfc": "white", "ms": 6}
                axis.plot([value.x], [at], color=own, ls="", alpha=0.7, zorder=3, **look)
            if one.centre is not None and np.isfinite(one.centre.centre):
                axis.plot([one.centre.centre], [at], color=own, marker="o", ms=8, ls="", zorder=4)
                if np.isfinite(one.centre.low):
                    axis.hlines(at, one.centre.low, one.centre.high, color=own, lw=2)
        axis.set_yticks(range(len(rows)), labels, fontsize=8.5)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlabel(x_label)
        axis.locator_params(axis="x", nbins=6 if size[0] >= WIDE[0] else 4)
    return figure


def multiples(
    panels: Mapping[str, Sequence[Line]], *, x_label: str, base: Mapping[str, float], size: tuple[float, float] = WIDE
) -> Figure:
    """One small panel of curves for each name, with one legend for all below."""
    columns = min(len(panels), 3 if size[0] >= WIDE[0] else 1)
    rows = -(-len(panels) // columns)
    lines = {line.algo: line for drawn in panels.values() for line in drawn}
    texts = [wrapped(name, (size[0] / 2, size[1])).replace("\n", " ") for name in lines]
    width = 0.55 + 0.075 * max(map(len, texts), default=0)
    across = max(1, int((size[0] - 0.2) / width))
    legend = 0.165 * -(-len(texts) // across) + 0.1
    height = 0.6 + legend + 2.3 * rows
    with style():
        figure, first = new_figure((size[0], height))
        first.remove()
        axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
        figure.subplots_adjust(
            left=0.6 / size[0], right=1 - 0.15 / size[0], bottom=(0.5 + legend) / height, top=1 - 0.3 / height,
            wspace=0.32, hspace=0.35,
        )  # fmt: skip
        for axis, (name, drawn) in zip(axes, panels.items(), strict=False):
            for line in drawn:
                _small(axis, line)
            axis.axhline(base[name], color="0.35", ls="--", lw=0.8)
            axis.set_title(name, loc="left", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.locator_params(axis="x", nbins=4)
        for axis in axes[len(panels) :]:
            axis.remove()
        figure.supxlabel(x_label, fontsize=10, y=(legend + 0.08) / height, va="bottom")
        marks = [Line2D([], [], color=line.style.colour, ls=line.style.dash, lw=2) for line in lines.values()]
        figure.legend(
            marks, texts, loc="lower left", ncols=across, frameon=False, fontsize=8.5, handlelength=1.6,
            columnspacing=1.0, labelspacing=0.3, borderaxespad=0.2,
        )  # fmt: skip
    return figure


def _small(axis: Axes, line: Line) -> None:
    own = line.style.colour
    for x, y in line.runs:
        axis.plot(x, y, color=own, lw=0.5, alpha=0.35, drawstyle="steps-post")
    grid, centre, low, high = centre_and_band(line)
    axis.plot(grid, centre, color=own, lw=1.6, ls=line.style.dash, drawstyle="steps-post")
    if np.isfinite(low).any():
        axis.fill_between(grid, low, high, color=own, alpha=0.1, lw=0, step="post")


@dataclass(frozen=True, eq=False)
class Frames:
    """One row of a table of frames: a label, and for each column a uint8 video [F, H, W, 3], or None."""

    label: str
    videos: Sequence[np.ndarray | None]


def frames(rows: Sequence[Frames], columns: Sequence[str], *, size: tuple[float, float] = WIDE) -> Figure:
    """Videos as frames: first, middle and last one in a wide figure, the middle one in a narrow one."""
    example = next(video for row in rows for video in row.videos if video is not None)
    # Frames larger than what a page can show would only make the file large.
    step = max(1, example.shape[2] // 96)
    shown = 3 if size[0] > NARROW[0] else 1
    pictures = [
        np.concatenate([_cell(video, example.shape, step, shown) for video in row.videos], 1) for row in rows
    ]  # fmt: skip
    picture = np.concatenate(pictures)
    labels, left, _ = _names([row.label for row in rows], size)
    with style():
        width = size[0] - left - 0.1
        figure, axis = new_figure(
            (size[0], width * picture.shape[0] / picture.shape[1] + 0.35), left=left, right=0.1, top=0.3, bottom=0.05
        )
        axis.imshow(picture, interpolation="none", aspect="auto")
        height, across = picture.shape[0] / len(rows), picture.shape[1] / len(columns)
        axis.set_yticks(height * (np.arange(len(rows)) + 0.5) - 0.5, labels, fontsize=8)
        axis.set_xticks(across * (np.arange(len(columns)) + 0.5) - 0.5, columns, fontsize=8)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    return figure


def _cell(video: np.ndarray | None, shape: Sequence[int], step: int, shown: int) -> np.ndarray:
    """Some frames of a video side by side with a gap behind them; white where there is no video."""
    if video is None:
        video = np.full(shape, 255, np.uint8)
    at = np.linspace(0, len(video) - 1, shown).round().astype(int) if shown > 1 else [len(video) // 2]
    small = np.pad(video[at][:, ::step, ::step], _GAP, constant_values=255)
    return np.pad(np.concatenate(list(small), 1), ((1, 1), (0, 3), (0, 0)), constant_values=255)
