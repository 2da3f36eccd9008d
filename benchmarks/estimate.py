"""What `plan` shows: the runs of a benchmark and their state, the hours they may take, and the disk. Touches no GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.execute import Job, state
from benchmarks.plan import Benchmark

_ROW_BYTES = 330  # a line of eval.jsonl
_ROWS = 12  # measures of a video: reward, gold score with its parts, KL, motion and the like


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What finished runs of a benchmark have cost."""

    runs: int
    """how many they are"""
    device_s: dict[str, float]
    """training of one run, by arm"""
    eval_s_per_video: float | None
    """wall seconds of sampling and scoring a video in an evaluation; None: no finished run"""
    other_s: float | None
    """wall seconds of a run for set-up and checkpoints"""
    run_bytes: float | None
    """size of a run's folder"""


def measured(todo: Sequence[Job]) -> Measured:
    """What those of the runs that are done have cost."""
    spent: dict[str, list[float]] = {}
    per_video, other, sizes = [], [], []
    for job in todo:
        if state(job.folder) != "DONE":
            continue
        done = json.loads((job.folder / "DONE").read_text(encoding="utf-8"))
        spent.setdefault(job.arm.label, []).append(float(done["device_s"]))
        videos = _evaluated_videos(job.folder / "eval.jsonl")
        if videos:
            per_video.append(float(done["eval_s"]) / videos)
        other.append(float(done["setup_s"]) + float(done["checkpoint_s"]))
        sizes.append(sum(path.stat().st_size for path in job.folder.rglob("*") if path.is_file()))
    return Measured(
        runs=len(sizes),
        device_s={label: float(np.mean(values)) for label, values in spent.items()},
        eval_s_per_video=_mean(per_video),
        other_s=_mean(other),
        run_bytes=_mean(sizes),
    )


def _evaluated_videos(path: Path) -> int:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return len(
        {
            (row["update"], row["split"], row["prompt_id"], row["noise_seed"])
            for row in rows
            if row["noise_seed"] is not None
        }
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def evaluated_videos(benchmark: Benchmark) -> int:
    """Videos that one run samples for its evaluations, the one before training included; prompts may be fewer."""
    return (benchmark.evals + 1) * benchmark.eval_prompts * benchmark.noise_seeds * len(benchmark.splits)


def lines(todo: Sequence[Job], root: Path) -> list[str]:
    """The plan in words."""
    from algos.budget import seconds

    benchmark, found = todo[0].benchmark, measured(todo)
    limit = None if benchmark.budget is None else seconds(benchmark.budget)
    ends = [] if limit is None else [f"{limit:g} device-s"]
    ends += [] if benchmark.updates is None else [f"{benchmark.updates} updates"]
    told = [f"{root}: {benchmark.env_id}, {len(todo)} runs, each ends after {' or '.join(ends)}"]
    for name in ("question", "hypothesis"):
        if getattr(benchmark, name):
            told.append(f"{name}: {getattr(benchmark, name)}")
    told += [f"expected: {first} ahead of {second}" for first, second in benchmark.expected_ahead]
    width = max(len(job.name) for job in todo)
    told += ["", *(f"  {job.name:<{width}}  {_state(job):<11}  {_cost(job, limit, found)}" for job in todo), ""]
    return [*told, *_totals(todo, limit, found)]


def _state(job: Job) -> str:
    words = {"DONE": "done", "INTERRUPTED": "interrupted", "FAILED": "failed", "UNFINISHED": "unfinished"}
    return words.get(state(job.folder), "missing")


def _seconds(job: Job, limit: float | None, found: Measured) -> float | None:
    """Device-seconds of a run; None: not known yet."""
    like_it = found.device_s.get(job.arm.label)
    if limit is None:
        return like_it
    return limit if job.benchmark.updates is None or like_it is None else min(limit, like_it)


def _cost(job: Job, limit: float | None, found: Measured) -> str:
    seconds = _seconds(job, limit, found)
    if seconds is None:
        return f"{job.benchmark.updates} updates, device-hours unknown"
    return f"{seconds / 3600:.4f} device-h"


def _totals(todo: Sequence[Job], limit: float | None, found: Measured) -> list[str]:
    left = [job for job in todo if state(job.folder) != "DONE"]
    costs = [_seconds(job, limit, found) for job in left]
    known = [cost for cost in costs if cost is not None]
    unknown = len(costs) - len(known)
    told = [
        f"{len(todo) - len(left)} done, {len(left)} to run: {sum(known) / 3600:.3f} device-h of training"
        + (f", and {unknown} whose hours are unknown until one of their algorithm is done" if unknown else "")
    ]
    videos = evaluated_videos(todo[0].benchmark) * len(left)
    if found.eval_s_per_video is None or found.other_s is None:
        told.append(f"evaluation: {videos:,} videos; hours unknown until a run is done")
    else:
        evaluation, other = videos * found.eval_s_per_video / 3600, len(left) * found.other_s / 3600
        told.append(
            f"evaluation: {videos:,} videos, {evaluation:.3f} h at the {found.eval_s_per_video:.3g} s a video of "
            f"{_runs(found)}; set-up and checkpoints {other:.3f} h"
        )
        if not unknown:
            told.append(f"total: {sum(known) / 3600 + evaluation + other:.3f} h, one run after the other")
    if found.run_bytes is None:
        told.append(
            f"disk: logs about {videos * _ROWS * _ROW_BYTES / 1e6:.1f} MB; checkpoints unknown until a run is done"
        )
    else:
        told.append(f"disk: about {len(left) * found.run_bytes / 1e6:.1f} MB more, by {_runs(found)}")
    return told


def _runs(found: Measured) -> str:
    return "the run that is done" if found.runs == 1 else f"the {found.runs} runs that are done"


def show(options: Any) -> int:
    """Prints the plan of `benchmarks.reward_vs_gpu_hours`; the exit code is 2 for wrong options. Writes nothing."""
    from benchmarks.reward_vs_gpu_hours import complain, prepare

    try:
        todo, values = prepare(options, "plan")
        print(*lines(todo, Path(options.out) / values["name"]), sep="\n")
    except (ValueError, OSError) as error:
        return complain(error)
    return 0
