"""The loop of a run: update, log, checkpoint, evaluate, and what happens when one of them fails."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from algos.checkpoint_store import CheckpointStore
from algos.evaluate import GOLD, PROXY, Evaluation, Evaluator
from algos.meter import Meter, finite
from algos.progress import Progress, Stop
from algos.random_state import get_random_state, set_random_state
from algos.run_files import append_rows, read_json, replace_file, replace_json, sync_logs, writing

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


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


class OutOfMemoryError(RuntimeError):
    """Memory did not suffice; the message names the settings that need less of it."""


class Schedule:
    """When the next evaluation is due, in updates or in device-seconds."""

    def __init__(self, every: str | int | None, limit: float | None, updates: int | None) -> None:
        if every is None:
            every = max(1, (updates or 1) // 8) if limit is None else f"{limit / 8}s"
        self.in_updates = isinstance(every, int)
        self.every = float(every) if isinstance(every, int) else seconds(every)
        if self.every <= 0:
            raise ValueError(f"eval_every must be positive, got {every}")
        self.next = self.every

    def __str__(self) -> str:
        return f"{self.every:g} {'updates' if self.in_updates else 'device-s'}"

    def __call__(self, update: int, device_s: float) -> bool:
        now = update if self.in_updates else device_s
        if now < self.next:
            return False
        # An update longer than the interval must not be followed by a row of late evaluations.
        self.next = (now // self.every + 1) * self.every
        return True


@dataclass(kw_only=True, eq=False)
class Loop:
    """The state of a run under way."""

    algorithm: Any
    policy: Any
    evaluators: Sequence[Evaluator]
    """of several splits; the first is the main one, whose proxy decides which checkpoint is best"""
    env: Any
    meter: Meter
    folder: Path
    bar: Progress
    stop: Stop
    store: CheckpointStore
    schedule: Schedule
    limit: float | None
    """budget in device-seconds"""
    updates: int | None
    """budget in updates"""
    checkpoint_every: int | None
    skip_nonfinite: int

    update: int = 0
    whole: bool = True
    """False in the middle of an update, when the state is neither the old nor the new one"""
    evaluation_due: bool = True
    evaluated_at: int = -1
    saved_at: int | None = None
    skipped: int = 0
    """updates that were given up because of a gradient or loss that is not finite"""
    skipped_in_row: int = 0
    scores: dict[str, float] = field(default_factory=dict)

    def go(self) -> str:
        """Updates until the end; returns why it ended. After a dropped update the last checkpoint stays as it is."""
        try:
            while True:
                self._evaluate()
                if not self.evaluation_due and (ended := self._ended()):
                    break
                if self.stop.requested:
                    ended = "interrupted"
                    break
                self._train()
        except KeyboardInterrupt:
            ended = "interrupted"
        if self.whole and self.saved_at != self.update:
            self._checkpoint()
        return ended

    def _ended(self) -> str:
        if self.limit is not None and self.meter.device_s >= self.limit:
            return "budget"
        return "updates" if self.updates is not None and self.update >= self.updates else ""

    def _train(self) -> None:
        """One update, its row and the checkpoint after it."""
        self.whole = False
        with self.meter.phase("train"), self.stop.droppable():
            metrics = self._checked_update()
        self.whole = True
        self.update += 1
        self._measure_flops()
        row = self.meter.row(self.update, {"skipped_updates": self.skipped, **metrics})
        with writing(self.folder):
            append_rows(self.folder / "train.jsonl", [row])
        self.bar.show(self.update, self.meter.device_s, row["reward_mean"], self.scores)
        due = self.schedule(self.update, self.meter.device_s)
        self.evaluation_due = due or bool(self._ended())
        every = self.checkpoint_every
        # Before the evaluation: the state must survive a failure in it.
        if self.evaluation_due if every is None else every and self.update % every == 0:
            self._checkpoint()

    def _measure_flops(self) -> None:
        """What calls cost, after the update that made the first of each; where that cannot be had, run.json says so."""
        note = self.meter.measure_flops()
        if note:
            path = self.folder / "run.json"
            with writing(self.folder):
                replace_json(path, {**read_json(path), "flops_note": note})

    def _checked_update(self) -> Mapping[str, Any]:
        """The algorithm's metrics; none if the update was given up for a gradient that is not finite.

        Raises:
            FloatingPointError: more than `skip_nonfinite` updates in a row.
            OutOfMemoryError: see there.
        """
        try:
            metrics = self.algorithm.update()
            if not self.skip_nonfinite or finite(metrics.get("loss", 0.0)) is not None:
                self.skipped_in_row = 0
                return metrics
            problem = f"update() returned loss={float(metrics['loss'])}"
        except FloatingPointError as error:
            if not self.skip_nonfinite:
                raise
            metrics, problem = {}, str(error)
            # Gradients that were accumulated before the bad one must not enter the next update.
            for parameter in getattr(self.policy, "trainable_parameters", list)():
                parameter.grad = None
        except Exception as error:
            if _out_of_memory(error):
                raise self._short_of_memory(error, f"update {self.update + 1}") from error
            raise
        if self.skipped_in_row >= self.skip_nonfinite:
            raise FloatingPointError(
                f"{self.skipped_in_row + 1} updates in a row were not finite, the last one because {problem}; "
                "lower the learning rate, or look at the reward's gradient"
            )
        self.skipped += 1
        self.skipped_in_row += 1
        self.bar.say(f"update {self.update + 1} is not finite and counted as skipped: {problem}")
        return metrics

    def _short_of_memory(self, error: Exception, where: str) -> OutOfMemoryError:
        """An error that says what to lower."""
        config: Any = getattr(self.algorithm, "config", None)
        settings = [f"num_envs of the env ({getattr(self.env, 'num_envs', 'unknown')} now)"]
        if hasattr(config, "micro_batch"):
            settings.insert(0, f"micro_batch of the algorithm's config ({config.micro_batch} now)")
        lower = " or ".join(settings)
        return OutOfMemoryError(
            f"out of memory in {where}: lower {lower} in a new run; where memory was short for a moment only, "
            f"resume=True goes on with the same settings ({error})"
        )

    def _evaluate(self) -> None:
        """Does the evaluations that are due, unless the run is to stop; a signal leaves them due."""
        if not self.evaluators:
            self.evaluation_due = False
            return
        if not self.evaluation_due or self.stop.requested:
            return
        with self.meter.phase("eval"), self.stop.droppable(at_once=True):
            try:
                every = [evaluator.evaluate(self.policy) for evaluator in self.evaluators]
            except Exception as error:
                if _out_of_memory(error):
                    raise self._short_of_memory(error, f"the evaluation after update {self.update}") from error
                raise
        at = {
            "update": self.update,
            "device_s": round(self.meter.device_s, 4),
            "cpu_s": round(self.meter.cpu_s, 4),
            "reward_queries": int(self.meter.totals["reward_queries"]),
            "denoiser_forwards": int(self.meter.totals["denoiser_forwards"]),
            "denoiser_backwards": int(self.meter.totals["denoiser_backwards"]),
            **self.meter.operations(),
        }
        found = every[0]
        self.meter.nan_values += sum(one.nan_values for one in every)
        with writing(self.folder):
            self._save_videos(found)
            append_rows(self.folder / "eval.jsonl", [{**at, **row} for one in every for row in one.rows])
        self.evaluation_due, self.evaluated_at = False, self.update
        names = {row["reward"] for row in found.rows} & {PROXY, GOLD}
        self.scores = {name: found.mean(name) for name in sorted(names, reverse=True)}
        self.bar.evaluated(self.update, self.scores)
        self._keep_best(self.scores.get(PROXY, math.nan))

    def _keep_best(self, reward: float) -> None:
        """Marks this update's checkpoint, and writes one if need be, where its reward is the highest so far."""
        if not self.update or not self.store.is_best(reward):
            return
        if self.saved_at != self.update:
            if self.checkpoint_every == 0 and not self._ended():
                return
            self._checkpoint()
        with writing(self.folder):
            self.store.mark_best(self.update, reward)

    def _save_videos(self, found: Evaluation) -> None:
        if found.videos is None:
            return
        prompt_ids, noise_seeds = zip(*found.pairs, strict=True)
        data = io.BytesIO()
        np.savez_compressed(
            data,
            videos=found.videos,
            prompt_ids=np.array(prompt_ids),
            noise_seeds=np.array(noise_seeds),
            prompts=np.array(found.prompts),
        )
        (self.folder / "samples").mkdir(exist_ok=True)
        replace_file(self.folder / "samples" / f"eval_{self.update:06d}.npz", data.getvalue())

    def _checkpoint(self) -> None:
        with self.meter.phase("checkpoint"), writing(self.folder):
            state = {
                "update": self.update,
                "evaluation_due": self.evaluation_due,
                "evaluated_at": self.evaluated_at,
                "next_evaluation": self.schedule.next,
                "skipped": self.skipped,
                "skipped_in_row": self.skipped_in_row,
                "scores": self.scores,
                "algorithm": self.algorithm.state_dict(),
                "meter": self.meter.state_dict(),
                "random": get_random_state(self.meter.device),
            }
            sync_logs(self.folder)
            self.store.save(self.update, state, self.policy)
        self.saved_at = self.update

    def restore(self, path: Path, state: Mapping[str, Any]) -> None:
        """Takes everything from a checkpoint: policy, algorithm, costs so far, random states, what is due next.

        Raises:
            TypeError: the policy has no `load`.
        """
        if not hasattr(self.policy, "load"):
            raise TypeError(
                f"{type(self.policy).__name__} has no load(folder): give it one that reads what its save(folder) wrote"
            )
        self.policy.load(path / "policy")
        self.algorithm.load_state_dict(state["algorithm"])
        self.meter.load_state_dict(state["meter"])
        set_random_state(state["random"], self.meter.device)
        self.update = self.saved_at = int(state["update"])
        self.evaluation_due = bool(state["evaluation_due"])
        self.evaluated_at = int(state["evaluated_at"])
        self.schedule.next = float(state["next_evaluation"])
        self.skipped, self.skipped_in_row = int(state["skipped"]), int(state["skipped_in_row"])
        self.scores = dict(state["scores"])

    def finish(self, name: str, reason: str) -> None:
        """Writes DONE, INTERRUPTED or FAILED with the last counts, those of a dropped update included."""
        last = {key: value for key, value in self.meter.row(self.update, {}).items() if value is not None}
        last["skipped_updates"] = self.skipped
        with writing(self.folder):
            replace_json(self.folder / name, {"reason": reason, **last})


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch has no class of its own for the CPU's memory
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
