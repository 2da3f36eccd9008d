"""Learning curves of the demo's algorithms over several seeds, on held-out prompts with fixed noise.

    python -m benchmarks.curves --algo vader --env-id MovingShapes-HPS --budget 60s --out runs/curves
    python -m benchmarks.curves --algo ddpo --env-id MovingShapes-HPS --budget 30min --out runs/curves

The same settings as `make demo` (the algorithms' presets), more seeds, more noise seeds for each prompt, one CPU thread
a process, so that device-seconds are CPU-seconds. Tune with `--split validation`; the default opens the test prompts.
`curves.csv` has one row for each evaluation, `changes.csv` one for each seed: reward and gold score before and after,
paired over prompts and noise. The same command again goes on where it was stopped: finished seeds stay, a seed that was
broken off starts anew (so give no seed to two processes at once).
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.aggregate import Interval, t_interval
from benchmarks.arguments import one_line, parse
from benchmarks.demo import ENV_ID, SetupError, train
from benchmarks.records import GOLD, PROXY, Run, read_runs
from benchmarks.report import write_report

COMMAND = "python -m benchmarks.curves"


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvesConfig:
    """Train one algorithm with several seeds and write its curves."""

    algo: Literal["vader", "ddpo"]
    """which algorithm"""
    env_id: str = ENV_ID
    """environment, such as MovingShapes-HPS"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """training seeds; those whose run in `out` is done are not run again, one that was broken off starts anew"""
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
    interval = t_interval(difference) if difference else Interval(math.nan, math.nan, math.nan, 0)
    return {
        f"{reward}_before": _mean(list(first.values())),
        f"{reward}_after": _mean(list(last.values())),
        f"{reward}_change": interval.centre,
        f"{reward}_low": interval.low,
        f"{reward}_high": interval.high,
    }


def write_tables(out: Path) -> None:
    """`curves.csv` and `changes.csv` of all runs in a folder that have an evaluation, with how each run ended."""
    runs = read_runs(out)
    names = list(dict.fromkeys(name for run in runs for name in run.rewards()))
    curves: list[dict[str, Any]] = []
    changes: list[dict[str, Any]] = []
    for run in runs:
        who = {"algo": run.algo, "env_id": run.task.get("env_id"), "seed": run.about["seed"], "status": run.status}
        for update in run.updates():
            row = next(row for row in run.evals if row["update"] == update)
            means = {name: _mean(list(pairs(run, update, name).values())) for name in names}
            at = {key: row[key] for key in ("update", "device_s", "reward_queries")}
            curves.append({**who, **at, **{name: round(value, 5) for name, value in means.items()}})
        scores = {k: round(v, 5) for name in (PROXY, GOLD) if name in names for k, v in change(run, name).items()}
        changes.append({**who, "git_commit": run.about.get("git_commit"), **scores})
    for name, rows in (("curves.csv", curves), ("changes.csv", changes)):
        with (out / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _command(config: CurvesConfig) -> str:
    seeds = " ".join(map(str, config.seeds))
    return (
        f"{COMMAND} --algo {config.algo} --env-id {config.env_id} --seeds {seeds} --budget {config.budget} "
        f"--split {config.split} --noise-seeds {config.noise_seeds} --num-threads {config.num_threads} "
        f"--out {config.out}"
    )


def _check(config: CurvesConfig) -> None:
    """Refuses what can be refused without building anything.

    Raises:
        ValueError: a bad duration, a number below one, or seeds that are missing, repeated or negative.
    """
    from algos.run import seconds

    seconds(config.budget)
    for name, value in (("noise-seeds", config.noise_seeds), ("num-threads", config.num_threads)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if not config.seeds or len(set(config.seeds)) != len(config.seeds) or min(config.seeds) < 0:
        raise ValueError(f"--seeds must be different numbers from 0 on, got {' '.join(map(str, config.seeds))}")


def curves(config: CurvesConfig) -> int:
    """Runs what is missing and writes tables and report, also of a part of it.

    Returns:
        The exit code: 0; 1 after a failure or 130 if it was interrupted, with tables and report of what was done;
        2 for wrong usage, before any training.
    """
    import torch

    out = Path(config.out)
    code, trained = 0, False
    try:
        _check(config)
    except ValueError as error:
        print(f"curves: {one_line(error)}", file=sys.stderr)
        return 2
    torch.set_num_threads(config.num_threads)
    try:
        for seed in config.seeds:
            folder = out / config.algo / config.env_id / f"seed_{seed}"
            if (folder / "DONE").exists():
                continue
            fresh = (folder / "run.json").exists()
            if fresh:
                print(f"curves: {folder} did not reach its end: this seed starts again", flush=True)
            result = train(
                config.algo,
                out=out,
                budget=config.budget,
                seed=seed,
                command=_command(config),
                env_id=config.env_id,
                split=config.split,
                noise_seeds=range(config.noise_seeds),
                fresh=fresh,
            )
            trained = True
            if result.interrupted:
                code = 130
                break
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # whatever it is, the runs before it deserve their tables
        print(f"curves: {one_line(error)}", file=sys.stderr)
        if isinstance(error, SetupError) and not trained:
            return 2
        code = 1
    try:
        write_tables(out)
        print(f"report: {write_report(out)}")
    except (ValueError, OSError) as error:
        if code != 1:  # otherwise the one line of the failure said it all
            print(f"curves: {one_line(error)}", file=sys.stderr)
        return code or 1
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.curves`."""
    return curves(parse(CurvesConfig, arguments, "curves"))


if __name__ == "__main__":
    sys.exit(main())
