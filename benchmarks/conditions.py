"""Under which conditions runs were made, and what they therefore do not show, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.records import PROXY, Run, by_algorithm
from benchmarks.summary import Summary, explain_unit


def device_name(run: Run) -> str:
    """What the cost axis is called after: "CPU", or the graphics card without its maker."""
    name = run.about.get("gpu_name")
    return "CPU" if not name else str(name).removeprefix("NVIDIA ").strip()


def reward_name(run: Run) -> str:
    """The name of the reward that was trained on, as the task gives it."""
    return str(run.task.get("reward_train", "the training reward"))


def setup(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Set-up of the measurement, (name, value)."""
    run = runs[0]
    about, task = run.about, run.task
    versions = [f"Python {about['python']}", f"torch {about['torch']}"]
    versions += [f"{name} {version}" for name, version in about["packages"].items() if version]
    rows = [
        ("Task", str(task.get("env_id", "-"))),
        ("Reward trained on", reward_name(run)),
        ("Device", f"{about.get('gpu_name') or about.get('cpu_name') or 'CPU'}, {about['cpu_threads']} CPU threads"),
        ("Budget per run", _budget(about)),
        ("What the budget counts", "seconds of rollout, decoding, reward and update; evaluation and set-up are apart"),
        ("Evaluation", _pairs(task)),
        ("Numbers", about["dtype"]),
        ("Software", ", ".join(versions)),
        ("Commit", f"{about['git_commit'] or 'not recorded'}{' with local changes' if about['git_dirty'] else ''}"),
    ]  # fmt: skip
    for algo, group in by_algorithm(runs).items():
        config = ", ".join(f"{name} {value}" for name, value in group[0].about["config"].items())
        rows.append((f"Config of {algo}", config or "-"))
    return rows


def _budget(about: dict[str, object]) -> str:
    parts = [
        f"{about['budget_device_s']:g} device-seconds" if about["budget_device_s"] else "",
        f"{about['budget_updates']} updates" if about["budget_updates"] else "",
    ]
    return " or ".join(part for part in parts if part)


def limits(runs: Sequence[Run], summaries: Sequence[Summary]) -> list[str]:
    """What these runs do not show."""
    found = list(runs[0].task.get("limits", []))
    for summary in summaries:
        change = summary.changes.get(PROXY)
        if change is not None and change.unit != "runs":
            found.append(
                f"{summary.algo}: {len(summary.runs)} seed(s), so {explain_unit(change.unit, change.difference)}."
            )
    for run in runs:
        if run.status != "DONE":
            found.append(
                f"{run.algo}, seed {run.seed} is {run.status.lower()} ({run.reason or 'it did not say why'}); "
                "algorithms are compared at the cost that all of them reached."
            )
        if run.missing():
            found.append(
                f"{run.algo}, seed {run.seed}: {run.missing()} scores were not finite and are left out of means."
            )
    return found


def _pairs(task: Mapping[str, Any]) -> str:
    prompts, seeds = (len(task.get(name, [])) for name in ("eval_prompt_ids", "eval_noise_seeds"))
    return f"{prompts} prompts x {seeds} noise seeds, the same for every algorithm and at every evaluation"
