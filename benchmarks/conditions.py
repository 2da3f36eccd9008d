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


def setup(runs: Sequence[Run], plan: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """Set-up of the measurement, (name, value).

    Args:
        runs: of one environment.
        plan: the fields of the benchmark they belong to, if they belong to one.
    """
    run = runs[0]
    about, task = run.about, run.task
    versions = [f"Python {about['python']}", f"torch {about['torch']}"]
    versions += [f"{name} {version}" for name, version in about["packages"].items() if version]
    rows = [
        ("Task", str(task.get("env_id", "-"))),
        ("Reward trained on", reward_name(run)),
        ("Device", f"{about.get('gpu_name') or about.get('cpu_name') or 'CPU'}, {about['cpu_threads']} CPU threads"),
        ("Budget per run", _budget(about)),
        ("What the budget counts", _counted(run)),
        ("Evaluation", _pairs(run)),
        ("Held-out rewards", ", ".join(task.get("heldout") or ()) or "none"),
        ("Tuning", str((plan or {}).get("tuning") or task.get("tuning") or "not recorded")),
        ("Numbers", about["dtype"]),
        ("Software", ", ".join(versions)),
        ("Commits", "; ".join(dict.fromkeys(_commit(run) for run in runs))),
    ]  # fmt: skip
    for algo, group in by_algorithm(runs).items():
        config = ", ".join(f"{name} {value}" for name, value in (group[0].about.get("config") or {}).items())
        rows.append((f"Config of {algo}", config or "-"))
    return rows


def _commit(run: Run) -> str:
    return f"{run.about['git_commit'] or 'not recorded'}{' with local changes' if run.about['git_dirty'] else ''}"


def _counted(run: Run) -> str:
    if run.about.get("gpu_name"):
        policy, reward = (int(run.about.get(f"num_gpus_{part}") or 0) for part in ("policy", "reward"))
        return (
            f"seconds of rollout, decoding, reward and update times the graphics cards held, {policy or 1} to train "
            f"and {reward} that only serve rewards; evaluation, set-up and checkpoints are apart"
        )
    kind = "CPU-seconds" if any("train_s" in row for row in run.train[-1:]) else "seconds"
    return f"{kind} of rollout, decoding, reward and update; evaluation, set-up and checkpoints are apart"


def _budget(about: dict[str, object]) -> str:
    parts = [
        f"{about['budget_device_s']:g} device-seconds" if about["budget_device_s"] else "",
        f"{about['budget_updates']} updates" if about["budget_updates"] else "",
    ]
    return " or ".join(part for part in parts if part)


def limits(runs: Sequence[Run], summaries: Sequence[Summary], plan: Mapping[str, Any] | None = None) -> list[str]:
    """What these runs do not show."""
    found = list(dict.fromkeys([*((plan or {}).get("limits") or ()), *runs[0].task.get("limits", [])]))
    remote = sorted({str(name) for run in runs for name in run.about.get("remote_rewards") or ()})
    if remote and not runs[0].about.get("gpu_name"):
        found.append(
            f"{', '.join(remote)}: scored by a server, whose CPU-seconds or graphics cards are in no cost given here."
        )
    found += dict.fromkeys(str(note) for run in runs if (note := run.about.get("reward_devices_note")))
    few: dict[str, list[str]] = {}
    for summary in summaries:
        change = summary.changes.get(PROXY)
        if change is not None and change.unit != "runs":
            seeds = f"{len(summary.runs)} seed(s), so {explain_unit(change.unit, change.difference)}."
            few.setdefault(seeds, []).append(summary.algo)
    found += [f"{', '.join(names)}: {text}" for text, names in few.items()]
    for run in runs:
        if run.status != "DONE":
            stays = (
                "it stays in at its last value."
                if run.status == "FAILED"
                else "algorithms are compared at the cost that all of them reached."
            )
            found.append(
                f"{run.algo}, seed {run.seed} is {run.status.lower()} ({run.reason or 'it did not say why'}); {stays}"
            )
        if run.diverged():
            found.append(
                f"{run.algo}, seed {run.seed} diverged: its last evaluation found no finite reward, and it stays in at "
                "its last finite value."
            )
        if run.missing():
            found.append(
                f"{run.algo}, seed {run.seed}: {run.missing()} scores were not finite and are left out of means."
            )
    return found


def _pairs(run: Run) -> str:
    task: Mapping[str, Any] = run.task
    prompts, seeds = (len(task.get(name, [])) for name in ("eval_prompt_ids", "eval_noise_seeds"))
    further = [name for name in task.get("eval_splits", ()) if name != run.split]
    text = f"{prompts} {run.split} prompts x {seeds} noise seeds, the same for every algorithm and at every evaluation"
    return text + (f"; {', '.join(further)} prompts beside them" if further else "")
