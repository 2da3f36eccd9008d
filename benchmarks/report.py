"""A report from run folders: report.html (one file, works offline), report.md, figures as SVG, PNG and CSV.

    python -m benchmarks.report runs/demo

Needs no torch and starts no training: everything comes from the files the runs wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks import page, plots
from benchmarks.clips import data_uri
from benchmarks.conditions import device_name, limits, reward_name, setup
from benchmarks.plots import Line
from benchmarks.records import GOLD, PROXY, Run, by_algorithm, check_comparable, read_runs
from benchmarks.summary import Summary, answer, explain_unit, show, show_interval, summarise

_QUESTION = "Which algorithm raises the reward most for the same computing time?"
_MAX_CLIPS = 6  # prompts shown as playing videos
_MAX_STRIPS = 3  # prompts shown as frames in report.md


@dataclass(frozen=True, eq=False)
class Plate:
    """One figure of the report; `draw` makes it at a size, `header` and `rows` are the numbers behind it."""

    name: str
    title: str
    text: str
    draw: Callable[[tuple[float, float]], Figure]
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


def _lines(runs: Sequence[Run], reward: str, x: str, scale: float = 1.0) -> list[Line]:
    found = []
    for algo, group in by_algorithm(runs).items():
        drawn = [(cost * scale, value) for cost, value in (run.curve(reward, x) for run in group) if len(cost)]
        if drawn:
            found.append(Line(algo, drawn))
    return found


def _csv(runs: Sequence[Run], rewards: Sequence[str]) -> list[list[object]]:
    """One row per run and evaluation: algorithm, seed, costs, mean of each reward."""
    rows: list[list[object]] = []
    for run in runs:
        device, _ = run.curve(PROXY)
        queries, _ = run.curve(PROXY, "reward_queries")
        values = [run.curve(reward)[1] for reward in rewards]
        for index, update in enumerate(run.updates()):
            rows.append([run.algo, run.seed, update, device[index], queries[index], *(v[index] for v in values)])
    return rows


def plates(runs: Sequence[Run]) -> list[Plate]:
    """The figures these runs allow: the gold score's only where the world has one."""
    reward, device = reward_name(runs[0]), device_name(runs[0])
    rewards = [name for name in (PROXY, GOLD) if name in runs[0].rewards()]
    header = ["algorithm", "seed", "update", "device_s", "reward_queries", *rewards]
    rows = _csv(runs, rewards)
    base = float(np.nanmean([run.curve(PROXY)[1][0] for run in runs]))
    shortest = max(run.device_s() for run in runs)
    hours = f"{device}-hours of training" + (" (0.01 h = 36 s)" if shortest < 1800 else "")
    spread = (
        "Mean and 95 % t-band over seeds." if _seeds(runs) >= 3 else f"n = {_seeds(runs)} per algorithm, no interval."
    )
    found = [
        Plate(
            "reward_vs_hours", f"Reward against {device}-hours",
            f"{reward} on fixed test prompts and noise, {device}-hours of rollout, reward and update. {spread}",
            lambda size: plots.curves(_lines(runs, PROXY, "device_s", 1 / 3600), x_label=hours, y_label="reward",
                                      base=base, size=size),
            header, rows,
        ),
        Plate(
            "reward_vs_queries", "Reward against reward queries",
            "The same evaluations over the number of videos the reward model has scored in training.",
            lambda size: plots.curves(_lines(runs, PROXY, "reward_queries"), x_label="reward queries", y_label="reward",
                                      base=base, log_x=True, size=size),
            header, rows,
        ),
    ]  # fmt: skip
    if GOLD in rewards:
        found.append(_gold_plate(runs, header, rows))
    found.append(_phase_plate(runs))
    return [plate for plate in found if plate.rows]


def _gold_plate(runs: Sequence[Run], header: Sequence[str], rows: Sequence[Sequence[object]]) -> Plate:
    def draw(size: tuple[float, float]) -> Figure:
        lines = [
            Line(algo, [(run.curve(PROXY)[1], run.curve(GOLD)[1]) for run in group])
            for algo, group in by_algorithm(runs).items()
        ]
        return plots.plane(lines, x_label="reward (optimised)", y_label="gold score (never optimised)", size=size)

    text = (
        "The optimised reward against what is truly wanted, from the untrained model (open circle) to the end "
        "(filled). To the right and down is over-optimisation."
    )
    return Plate("gold_vs_proxy", "Gold score against reward", text, draw, header, rows)


def _phase_plate(runs: Sequence[Run]) -> Plate:
    costs: dict[str, dict[str, float]] = {}
    for algo, group in by_algorithm(runs).items():
        last = [run.train[-1] for run in group if run.train]
        for phase in ("rollout", "decode", "reward", "update") if last else ():
            values = [(row[f"{phase}_s"] or 0.0) / row["update"] for row in last]
            split = all(row["rollout_s"] is not None for row in last)
            name = phase if split or phase != "update" else "rollout and update"
            if split or phase != "rollout":
                costs.setdefault(algo, {})[name] = float(np.mean(values))
    rows = [[algo, phase, value] for algo, parts in costs.items() for phase, value in parts.items()]
    text = "Where the time of an update goes; evaluation is not part of it."
    return Plate(
        "seconds_per_update", "Seconds per update", text, lambda size: plots.phases(costs, size=size),
        ["algorithm", "phase", "seconds_per_update"], rows,
    )  # fmt: skip


