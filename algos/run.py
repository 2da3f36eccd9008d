"""`run`: a budget, a log, evaluations and checkpoints around any object with an `update()`.

A run owns one folder:

    run.json            what was run, written once             train.jsonl   one row per update (`algos.meter`)
    eval.jsonl          one row per (evaluation, reward, prompt, noise seed)
    samples/            eval_<update>.npz: the evaluation's first videos, uint8 [n, F, H, W, 3]
    checkpoint/         the newest state (`algos.checkpoint`): of the end, or of the last evaluation before a failure
    DONE | INTERRUPTED | FAILED    how it ended, with the last counts; none of them: still running, or killed
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from algos.checkpoint import save_checkpoint
from algos.evaluate import GOLD, PROXY, Evaluation, Evaluator
from algos.meter import Meter
from algos.progress import Progress, Stop
from algos.provenance import plain, provenance, write_json

SCHEMA_VERSION = 1
_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
_OWN = ("run.json", "train.jsonl", "eval.jsonl", "DONE", "INTERRUPTED", "FAILED")


class Algorithm(Protocol):
    """Anything that learns: collect with its environment, take an optimiser step, return metrics."""

    def update(self) -> Mapping[str, Any]: ...

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended. `ended` is "budget", "updates" or "interrupted"; scores are means over the last evaluation."""

    out: Path
    ended: str
    updates: int
    device_s: float
    scores: dict[str, float]

    @property
    def interrupted(self) -> bool:
        return self.ended == "interrupted"


