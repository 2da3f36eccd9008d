"""Tables of training runs: every evaluation, every seed, and one row for each algorithm. Needs no torch."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.aggregate import Interval, t_interval
from benchmarks.records import DIVERSITY, GOLD, HELDOUT, KL, PROXY, Run, by_task, read_runs
from benchmarks.summary import AXES, pair_differences, summarise

DIGITS = 5
_COSTS = ("device_s", "cpu_s", "reward_queries", "flops")


def pairs(run: Run, update: int, reward: str) -> dict[tuple[int, int], float]:
    """Scores of one evaluation by (prompt, noise seed)."""
    rows = run.rows(reward, update)
    return {(row["prompt_id"], row["noise_seed"]): row["value"] for row in rows if row["value"] is not None}


def change(run: Run, reward: str) -> dict[str, float]:
    """First and last mean, and the paired difference with its 95 % interval over the (prompt, noise) pairs."""
    first, last = (pairs(run, update, reward) for update in (run.updates()[0], run.updates()[-1]))
    difference = [last[pair] - first[pair] for pair in first if pair in last]
    interval = t_interval(difference) if difference else Interval(math.nan, math.nan, math.nan, 0)
    return {
        f"{reward}_before": _mean(first.values()),
        f"{reward}_after": _mean(last.values()),
        f"{reward}_change": interval.centre,
        f"{reward}_low": interval.low,
        f"{reward}_high": interval.high,
    }


def curve_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each evaluation: its costs, and the mean of every reward."""
    names = list(dict.fromkeys(name for run in runs for name in run.rewards()))
    rows = []
    for run in runs:
        for update in run.updates():
            row = next(row for row in run.evals if row["update"] == update)
            at = {key: row.get(key) for key in ("update", *_COSTS)}
            means = {name: round(_mean(pairs(run, update, name).values()), DIGITS) for name in names}
            rows.append({**_who(run), **at, **means})
    return rows


