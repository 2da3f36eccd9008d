"""Learning curves of the demo's algorithms over several seeds, on held-out prompts with fixed noise.

    python -m benchmarks.curves --algo vader --env-id MovingShapes-HPS --budget 60s --out runs/curves
    python -m benchmarks.curves --algo ddpo --env-id MovingShapes-HPS --budget 30min --out runs/curves

The same settings as `make demo` (the algorithms' presets), more seeds, more noise seeds for each prompt, one CPU thread
a process, so that device-seconds are CPU-seconds. Tune with `--split validation`; the default opens the test prompts.
`curves.csv` has one row for each evaluation, `changes.csv` one for each seed: reward and gold score before and after,
paired over prompts and noise.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.aggregate import t_interval
from benchmarks.arguments import parse
from benchmarks.demo import ENV_ID, train
from benchmarks.records import GOLD, PROXY, Run, read_runs
from benchmarks.report import write_report


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvesConfig:
    """Train one algorithm with several seeds and write its curves."""

    algo: Literal["vader", "ddpo"]
    """which algorithm"""
    env_id: str = ENV_ID
    """environment, such as MovingShapes-HPS"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """training seeds; seeds whose run is in `out` already are not run again"""
    budget: str = "60s"
    """device time of each run for rollout, reward and update, such as 90s or 30min"""
    split: Literal["validation", "test"] = "test"
    """prompts of the evaluations"""
    noise_seeds: int = 8
    """videos of each prompt in an evaluation"""
    num_threads: int = 1
    """CPU threads of the process"""
    out: str = "runs/curves"
    """folder of the runs and the report"""


def pairs(run: Run, update: int, reward: str) -> dict[tuple[int, int], float]:
    """Scores of one evaluation by (prompt, noise seed)."""
    rows = (row for row in run.evals if row["update"] == update and row["reward"] == reward)
    return {(row["prompt_id"], row["noise_seed"]): row["value"] for row in rows if row["value"] is not None}


def change(run: Run, reward: str) -> dict[str, float]:
    """First and last mean, and the paired difference with its 95 % interval over the (prompt, noise) pairs."""
    first, last = (pairs(run, update, reward) for update in (run.updates()[0], run.updates()[-1]))
    difference = [last[pair] - first[pair] for pair in first if pair in last]
    interval = t_interval(difference)
    return {
        f"{reward}_before": float(np.mean(list(first.values()))),
        f"{reward}_after": float(np.mean(list(last.values()))),
        f"{reward}_change": interval.centre,
        f"{reward}_low": interval.low,
        f"{reward}_high": interval.high,
    }


def write_tables(out: Path) -> None:
    """`curves.csv` and `changes.csv` of all runs in a folder."""
    runs = read_runs(out)
    names = list(dict.fromkeys(name for run in runs for name in run.rewards()))
    curves: list[dict[str, Any]] = []
    changes: list[dict[str, Any]] = []
    for run in runs:
        who = {"algo": run.algo, "env_id": run.task.get("env_id"), "seed": run.about["seed"]}
        for update in run.updates():
            row = next(row for row in run.evals if row["update"] == update)
            means = {name: float(np.mean(list(pairs(run, update, name).values()))) for name in names}
            at = {key: row[key] for key in ("update", "device_s", "reward_queries")}
            curves.append({**who, **at, **{name: round(value, 5) for name, value in means.items()}})
        scores = {k: round(v, 5) for name in (PROXY, GOLD) for k, v in change(run, name).items()}
        changes.append({**who, "git_commit": run.about.get("git_commit"), **scores})
    for name, rows in (("curves.csv", curves), ("changes.csv", changes)):
        with (out / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def curves(config: CurvesConfig) -> int:
    """Runs what is missing and writes tables and report. Returns 0, or 130 if it was interrupted."""
    import torch

    torch.set_num_threads(config.num_threads)
    out = Path(config.out)
    command = (
        f"python -m benchmarks.curves --algo {config.algo} --env-id {config.env_id} --budget {config.budget} "
        f"--split {config.split} --noise-seeds {config.noise_seeds} --out {config.out}"
    )
    for seed in config.seeds:
        if (out / config.algo / config.env_id / f"seed_{seed}" / "DONE").exists():
            continue
        result = train(
            config.algo,
            out=out,
            budget=config.budget,
            seed=seed,
            command=command,
            env_id=config.env_id,
            split=config.split,
            noise_seeds=range(config.noise_seeds),
        )
        if result.interrupted:
            return 130
    write_tables(out)
    print(f"report: {write_report(out)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.curves`."""
    return curves(parse(CurvesConfig, arguments, "curves"))


if __name__ == "__main__":
    sys.exit(main())