def _seeds(runs: Sequence[Run]) -> int:
    return min(len(group) for group in by_algorithm(runs).values())


def table(summaries: Sequence[Summary], device: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the results table: a column for each algorithm."""
    rows = [
        ["seeds", *(str(len(s.runs)) for s in summaries)],
        ["ended", *(s.status for s in summaries)],
        [f"{device}-hours per run", *(f"{s.device_s / 3600:.4f}" for s in summaries)],
        ["updates", *(f"{s.costs['update']:.0f}" for s in summaries)],
        ["compared after update", *(_range(s.at) for s in summaries)],
        ["videos sampled", *(f"{s.costs['videos_sampled']:,.0f}" for s in summaries)],
        ["reward queries", *(f"{s.costs['reward_queries']:,.0f}" for s in summaries)],
        ["denoiser forward passes", *(f"{s.costs['denoiser_forwards']:,.0f}" for s in summaries)],
        ["denoiser backward passes", *(f"{s.costs['denoiser_backwards']:,.0f}" for s in summaries)],
    ]
    for name, word in ((PROXY, "reward"), (GOLD, "gold score")):
        changes = [s.changes.get(name) for s in summaries]
        trained = [change if max(s.at) > 0 else None for s, change in zip(summaries, changes, strict=True)]
        if any(changes):
            rows += [
                [f"{word}, before", *(show(c.before) if c else "-" for c in changes)],
                [f"{word}, after", *(show(c.after) if c else "-" for c in trained)],
                [f"{word}, change", *(show_interval(c.difference, c.unit) if c else "-" for c in trained)],
            ]
    return ["", *(s.algo for s in summaries)], rows


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def clips(runs: Sequence[Run], summaries: Sequence[Summary]) -> tuple[list[str], list[tuple[str, list[np.ndarray]]]]:
    """Columns and rows of the video table: each prompt before training and after it, from the same noise."""
    before = next((kept for run in runs if (kept := run.samples(0)) is not None), None)
    if before is None:
        return [], []
    videos, pairs, prompts = before
    columns, sources = ["before"], [videos]
    for summary in summaries:
        kept = summary.runs[0].samples(summary.at[0])
        # Another pair of prompt and noise would compare two different videos.
        if kept is not None and kept[1] == pairs and summary.at[0] > 0:
            columns.append(f"after {summary.algo}")
            sources.append(kept[0])
    chosen = range(min(len(videos), _MAX_CLIPS))
    return columns, [(prompts[i], [source[i] for source in sources]) for i in chosen]


def write_report(root: str | Path) -> Path:
    """Writes report.html, report.md and figures/ into a folder of runs.

    Args:
        root: folder with runs of one kind, such as runs/demo.

    Returns:
        The path of report.html.

    Raises:
        ValueError: no runs there, or runs that cannot be compared.
    """
    root = Path(root)
    runs = read_runs(root)
    check_comparable(runs)
    summaries = summarise(runs)
    figures = [_figure(plate, root / "figures") for plate in plates(runs)]
    columns, rows = clips(runs, summaries)
    if rows:
        shown = [
            (f"{prompt}\n{name}", video)
            for prompt, row in rows[:_MAX_STRIPS]
            for name, video in zip(columns, row, strict=True)
        ]
        plots.save_png(plots.strip(shown), root / "figures" / "videos.png")
    content = page.Content(
        title=f"{reward_name(runs[0])}: {', '.join(s.algo for s in summaries)}",
        question=str(runs[0].task.get("question", _QUESTION)),
        answer=answer(summaries, reward_name(runs[0])),
        figures=figures,
        table=table(summaries, device_name(runs[0])),
        table_note=_table_note(summaries),
        clip_columns=columns,
        clips=[(prompt, [data_uri(video) for video in row]) for prompt, row in rows],
        setup=setup(runs),
        limits=limits(runs, summaries),
        commands=[*dict.fromkeys(str(run.task["command"]) for run in runs if "command" in run.task),
                  f"python -m benchmarks.report {root.as_posix()}"],
    )  # fmt: skip
    (root / "report.md").write_text(page.markdown(content), encoding="utf-8")
    path = root / "report.html"
    path.write_text(page.html_page(content), encoding="utf-8")
    return path


def _figure(plate: Plate, folder: Path) -> page.Figure:
    """Draws a plate, writes its files, and returns it for the page."""
    wide, narrow = (plate.draw(size) for size in (plots.WIDE, plots.NARROW))
    plots.save(wide, folder / plate.name, plate.header, plate.rows)
    svg = plots.svg_text(wide, f"{plate.name} wide"), plots.svg_text(narrow, f"{plate.name} narrow")
    return page.Figure(plate.title, plate.text, plate.name, *svg)


def _table_note(summaries: Sequence[Summary]) -> str:
    changes = [change for s in summaries if (change := s.changes.get(PROXY))]
    notes = dict.fromkeys(explain_unit(change.unit, change.difference) for change in changes)
    cost = f"Rewards are those at {summaries[0].cost:.0f} device-seconds, up to which every algorithm was evaluated. "
    return cost + "Change: after - before on the same prompts and noise; " + "; ".join(notes) + "."


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: one folder of runs. Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 1 or given[0].startswith("-"):
        print("usage: python -m benchmarks.report FOLDER   (a folder of runs, such as runs/demo)", file=sys.stderr)
        return 2
    try:
        print(write_report(given[0]))
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
