"""Where time and memory went, when a level was reached, and what the videos look like on the way. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from benchmarks import charts
from benchmarks.charts import Dots, Frames
from benchmarks.figures import Plate, Size, View
from benchmarks.plots import Line
from benchmarks.records import Run
from benchmarks.summary import update_at
from benchmarks.thresholds import centre, times

MILESTONES = 4  # columns of frames after the untrained model
_STRIPS = 2  # prompts shown as frames
Kept = tuple[np.ndarray, list[tuple[int, int]], list[str]]


def bar_plates(view: View) -> Iterator[Plate]:
    """Seconds per update by phase, peak memory, and the time to the threshold."""
    yield _phases(view)
    memory = _memory(view)
    if memory:
        yield Plate(
            "peak_memory", "Peak memory", "The largest use of memory in training, of any seed. "
            + ("Of the graphics card, without evaluations." if view.runs[0].about.get("gpu_name") else
               "Of the process, in main memory, with set-up and evaluations."),
            lambda size: charts.bars(memory, x_label="GiB", size=size),
            ["algorithm", "memory", "peak_gib"],
            [[algo, part, value] for algo, parts in memory.items() for part, value in parts.items()],
        )  # fmt: skip
    if view.threshold is not None:
        yield _threshold(view)


def _phases(view: View) -> Plate:
    costs: dict[str, dict[str, float]] = {}
    for algo, group in view.groups.items():
        last = [run.train[-1] for run in group if run.train]
        split = all(row.get("rollout_s") is not None for row in last)
        for phase in ("rollout", "decode", "reward", "update") if last else ():
            values = [(row.get(f"{phase}_s") or 0.0) / row["update"] for row in last if row["update"]]
            name = phase if split or phase != "update" else "rollout and update"
            if values and (split or phase != "rollout"):
                costs.setdefault(algo, {})[name] = float(np.mean(values))
    return Plate(
        "seconds_per_update", "Seconds per update",
        "Where the time of an update goes, in seconds by the clock; evaluation is not part of it.",
        lambda size: charts.bars(costs, x_label="seconds per update", size=size),
        ["algorithm", "phase", "seconds_per_update"],
        [[algo, phase, value] for algo, parts in costs.items() for phase, value in parts.items()],
    )  # fmt: skip


def peak_gib(runs: Sequence[Run]) -> float | None:
    """The largest memory any of the runs held: in training of the graphics card, where there is none of the process."""
    name = "peak_allocated_gib" if runs[0].about.get("gpu_name") else "peak_rss_gib"
    found = [row[name] for run in runs for row in run.train if row.get(name) is not None]
    return max(found, default=None)


def _memory(view: View) -> dict[str, dict[str, float]]:
    peaks = {algo: peak_gib(group) for algo, group in view.groups.items()}
    return {algo: {"peak": value} for algo, value in peaks.items() if value is not None}


def _threshold(view: View) -> Plate:
    assert view.threshold is not None
    rows, numbers = [], []
    for algo, group in view.groups.items():
        reached = times(group, view.threshold, scale=1 / 3600)
        rows.append(Dots(Line(algo, [], look=view.looks[algo]), reached, centre(reached)))
        numbers += [
            [algo, run.seed, view.threshold.value, one.x, one.censored]
            for run, one in zip(group, reached, strict=True)
        ]  # fmt: skip
    text = (
        f"{view.device}-hours until the reward first reached {view.threshold.rule}. Small dots are seeds, large ones "
        "means with 95 % t-intervals; an open triangle is a seed that had not reached it when it ended, and where "
        "there is one no mean is given."
    )
    label = f"{view.device}-hours to reward {view.threshold.value:.3g}"
    return Plate(
        "hours_to_threshold", "Time to a threshold", text, lambda size: charts.dots(rows, x_label=label, size=size),
        ["algorithm", "seed", "threshold", "hours", "censored"], numbers,
    )  # fmt: skip


def _first_with_samples(group: Sequence[Run]) -> Run | None:
    return next((run for run in group if run.samples(0) is not None), None)


def frame_plates(view: View) -> Iterator[Plate]:
    """For some prompts: one row per algorithm, one column per milestone of cost, all from the same noise."""
    before = next((kept for run in view.runs if (kept := run.samples(0)) is not None), None)
    cost = max((summary.cost for summary in view.summaries), default=0.0)
    if before is None or cost <= 0:
        return
    costs = [cost * part / MILESTONES for part in range(MILESTONES + 1)]
    chosen = {algo: run for algo, group in view.groups.items() if (run := _first_with_samples(group))}
    at = {algo: [*(_before(run, value) for value in costs[:-1]), update_at(run, cost)] for algo, run in chosen.items()}
    samples = {algo: {u: chosen[algo].samples(u) for u in set(updates)} for algo, updates in at.items()}
    for index in _prompts_to_show(before[2]):
        pair, prompt = before[1][index], before[2][index]
        rows, numbers = [], []
        for algo, updates in at.items():
            videos = [_video(samples[algo][update], pair) for update in updates]
            rows.append(Frames(algo, videos))
            for milestone, update in zip(costs, updates, strict=True):
                spent = chosen[algo].cost(update)
                numbers.append([algo, chosen[algo].seed, pair[0], pair[1], milestone / 3600, update, spent])
        text = (
            f'"{prompt}", the same noise everywhere, from the untrained model (0) on; each cell is the last evaluation '
            "that had cost no more than the "
            f"column's {view.device}-hours, of one seed; the last column is where algorithms are compared."
        )
        columns = [f"{value / 3600:.2g}" for value in costs]
        yield Plate(
            f"frames_{index}", f"Frames: {prompt}", text, partial(_frames, rows, columns),
            ["algorithm", "seed", "prompt_id", "noise_seed", "hours", "update", "device_s"], numbers,
        )  # fmt: skip


def _frames(rows: Sequence[Frames], columns: Sequence[str], size: Size) -> Figure:
    return charts.frames(rows, columns, size=size)


def _prompts_to_show(prompts: Sequence[str]) -> range:
    return range(min(len(prompts), _STRIPS))


def _before(run: Run, cost: float) -> int:
    """The last evaluation that had cost no more than this."""
    return max(update for update in run.updates() if update == run.updates()[0] or (run.cost(update) or 0.0) <= cost)


def _video(kept: Kept | None, pair: tuple[int, int]) -> np.ndarray | None:
    """The video of a (prompt, noise seed) pair, if it was kept."""
    return kept[0][kept[1].index(pair)] if kept is not None and pair in kept[1] else None