def change_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each run: reward and gold score at its first and its last evaluation, and what it cost."""
    rows = []
    for run in runs:
        scores = {k: round(v, DIGITS) for name in _known(run) for k, v in change(run, name).items()}
        last = run.train[-1] if run.train else {}
        costs = {key: last.get(key) for key in ("update", *_COSTS)}
        rows.append({**_who(run), "git_commit": run.about.get("git_commit"), **costs, **scores})
    return rows


def algorithm_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each (environment, algorithm): means over its seeds, with 95 % t-intervals over seeds.

    `verdict` is of the reward: "up" or "down" where the interval lies on one side of 0, else "not decided"; with fewer
    than three seeds there is no interval. `gold_relative` is the mean change of the gold score over its mean before.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((str(run.task.get("env_id")), run.algo), []).append(run)
    rows = []
    for (env_id, algo), group in groups.items():
        done = [run for run in group if run.status == "DONE"]
        row: dict[str, Any] = {
            "env_id": env_id,
            "algo": algo,
            "seeds": len(group),
            "unfinished": len(group) - len(done),
        }
        for name in _known(group[0]):
            changes = [change(run, name) for run in group]
            interval = _over_seeds([item[f"{name}_change"] for item in changes])
            before, after = (float(np.mean([item[f"{name}_{at}"] for item in changes])) for at in ("before", "after"))
            values = {"before": before, "after": after, "change": interval.centre, "low": interval.low}
            row |= {f"{name}_{key}": round(v, DIGITS) for key, v in {**values, "high": interval.high}.items()}
            if name == PROXY:
                row["verdict"] = _verdict(interval)
            elif name == GOLD and before:
                row["gold_relative"] = round(interval.centre / before, DIGITS)
        for name in (KL, DIVERSITY):
            if name in group[0].rewards():
                ends_at = [run.mean(name, run.updates()[-1]) for run in group]
                row[f"{name}_after"] = round(float(np.mean(ends_at)), DIGITS)
        ends = [run.train[-1] for run in group if run.train]
        for key in ("update", "cpu_s", "device_s", "reward_queries"):
            found = [end[key] for end in ends if end.get(key) is not None]
            row[key] = round(float(np.mean(found)), 1) if found else None
        rows.append(row)
    return sorted(rows, key=lambda row: (row["env_id"], -_sortable(row.get(f"{PROXY}_change"))))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `algorithm_rows` as a table for people."""
    lines = [
        "| environment | algorithm | seeds | reward before -> after | change, 95 % interval over seeds | verdict "
        "| gold before -> after | gold change | updates | CPU-min | reward queries |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        flagged = f" ({row['unfinished']} unfinished)" if row["unfinished"] else ""
        lines.append(
            f"| {row['env_id']} | {row['algo']} | {row['seeds']}{flagged} | {_from_to(row, PROXY)} "
            f"| {_interval(row, PROXY)} | {row.get('verdict', '')} | {_from_to(row, GOLD)} | {_interval(row, GOLD)} "
            f"| {_number(row['update'], 'g')} | {_number(row['cpu_s'], '.1f', 1 / 60)} "
            f"| {_number(row['reward_queries'], ',.0f')} |"
        )
    return "\n".join(lines) + "\n"


def pair_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each environment, cost axis and pair of algorithms: the paired difference a - b at equal cost.

    Of all algorithms of the environment at once, so at the cost that every one of them reached.
    """
    rows = []
    for env_id, group in by_task(runs).items():
        for axis in AXES:
            summaries = summarise(group, axis)
            for (a, b), (interval, unit) in pair_differences(summaries).items():
                at = {"env_id": env_id, "axis": axis, "cost": round(summaries[0].cost, 1), "a": a, "b": b}
                low, high = (round(value, DIGITS) for value in (interval.low, interval.high))
                rows.append(
                    {**at, "difference": round(interval.centre, DIGITS), "low": low, "high": high, "n": interval.n,
                     "over": unit}
                )  # fmt: skip
    return rows


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with all their columns; a file without rows is not written."""
    if rows:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def write_tables(out: Path) -> None:
    """Writes `curves.csv`, `changes.csv`, `pairs.csv`, `table.csv` and `table.md` of all runs with an evaluation.

    Raises:
        ValueError: there is no such run.
    """
    runs = read_runs(out)
    table = algorithm_rows(runs)
    write_csv(out / "curves.csv", curve_rows(runs))
    write_csv(out / "changes.csv", change_rows(runs))
    write_csv(out / "pairs.csv", pair_rows(runs))
    write_csv(out / "table.csv", table)
    (out / "table.md").write_text(markdown(table), encoding="utf-8")


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def _who(run: Run) -> dict[str, Any]:
    return {"algo": run.algo, "env_id": run.task.get("env_id"), "seed": run.about["seed"], "status": run.status}


def _known(run: Run) -> list[str]:
    known = run.rewards()
    return [name for name in (PROXY, GOLD) if name in known] + [name for name in known if name.startswith(HELDOUT)]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else math.nan


def _over_seeds(values: Sequence[float]) -> Interval:
    """A t-interval from three runs on; below that only the mean. A run without a value makes it NaN, not smaller."""
    if len(values) < 3 or any(math.isnan(value) for value in values):
        return Interval(_mean(values), math.nan, math.nan, len(values))
    return t_interval(values)


def _verdict(interval: Interval) -> str:
    if math.isnan(interval.low):
        return "no interval"
    return "not decided" if not interval.excludes_zero else "up" if interval.low > 0 else "down"


def _sortable(value: Any) -> float:
    return -math.inf if value is None or math.isnan(value) else float(value)


def _from_to(row: Mapping[str, Any], name: str) -> str:
    return f"{row[f'{name}_before']:.3f} -> {row[f'{name}_after']:.3f}" if f"{name}_before" in row else "-"


def _interval(row: Mapping[str, Any], name: str) -> str:
    if f"{name}_change" not in row:
        return "-"
    shown = f"{row[f'{name}_change']:+.3f}"
    return (
        shown if math.isnan(row[f"{name}_low"]) else f"{shown} [{row[f'{name}_low']:+.3f}, {row[f'{name}_high']:+.3f}]"
    )
