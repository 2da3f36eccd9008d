"""Continuing a run that was stopped: whether it is the same one, and back to its newest intact checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from algos.evaluate import GOLD, PROXY
from algos.loop import Loop
from algos.run_files import ENDINGS, OWN, differences, go_back, read_json, read_rows, replace_json

# Where another value may change the last bits of a resumed run.
_MACHINE = ("git_commit", "python", "torch", "cuda", "packages", "device", "gpu_name", "cpu_name", "cpu_threads")


def earlier_run(folder: Path, about: Mapping[str, Any], *, fresh: bool, resume: bool) -> dict[str, Any] | None:
    """The `run.json` of the run that is to be continued, or None if one is to begin. Changes nothing.

    Args:
        folder: of the run.
        about: the `run.json` of the run that is asked for.
        fresh: an earlier run is to be removed.
        resume: it is to be continued.

    Raises:
        ValueError: there is a run and it is neither, or one that differs, or files of nobody; see `algos.run`.
    """
    if not (folder / "run.json").exists():
        foreign = [name for name in OWN if (folder / name).exists()]
        if foreign:
            raise ValueError(
                f"{folder} holds {', '.join(foreign)} but no run.json: these files are not a run's, or run.json was "
                "lost; choose another folder, or move them away"
            )
        return None
    if fresh:
        return None
    if not resume:
        raise ValueError(
            f"{folder} already holds a run: choose another folder, continue it with resume=True, or remove it with "
            "fresh=True"
        )
    old = read_json(folder / "run.json")
    found = differences(old, about)
    if found:
        raise ValueError(
            f"{folder} holds another run, which differs in {'; '.join(found)}. Continue it with its own settings, "
            "choose another folder, or remove it with fresh=True"
        )
    return old


def go_on(loop: Loop, old: dict[str, Any], about: Mapping[str, Any]) -> None:
    """Takes the loop and its folder to the newest intact checkpoint, and writes that down.

    Args:
        loop: built for a new run.
        old: the `run.json` of the run that is continued.
        about: the one this process would have written.

    Raises:
        DamagedCheckpointError, ValueError: no intact checkpoint, or logs that do not reach to it; nothing was changed
            in the folder.
    """
    folder, found, best = loop.folder, loop.store.find(), None
    if found is not None:
        path, state, damaged = found
        for problem in damaged:
            loop.bar.say(f"{problem}; taking the one of update {state['update']} instead")
        loop.restore(path, state)
        best = state["best"]
    loop.ranks.wait()  # until all have read, before the first process takes the folder back
    if not loop.ranks.main:
        if best is not None:
            loop.store.best_update, loop.store.best_reward = int(best["update"]), float(best["reward"])
        return
    changed = [name for name in _MACHINE if old.get(name) != about[name]]
    if changed:
        loop.bar.say(f"{', '.join(changed)} changed since the run began: results may differ in the last bits")
    redone = go_back(folder, loop.update, loop.evaluated_at)
    loop.store.go_back(loop.update, best)
    entry = {
        "update": loop.update,
        "updates_redone": redone,
        "seconds_before": {name: round(value, 4) for name, value in loop.meter.seconds.items()},
        **{name: about[name] for name in (*_MACHINE, "git_dirty", "started_utc")},
    }
    replace_json(folder / "run.json", {**old, "resumes": [*old.get("resumes", []), entry]})
    for name in ENDINGS:
        (folder / name).unlink(missing_ok=True)
    if loop.bar.enabled:
        loop.bar.say(f"{folder}: continuing after update {loop.update}")


def result_of(folder: Path) -> dict[str, Any]:
    """The fields of `algos.run.RunResult` for a run that is done, from its files."""
    done, evals = read_json(folder / "DONE"), read_rows(folder / "eval.jsonl")
    main = read_json(folder / "run.json")["task"].get("eval_split")
    evals = [row for row in evals if main in (None, row["split"])]
    last = max((row["update"] for row in evals), default=0)
    scores = {}
    for name in (PROXY, GOLD):
        values = [row["value"] for row in evals if (row["update"], row["reward"]) == (last, name)]
        known = [value for value in values if value is not None]
        if values:
            scores[name] = sum(known) / len(known) if known else float("nan")
    print(f"{folder} is done: {done['update']} updates, {done['device_s']:.1f} device-s", flush=True)
    return {
        "out": folder,
        "ended": done["reason"],
        "updates": done["update"],
        "device_s": done["device_s"],
        "scores": scores,
        "resumed_from": done["update"],
    }