def seconds(text: str | float) -> float:
    """Seconds of a duration: "90s", "2min", "1.5h", or a number of seconds.

    Raises:
        ValueError: anything else, or nothing positive.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", str(text))
    try:
        value = float(match[1]) * _UNITS[match[2] or "s"] if match else 0.0
    except (KeyError, ValueError):
        value = 0.0
    if value <= 0:
        raise ValueError(f"{text!r} is no duration: write a positive number and s, min or h, such as '90s' or '2min'")
    return value


def run_folder(root: str | Path, benchmark: str, algo: str, task: str, seed: int) -> Path:
    """Where a run belongs: <root>/<benchmark>/<algo>/<task>/seed_<n>."""
    return Path(root) / benchmark / algo / task / f"seed_{seed}"


def run(
    algorithm: Algorithm,
    *,
    out: str | Path,
    budget: str | float | None = None,
    updates: int | None = None,
    evaluate: Evaluator | None = None,
    eval_every: str | int | None = None,
    checkpoint_every: int | None = None,
    seed: int = 0,
    task: Mapping[str, Any] | None = None,
    algo: str | None = None,
    env: Any = None,
    policy: Any = None,
    setup_s: float = 0.0,
    fresh: bool = False,
    progress: bool = True,
) -> RunResult:
    """Updates an algorithm until its budget is spent, and writes down everything that happened.

    The first Ctrl-C (or SIGTERM) lets the update finish and then ends the run with all files valid; the second one
    drops the update that is under way.

    Args:
        algorithm: see `Algorithm`; `env`, `policy` and `config` are read from its attributes of these names.
        out: the run's folder, see `run_folder`.
        budget: device-seconds of rollout + reward + update: "90s", "2min", "1h". The update that crosses it is the
            last.
        updates: number of updates; with a budget too, whichever comes first.
        evaluate: evaluates before the first update, on the schedule and at the end; its time is kept apart.
        eval_every: an int counts updates, a duration such as "30s" device-seconds. Default: an eighth of the budget.
        checkpoint_every: updates between checkpoints; 0: at the end only. Default: before each evaluation that follows
            an update, with or without an evaluator. There is always one at the end, and their time is kept apart.
        seed: the training seed, for the record: the caller has given it to the environment and the algorithm.
        task: what else `run.json` should say about the task (model, reward, prompts).
        algo: name in the record; default the class's in lower case.
        env: the training environment, if the algorithm has no attribute `env`.
        policy: the policy, if the algorithm has no attribute `policy`.
        setup_s: seconds the caller spent on building these.
        fresh: remove an earlier run in `out` first.
        progress: a bar over the budget, or a line an update where standard output is no terminal.

    Raises:
        ValueError: no budget, a bad duration or schedule, or a folder that already holds a run.
        TypeError: no env or policy to be found.
    """
    if budget is None and updates is None:
        raise ValueError("a run needs an end: give budget='2min' (device-seconds), updates=100, or both")
    if updates is not None and updates < 1:
        raise ValueError(f"updates must be at least 1, got {updates}")
    if checkpoint_every is not None and checkpoint_every < 0:
        raise ValueError(f"checkpoint_every must be at least 0, got {checkpoint_every}")
    env, policy = _part(algorithm, "env", env), _part(algorithm, "policy", policy)
    limit = None if budget is None else seconds(budget)
    due = _Schedule(eval_every, limit, updates)
    folder = Path(out)
    _claim(folder, fresh)
    meter = Meter(counters=env.mdp.counters, device=env.device)
    meter.seconds["setup"] += setup_s
    about = {
        "schema_version": SCHEMA_VERSION,
        "algo": algo or type(algorithm).__name__.lower(),
        "config": plain(getattr(algorithm, "config", {})),
        "task": {**plain(task or {}), **(evaluate.info() if evaluate else {})},
        "seed": seed,
        "budget_device_s": limit,
        "budget_updates": updates,
        "dtype": str(getattr(env.mdp, "dtype", None)).removeprefix("torch."),
        **provenance(env.device),
    }
    about["run_id"] = f"{about['algo']}-seed{seed}-{about['started_utc']}"
    write_json(folder / "run.json", about)
    with Progress(about["algo"], limit, updates, enabled=progress) as bar, Stop() as stop:
        loop = _Loop(algorithm, policy, evaluate, meter, folder, bar, stop)
        try:
            ended = loop.go(limit, updates, due, checkpoint_every)
        except Exception as error:
            loop.finish("FAILED", f"{type(error).__name__}: {error}")
            raise
        loop.finish("INTERRUPTED" if ended == "interrupted" else "DONE", ended)
    return RunResult(out=folder, ended=ended, updates=loop.update, device_s=meter.device_s, scores=loop.scores)


class _Schedule:
    """When the next evaluation is due, in updates or in device-seconds."""

    def __init__(self, every: str | int | None, limit: float | None, updates: int | None) -> None:
        if every is None:
            every = max(1, (updates or 1) // 8) if limit is None else f"{limit / 8}s"
        self.in_updates = isinstance(every, int)
        self.every = float(every) if isinstance(every, int) else seconds(every)
        if self.every <= 0:
            raise ValueError(f"eval_every must be positive, got {every}")
        self.next = self.every

    def __call__(self, update: int, device_s: float) -> bool:
        now = update if self.in_updates else device_s
        if now < self.next:
            return False
        # An update longer than the interval must not be followed by a row of late evaluations.
        self.next = (now // self.every + 1) * self.every
        return True


class _Loop:
    """The state of a run under way."""

    def __init__(
        self,
        algorithm: Algorithm,
        policy: Any,
        evaluate: Evaluator | None,
        meter: Meter,
        folder: Path,
        bar: Progress,
        stop: Stop,
    ) -> None:
        self.algorithm, self.policy, self.evaluator = algorithm, policy, evaluate
        self.meter, self.folder, self.bar, self.stop = meter, folder, bar, stop
        self.update = 0
        self.whole = True  # False in the middle of an update, when the state is neither the old nor the new one
        self.evaluated_at: int | None = None
        self.saved_at: int | None = None
        self.scores: dict[str, float] = {}

    def go(self, limit: float | None, updates: int | None, due: _Schedule, checkpoint_every: int | None) -> str:
        """Updates until the end; returns why it ended. After a dropped update the last checkpoint stays as it is."""
        try:
            self.evaluate()
            while True:
                if self.stop.requested:
                    ended = "interrupted"
                    break
                self.whole = False
                with self.meter.phase("train"), self.stop.droppable():
                    metrics = self.algorithm.update()
                self.whole = True
                self.update += 1
                row = self.meter.row(self.update, metrics)
                self._append("train.jsonl", [row])
                self.bar.show(self.update, self.meter.device_s, row["reward_mean"], self.scores)
                ended = self._ended(limit, updates)
                evaluates = due(self.update, self.meter.device_s) or bool(ended)
                # Before the evaluation: the state must survive a failure in it.
                if evaluates if checkpoint_every is None else checkpoint_every and self.update % checkpoint_every == 0:
                    self.checkpoint()
                if evaluates:
                    self.evaluate()
                if ended:
                    break
        except KeyboardInterrupt:
            ended = "interrupted"
        if self.whole and self.saved_at != self.update:
            self.checkpoint()
        return ended

    def _ended(self, limit: float | None, updates: int | None) -> str:
        if limit is not None and self.meter.device_s >= limit:
            return "budget"
        return "updates" if updates is not None and self.update >= updates else ""

    def evaluate(self) -> None:
        """Evaluates the policy as it is now, once per update, unless the run is to stop."""
        if self.evaluator is None or self.evaluated_at == self.update or self.stop.requested:
            return
        with self.meter.phase("eval"), self.stop.droppable(at_once=True):
            found = self.evaluator.evaluate(self.policy)
        at = {
            "update": self.update,
            "device_s": round(self.meter.device_s, 4),
            "cpu_s": round(self.meter.cpu_s, 4),
            "reward_queries": int(self.meter.totals["reward_queries"]),
            "denoiser_forwards": int(self.meter.totals["denoiser_forwards"]),
            "denoiser_backwards": int(self.meter.totals["denoiser_backwards"]),
        }
        self.meter.nan_values += found.nan_values
        self._append("eval.jsonl", [{**at, **row} for row in found.rows])
        self._save_videos(found)
        self.evaluated_at = self.update
        names = {row["reward"] for row in found.rows} & {PROXY, GOLD}
        self.scores = {name: found.mean(name) for name in sorted(names, reverse=True)}
        self.bar.evaluated(self.update, self.scores)

    def _save_videos(self, found: Evaluation) -> None:
        if found.videos is None:
            return
        (self.folder / "samples").mkdir(exist_ok=True)
        prompt_ids, noise_seeds = zip(*found.pairs, strict=True)
        np.savez_compressed(
            self.folder / "samples" / f"eval_{self.update:06d}.npz",
            videos=found.videos,
            prompt_ids=np.array(prompt_ids),
            noise_seeds=np.array(noise_seeds),
            prompts=np.array(found.prompts),
        )

    def checkpoint(self) -> None:
        with self.meter.phase("checkpoint"):
            state = {
                "update": self.update,
                "algorithm": self.algorithm.state_dict(),
                "meter": self.meter.state_dict(),
            }
            save_checkpoint(self.folder / "checkpoint", state, self.policy)
        self.saved_at = self.update

    def finish(self, name: str, reason: str) -> None:
        """Writes DONE, INTERRUPTED or FAILED with the last counts, those of a dropped update included."""
        last = {key: value for key, value in self.meter.row(self.update, {}).items() if value is not None}
        write_json(self.folder / name, {"reason": reason, **last})

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def _part(algorithm: Any, name: str, given: Any) -> Any:
    found = getattr(algorithm, name, None) if given is None else given
    if found is None:
        raise TypeError(
            f"{type(algorithm).__name__} has no attribute '{name}': set self.{name}, or give run({name}=...)"
        )
    return found


def _claim(folder: Path, fresh: bool) -> None:
    """Makes the folder; an earlier run's own files go if `fresh`, and are never mixed with new ones."""
    if (folder / "run.json").exists():
        if not fresh:
            raise ValueError(f"{folder} already holds a run: choose another folder, or fresh=True to remove that run")
        for name in _OWN:
            (folder / name).unlink(missing_ok=True)
        for name in ("samples", "checkpoint", "checkpoint.new", "checkpoint.old"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
