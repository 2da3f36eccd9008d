"""Figures of a report: colours, names that do not overlap, and curves that never know the future."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.text import Text

from algos.zoo import ZOO
from benchmarks import charts, plots
from benchmarks.aggregate import Reached
from benchmarks.palette import ZOO_LOOKS, looks
from benchmarks.plots import Line, centre_and_band, spread


def test_every_algorithm_of_the_zoo_has_a_look_of_its_own() -> None:
    assert set(ZOO_LOOKS) == set(ZOO)
    assert len({(look.colour, str(look.dash)) for look in ZOO_LOOKS.values()}) == len(ZOO) == 16
    labels = [*ZOO, *(f"vader K={k}" for k in range(16))]
    many = looks(labels)
    assert {name: many[name] for name in ZOO} == ZOO_LOOKS
    assert len({(look.colour, str(look.dash)) for look in many.values()}) == 32
    assert looks(reversed(labels)) == many


def test_every_algorithm_has_one_colour_and_its_band_only_from_three_runs() -> None:
    assert plots.colour("vader") != plots.colour("ddpo")
    assert plots.colour("mine") == plots.colour("mine")
    x = np.array([0.0, 1.0, 2.0])
    few, many = (
        plots.curves([Line("vader", [(x, x + s) for s in range(n)])], x_label="x", y_label="y") for n in (2, 3)
    )
    assert (len(few.axes[0].collections), len(many.axes[0].collections)) == (0, 1)
    assert {text.get_text() for text in many.axes[0].texts} == {"vader"}


@pytest.mark.parametrize("size", [plots.WIDE, plots.NARROW])
@pytest.mark.parametrize("kind", ["curves", "plane"])
def test_sixteen_names_do_not_overlap_and_stay_inside(size: tuple[float, float], kind: str) -> None:
    x = np.array([0.0, 1.0])
    lines = [Line(name, [(x, 0.3 + x * 0.001 * i)]) for i, name in enumerate([*list(ZOO)[:14], "a", "b " * 15])]
    figure = getattr(plots, kind)(lines, x_label="x", y_label="y", size=size)
    figure.draw_without_rendering()
    names = {plots.wrapped(line.algo, size) for line in lines}
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text() in names]
    assert len(boxes) == 16
    assert not any(a.overlaps(b) for a, b in itertools.combinations([box.padded(-1) for box in boxes], 2))
    width, height = figure.bbox.width, figure.bbox.height
    assert all(0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height for box in boxes)


def test_boxes_are_spread_no_further_than_they_must() -> None:
    assert spread([1, 5], [2, 2], 0, 10) == [1, 5]
    assert spread([5, 5], [2, 2], 0, 10) == [4, 6]
    assert spread([0, 0, 9], [2, 2, 2], 0, 10) == [1, 3, 9]
    assert spread([10, 10, 10], [2, 2, 2], 0, 10) == [5, 7, 9]
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 12))
        heights = rng.uniform(0.2, 0.8, count)
        placed = np.array(spread(np.sort(rng.uniform(0, 10, count)).tolist(), heights.tolist(), 0, 10))
        assert (np.diff(placed) >= (heights[:-1] + heights[1:]) / 2 - 1e-9).all()
        assert placed[0] >= heights[0] / 2 - 1e-9 and placed[-1] <= 10 - heights[-1] / 2 + 1e-9


def test_a_band_is_the_carried_forward_mean_and_never_beyond_the_shortest_run() -> None:
    line = Line(
        "vader", [(np.array([0.0, 1, 3]), np.array([1.0, 2, 5])), (np.array([0.0, 2, 2.5]), np.array([1.0, 4, 9]))]
    )
    grid, centre, low, _ = centre_and_band(line)
    np.testing.assert_array_equal(grid, [0, 1, 2, 2.5])
    np.testing.assert_array_equal(centre, [1, 1.5, 3, 5.5])
    assert np.isnan(low).all()


def test_changing_the_future_never_changes_the_past() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        runs = [(np.sort(np.append(0.0, rng.uniform(0, 10, 6))), rng.normal(size=7)) for _ in range(4)]
        cut = rng.uniform(1, 9)
        other = [(x, np.where(x > cut, 1000.0, y)) for x, y in runs]
        (grid, *before), (same, *after) = centre_and_band(Line("a", runs)), centre_and_band(Line("a", other))
        np.testing.assert_array_equal(grid, same)
        for one, two in zip(before, after, strict=True):
            np.testing.assert_array_equal(one[grid <= cut], two[grid <= cut])


def test_a_figure_of_times_marks_what_is_censored() -> None:
    rows = [charts.Dots(Line("vader", []), [Reached(1.0, False), Reached(2.0, True)], None)]
    drawn = charts.dots(rows, x_label="hours").axes[0].lines
    assert [line.get_marker() for line in drawn] == ["o", ">"]


@pytest.mark.parametrize("size", [plots.WIDE, plots.NARROW])
def test_a_collapsed_run_leaves_the_others_apart_and_says_where_it_ended(size: tuple[float, float]) -> None:
    x = np.array([0.0, 1.0])
    fine = {f"fine {i}": 0.5 + 0.01 * (i + 1) for i in range(12)}
    ends = {**fine, "collapsed": 0.2, "also collapsed, with a long name": 0.1}
    lines = [Line(name, [(x, np.array([0.5, end]))]) for name, end in ends.items()]
    figure = plots.curves(lines, x_label="x", y_label="y", base=0.5, size=size)
    figure.draw_without_rendering()
    axis = figure.axes[0]
    assert axis.get_ylim()[0] == pytest.approx(0.5 - 0.5 * 0.12)  # half of the best gain below the untrained model
    named = [text for text in axis.texts if text.get_text() != "untrained model"]
    assert [text.get_text() for text in named if "\N{DOWNWARDS ARROW}" in text.get_text()] == [
        plots.wrapped("also collapsed, with a long name", size) + "\n\N{DOWNWARDS ARROW} 0.1",
        "collapsed\n\N{DOWNWARDS ARROW} 0.2",
    ]
    boxes = [Text.get_window_extent(text) for text in named]  # without their arrows
    assert not any(a.overlaps(b) for a, b in itertools.combinations([box.padded(-1) for box in boxes], 2))
    assert all(box.y0 >= 0 and box.y1 <= figure.bbox.height for box in boxes)


@pytest.mark.parametrize("worst", [0.41, 0.6])
def test_the_axis_shows_all_where_nothing_collapsed(worst: float) -> None:
    x = np.array([0.0, 1.0])
    lines = [Line(name, [(x, np.array([0.5, end]))]) for name, end in {"a": 0.6, "b": worst}.items()]
    axis = plots.curves(lines, x_label="x", y_label="y", base=0.5).axes[0]
    assert axis.get_ylim()[0] < worst and not any("\N{DOWNWARDS ARROW}" in text.get_text() for text in axis.texts)
