"""Two algorithms on the small embedded video model, with the same budget, and a report.

    python -m benchmarks.demo --budget 60s --out runs/demo --seed 0

Reward back-propagation (VADER) against policy gradients (DDPO) on MovingShapes-HPS. Ctrl-C, or a failure in one of
them, ends it with a report of what was done.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arguments import one_line, parse
from benchmarks.conditions import device_name
from benchmarks.records import GOLD, PROXY, read_runs
from benchmarks.report import write_report
from benchmarks.summary import difference, explain_unit, show, show_interval, summarise, unmeasured
from benchmarks.training import REWARD, Setup, train

ALGORITHMS = ("vader", "ddpo")
COMMAND = "python -m benchmarks.demo"
QUESTION = (
    "With the same computing time, does reward back-propagation (VADER) or a policy gradient (DDPO) raise the reward "
    "more, and does the true preference (gold score) follow?"
)
SETUP = Setup(
    question=QUESTION,
    limits=("Hyper-parameters are each algorithm's preset for this model; a demonstration is no tuned comparison.",),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Train VADER and DDPO on the small embedded video model, and write a report."""

    budget: str = "60s"
    """device time of each algorithm for rollout, reward and update, such as 90s or 2min"""
    out: str = "runs/demo"
    """folder of the runs and the report; an earlier demo's runs in it are removed"""
    seed: int = 0
    """training seed"""


def _clear(out: Path) -> None:
    """Removes an earlier demo's runs, and nothing else: their numbers must not enter this report.

    Raises:
        ValueError: there is a run of another command; nothing is removed.
    """
    records = sorted(out.rglob("run.json"))
    own = [record for name in ALGORITHMS for record in (out / name).glob("*/seed_*/run.json") if _is_demo(record)]
    others = [record.parent for record in records if record not in own]
    if others:
        raise ValueError(
            f"{others[0]} is a run of another command, which would enter this report (nothing was removed): "
            "choose another --out"
        )
    for record in own:
        shutil.rmtree(record.parent)


def _is_demo(record: Path) -> bool:
    try:
        command = json.loads(record.read_text(encoding="utf-8"))["task"]["command"]
    except (ValueError, KeyError, TypeError):
        return False
    return str(command).startswith(COMMAND)


def _command(config: DemoConfig) -> str:
    return f"{COMMAND} --budget {config.budget} --out {config.out} --seed {config.seed}"


def results(out: Path) -> list[str]:
    """What the runs in a folder found, as lines of text."""
    runs = read_runs(out)
    summaries = summarise(runs)
    seeds = ", ".join(sorted({str(run.seed) for run in runs}))
    lines = [f"{REWARD}, {device_name(runs[0])}, seed {seeds}, compared at {summaries[0].cost:.0f} device-s"]
    for summary in summaries:
        lines.append(
            f"{summary.algo} ({summary.status}, {summary.device_s:.0f} device-s, {summary.costs['update']:.0f} updates)"
        )
        for name, word in ((PROXY, "reward"), (GOLD, "gold  ")):
            change = summary.changes.get(name)
            if change is not None and max(summary.at) > 0:
                shown = show_interval(change.difference, change.unit)
                lines.append(f"  {word} {show(change.before)} -> {show(change.after)}   change {shown}")
        if max(summary.at) == 0:
            lines.append(f"  {unmeasured(summary)}")
    if all(max(summary.at) > 0 for summary in summaries):
        notes = dict.fromkeys(explain_unit(s.changes[PROXY].unit, s.changes[PROXY].difference) for s in summaries)
        lines.append(f"[low, high]: {'; '.join(notes)}")
        if len(summaries) == 2:
            interval, unit = difference(summaries[0], summaries[1])
            lines.append(f"reward, {summaries[0].algo} - {summaries[1].algo}: {show_interval(interval, unit)}")
    return lines


def demo(config: DemoConfig) -> int:
    """Runs the demo.

    Returns:
        The exit code: 0; 1 after a failure or 130 if it was interrupted, with a report of what was done all the same;
        2 for a bad budget or seed, or a folder with other runs, before anything is removed.
    """
    out = Path(config.out)
    code = 0
    try:
        from algos.budget import seconds

        seconds(config.budget)
        if config.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {config.seed}")
        _clear(out)
    except (ValueError, OSError) as error:
        print(f"demo: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    try:
        for name in ALGORITHMS:
            print(f"{name}: setting up", flush=True)
            result = train(name, out=out, budget=config.budget, seed=config.seed, command=_command(config), setup=SETUP)
            if result.interrupted:
                code = 130
                break
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # whatever it is, the runs before it deserve their report
        print(f"demo: {name} stopped: {one_line(error)}", file=sys.stderr)
        code = 1
    if code == 1 and not _evaluated(out):
        return code  # the one line said it all
    try:
        report = write_report(out)
    except (ValueError, OSError) as error:
        print(f"demo: no report: {one_line(error)}", file=sys.stderr)
        return code or 1
    print("", *results(out), f"report: {report}", sep="\n")
    return code


def _evaluated(out: Path) -> bool:
    """Whether there is anything to report."""
    try:
        return bool(read_runs(out))
    except ValueError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.demo`."""
    return demo(parse(DemoConfig, arguments, "demo"))


if __name__ == "__main__":
    sys.exit(main())
