"""A report from run folders: report.html (one file, works offline), report.md, figures as SVG, PNG and CSV.

    python -m benchmarks.report runs/demo

Needs no torch and starts no training: everything comes from the files the runs wrote.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import clips, experiments, page, plots
from benchmarks.answer import answer
from benchmarks.arguments import one_line
from benchmarks.breakdown import bar_plates, frame_plates
from benchmarks.conditions import limits, setup
from benchmarks.figures import Plate, View, curve_plates
from benchmarks.overview import matrix, matrix_note, table, table_note
from benchmarks.page import Bullets, Clips, Code, Facts, Section, Table, Text
from benchmarks.pooled_page import pooled_section
from benchmarks.records import Run, by_task, check_comparable, read_plan, read_runs
from benchmarks.saving import save, svg_text
from benchmarks.summary import Summary, summarise
from benchmarks.tables import write_tables
from benchmarks.thresholds import default_threshold, given_threshold
from benchmarks.verdicts import judge, sentence, verdict_table

_AS_TRAINED = "(evaluated as it was trained)"
_QUESTION = "Which algorithm raises the reward most for the same computing time?"
_MAX_CLIPS = 6  # prompts shown as playing videos
_CLIP_BYTES = 8 * 2**20  # of encoded videos in one page; as data URIs a third more


def plates(view: View) -> list[Plate]:
    """The figures these runs allow; reward against hours comes first."""
    found = chain(curve_plates(view), bar_plates(view), frame_plates(view))
    return [plate for plate in found if plate.rows]


def clip_rows(
    runs: Sequence[Run], summaries: Sequence[Summary]
) -> tuple[list[str], list[tuple[str, list[np.ndarray]]]]:
    """Names and rows of the playing videos: each prompt before training and after it, from the same noise."""
    before = next((kept for run in runs if (kept := run.samples(0)) is not None), None)
    if before is None:
        return [], []
    videos, pairs, prompts = before
    names, sources = ["before"], [videos]
    for summary in summaries:
        kept = summary.runs[0].samples(summary.at[0])
        # Another pair of prompt and noise would compare two different videos.
        if kept is not None and kept[1] == pairs and summary.at[0] > 0:
            names.append(f"after {summary.algo}")
            sources.append(kept[0])
    chosen = range(min(len(videos), _MAX_CLIPS))
    return names, [(prompts[i], [source[i] for source in sources]) for i in chosen]


def write_report(root: str | Path, extra_sections: Sequence[Section] = (), *, threshold: float | None = None) -> Path:
    """Writes report.html, report.md, the tables and figures/ into a folder of runs.

    Several environments in one folder each get their own figures and tables, and a pooled result.

    Args:
        root: folder with runs, such as runs/demo.
        extra_sections: further sections, which stand after the figures; `figure` draws a `Plate` for them.
        threshold: reward whose time is measured; None: see `benchmarks.thresholds.default_threshold`.

    Returns:
        The path of report.html.

    Raises:
        ValueError: no runs there, or runs that cannot be compared.
    """
    root = Path(root)
    runs, plan = read_runs(root), read_plan(root)
    shared, apart = _parts(runs, plan)
    for part in (shared, *apart.values()):
        check_comparable(part)
    write_tables(root)
    views = {env_id: make_view(group, threshold) for env_id, group in by_task(shared).items()}
    views |= {f"{label} {_AS_TRAINED}": make_view(part, threshold) for label, part in apart.items()}
    first = next(iter(views.values()))
    title = first.reward if len(views) == 1 else ", ".join(views)
    title += f": {', '.join(first.groups) if len(first.groups) <= 3 else f'{len(first.groups)} algorithms'}"
    lead = [
        Text(str(plan.get("question") or runs[0].task.get("question") or _QUESTION), "question"),
        Text(_answers(views), "answer"),
    ]  # fmt: skip
    sections = [*_hypothesis(plan, views)]
    sections += pooled_section({name: v.summaries for name, v in views.items() if name in by_task(shared)}, root)
    for index, (name, view) in enumerate(views.items()):
        prefix = "" if len(views) == 1 else f"{_safe(name)}_"
        sections += _sections(view, root, prefix, "" if len(views) == 1 else f"{name}: ", _CLIP_BYTES // len(views))
        sections += extra_sections if index == len(views) - 1 else ()
    sections += experiments.sections(str(plan.get("experiment", "")), runs)
    sections += _end(root, views, plan, runs, threshold)
    (root / "report.md").write_text(page.markdown(title, lead, sections), encoding="utf-8")
    path = root / "report.html"
    path.write_text(page.html_page(title, lead, sections), encoding="utf-8")
    return path


def make_view(runs: Sequence[Run], threshold: float | None = None) -> View:
    """Runs of one environment with their summaries and the threshold of their report."""
    summaries = summarise(runs)
    return View(runs, summaries, default_threshold(summaries) if threshold is None else given_threshold(threshold))


def figure(plate: Plate, folder: Path, prefix: str = "") -> page.Figure:
    """Draws a plate, writes its SVG, PNG and CSV into `folder`, and returns it for a page."""
    name = prefix + plate.name
    wide, narrow = (plate.draw(size) for size in (plots.WIDE, plots.NARROW))
    save(wide, folder / name, plate.header, plate.rows)
    drawn = (folder / f"{name}.svg").read_text(encoding="utf-8")
    return page.Figure(plate.title, plate.text, name, drawn, svg_text(narrow, f"{name} narrow"))


def _parts(runs: Sequence[Run], plan: Mapping[str, Any]) -> tuple[list[Run], dict[str, list[Run]]]:
    """Runs that are compared with each other, and {label: runs} of arms that were evaluated in a way of their own."""
    own = {arm["label"] for arm in plan.get("arms", ()) if arm.get("evaluate_as_trained")}
    apart = {label: [run for run in runs if run.algo == label] for label in sorted(own)}
    shared = [run for run in runs if run.algo not in own]
    found = {label: part for label, part in apart.items() if part}
    if not shared:  # then there is nothing they could be mixed with
        label = next(iter(found))
        shared = found.pop(label)
    return shared, found


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", name).strip("_")


def _answers(views: Mapping[str, View]) -> str:
    said = {name: answer(view.summaries, view.reward, short=len(views) > 1) for name, view in views.items()}
    return next(iter(said.values())) if len(said) == 1 else " ".join(f"{name}: {text}" for name, text in said.items())


def _hypothesis(plan: Mapping[str, Any], views: Mapping[str, View]) -> list[Section]:
    """What was expected before the runs, and whether it came true."""
    hypothesis, expected = plan.get("hypothesis"), plan.get("expected_ahead") or ()
    if not hypothesis and not expected:
        return []
    blocks: list[page.Block] = [Text(str(hypothesis))] if hypothesis else []
    for name, view in views.items():
        if expected and not name.endswith(_AS_TRAINED):
            verdicts = judge(view.runs, expected)
            start = "" if len(views) == 1 else f"{name}: "
            blocks += [Text(start + sentence(verdicts)), Table(*verdict_table(verdicts), wrap=True)]
    blocks.append(
        Text(
            "As written before the runs. A pair is confirmed or refuted where the 95 % interval of the paired "
            "difference over seeds excludes 0, at the largest cost at which both algorithms were evaluated; otherwise "
            "it is not decided.",
            "note",
        )
        if expected
        else Text("As written before the runs; no pair of algorithms was named, so nothing is judged.", "note")
    )
    return [Section("Hypothesis", blocks)]


def _sections(view: View, root: Path, prefix: str, start: str, clip_bytes: int) -> list[Section]:
    """Figures, tables and videos of one environment: the first figure stands before the table."""
    drawn = [figure(plate, root / "figures", prefix) for plate in plates(view)]
    found = [Section(f"{start}{one.title}", [one]) for one in drawn[:1]]
    found.append(Section(f"{start}Results", [Table(*table(view)), Text(table_note(view), "note")]))
    pairs = matrix(view)
    if pairs is not None:
        found.append(Section(f"{start}Pairs", [Table(*pairs), Text(matrix_note(view), "note")]))
    found += [Section(f"{start}{one.title}", [one]) for one in drawn[1:]]
    return [*found, *_videos(view, start, clip_bytes)]


def _videos(view: View, start: str, most: int) -> Iterable[Section]:
    names, rows = clip_rows(view.runs, view.summaries)
    encoded = clips.fit([videos for _, videos in rows], most)
    if not encoded:
        return
    shape = clips.for_page(rows[0][1][0]).shape
    sources = [
        (prompt, [clips.data_uri(one) for one in videos]) for (prompt, _), videos in zip(rows, encoded, strict=False)
    ]
    note = "The same prompts and the same noise, before and after training, of the first seed."
    yield Section(f"{start}Videos", [Text(note), Clips(names, sources, (shape[2], shape[1]))])


def _end(
    root: Path, views: Mapping[str, View], plan: Mapping[str, Any], runs: Sequence[Run], threshold: float | None
) -> list[Section]:
    """Set-up, limits, and what repeats it all."""
    found = []
    said = dict.fromkeys(line for view in views.values() for line in limits(view.runs, view.summaries, plan))
    for name, view in views.items():
        start = "" if len(views) == 1 else f"{name}: "
        found.append(Section(f"{start}Set-up", [Facts(setup(view.runs, plan))]))
    found.append(Section("Limits", [Bullets(list(said))]))
    again = f"python -m benchmarks.report {root.as_posix()}"
    again += "" if threshold is None else f" --threshold {threshold}"
    commands = dict.fromkeys(str(run.task["command"]) for run in runs if "command" in run.task)
    found.append(Section("Commands", [Code([*commands, again])]))
    return found


def report(folder: str, threshold: float | None = None) -> int:
    """Writes the report of a folder and prints its path.

    Returns:
        The exit code: 0; 2 for a folder without runs or with runs that cannot be compared; 1 if it cannot be written.
    """
    try:
        print(write_report(folder, threshold=threshold))
    except (ValueError, OSError) as error:
        print(f"report: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.report`. Returns the exit code."""
    from benchmarks.commands.report import main as command

    return command(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
