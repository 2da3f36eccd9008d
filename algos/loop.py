"""The loop of a run: update, log, checkpoint, evaluate, and what happens when one of them fails."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from algos.alarm import ALARMS, Alarm, alarms, message
from algos.budget import Schedule
from algos.checkpoint_store import CheckpointStore
from algos.distributed import PeerError, Ranks
from algos.evaluate import GOLD, PROXY, Evaluation, Evaluator
from algos.measures import KL
from algos.meter import Meter, number
from algos.out_of_memory import Before, half, is_out_of_memory, set_micro_batch, short_of_memory
from algos.progress import Progress, Stop
from algos.random_state import get_random_state, set_random_state
from algos.run_files import append_rows, read_json, read_rows, replace_json, sync_logs, writing
from algos.sample_videos import save_videos
from algos.watchers import Watchers

OVER_OPTIMISATION = "over-optimisation"


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
    alarm: Alarm | None = None
    """what is watched in the evaluations of the first evaluator"""
    ranks: Ranks = field(default_factory=Ranks)
    """the processes of the run, of which the first evaluates and writes; all make the same decisions"""
    watchers: Watchers = field(default_factory=Watchers)
    """what is told of everything that was written down"""
    sample_mp4: bool = True
    """whether the kept videos are also written as files that people open"""
    halve_micro_batch: bool = False
    """after an out-of-memory error do the update again, with smaller pieces"""

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
    kl: float = math.nan
    """to the reference, in nats, in the last evaluation; NaN where it was not measured"""
    alarmed: bool = False
    """whether the alarm has ended the run"""
    halvings: list[dict[str, int]] = field(default_factory=list)
    """the updates, counted from 1, that memory was too short for, with the `micro_batch` from then on"""

    def go(self) -> str:
        """Updates until the end; returns why it ended. After a dropped update the last checkpoint stays as it is."""
        try:
            while True:
                stopping = self.ranks.any(bool(self.stop.requested))
                self._evaluate(stopping)
                if not self.evaluation_due and (ended := self._ended()):
                    break
                if stopping or self.ranks.any(bool(self.stop.requested)):
                    ended = "interrupted"
                    break
                self._train()
        except KeyboardInterrupt:
            ended = "interrupted"
        except PeerError:
            if not self.stop.requested:  # otherwise it has left for the same reason
                raise
            ended, self.whole = "interrupted", False
        if self.whole and self.saved_at != self.update:
            self._checkpoint()
        return ended

    def _ended(self) -> str:
        if self.limit is not None and self.meter.device_s >= self.limit:
            return "budget"
        if self.alarmed:
            return OVER_OPTIMISATION
        return "updates" if self.updates is not None and self.update >= self.updates else ""

    def _train(self) -> None:
        """One update, its row and the checkpoint after it."""
        self.whole = False
        with self.meter.phase("train"), self.stop.droppable():
            metrics = self._checked_update()
        self.whole = True
        self.update += 1
        if self.update == 1:
            self._check_together()
        self._measure_flops()
        row = self.meter.row(self.update, {"skipped_updates": self.skipped, **metrics})
        self._append("train.jsonl", [row])
        self.watchers.tell("train", row)
        self.bar.show(row, self._shown())
        due = self.schedule(self.update, self.meter.device_s)
        self.evaluation_due = due or bool(self._ended())
        every = self.checkpoint_every
        # Before the evaluation: the state must survive a failure in it.
        if self.evaluation_due if every is None else every and self.update % every == 0:
            self._checkpoint()

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.ranks.main:
            with writing(self.folder):
                append_rows(self.folder / name, rows)

    def _measure_flops(self) -> None:
        """What calls cost, after the update that made the first of each; where that cannot be had, run.json says so."""
        note = self.meter.measure_flops()
        if note:
            self._note("flops_note", note)

    def _checked_update(self) -> Mapping[str, Any]:
        """The algorithm's metrics; none if the update was given up for a gradient that is not finite.

        Raises:
            TypeError: `update()` returned no mapping, or a loss that is no number.
            FloatingPointError: more than `skip_nonfinite` updates in a row.
            OutOfMemoryError: see there.
        """
        try:
            metrics = self._update_in_memory()
            if not isinstance(metrics, Mapping):
                raise TypeError(
                    f"{type(self.algorithm).__name__}.update() returned {type(metrics).__name__}, expected a mapping "
                    'of numbers, such as {"reward_mean": 0.3}, which may be empty'
                )
            if not self.skip_nonfinite or number("loss", metrics.get("loss", 0.0)) is not None:
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
            if is_out_of_memory(error):
                raise short_of_memory(error, f"update {self.update + 1}", self.algorithm, self.env) from error
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

    def _update_in_memory(self) -> Mapping[str, Any]:
        """The algorithm's metrics of an update, after an out-of-memory error of one done again in smaller pieces."""
        while self.halve_micro_batch and (smaller := half(self.algorithm)) is not None:
            before = Before(self.algorithm, self.policy, self.meter.device)
            try:
                return self.algorithm.update()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler: the error holds on to the tensors of the update.
            before.restore()
            set_micro_batch(self.algorithm, smaller)
            self.halvings.append({"update": self.update + 1, "micro_batch": smaller})
            self._note("micro_batch_halved", self.halvings)
            self.bar.say(f"out of memory in update {self.update + 1}: once more, now with micro_batch={smaller}")
        return self.algorithm.update()

    def _note(self, name: str, value: Any) -> None:
        """Writes something into run.json."""
        if self.ranks.main:
            path = self.folder / "run.json"
            with writing(self.folder):
                replace_json(path, {**read_json(path), name: value})

    def _check_together(self) -> None:
        """Raises RuntimeError where the processes do not train one policy, but each its own."""
        if self.ranks.world > 1:
            self.ranks.check_same(self.policy.trainable_parameters())

    def _measured(self) -> list[Evaluation] | None:
        """The evaluations; None where a signal broke them off."""
        try:
            with self.stop.droppable(at_once=True):
                return [evaluator.evaluate(self.policy) for evaluator in self.evaluators]
        except KeyboardInterrupt:
            return None
        except Exception as error:
            if is_out_of_memory(error):
                where = f"the evaluation after update {self.update}"
                raise short_of_memory(error, where, self.algorithm, self.env) from error
            raise

    def _evaluate(self, stopping: bool) -> None:
        """Does the evaluations that are due, unless the run is to stop; a signal leaves them due."""
        if not self.evaluators:
            self.evaluation_due = False
            return
        if not self.evaluation_due or stopping:
            return
        with self.meter.phase("eval"):
            # Processes that share one network all have to call it, and find the same.
            every = self.ranks.agreed(self._measured() if self.ranks.main or self.ranks.sharded else None)
            if every is None:
                raise KeyboardInterrupt
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
        if self.ranks.main:
            with writing(self.folder):
                save_videos(self.folder, self.update, found, self._fps(), mp4=self.sample_mp4)
        self._append("eval.jsonl", [{**at, **row} for one in every for row in one.rows])
        self.watchers.evaluated(self.update, every, self._fps())
        self._watch(found)
        self.evaluation_due, self.evaluated_at = False, self.update
        names = {row["reward"] for row in found.rows} & {PROXY, GOLD}
        self.scores = {name: found.mean(name) for name in sorted(names, reverse=True)}
        self.kl = found.mean(KL)
        self.bar.evaluated(self.update, self._shown())
        self._keep_best(self.scores.get(PROXY, math.nan))

    def _shown(self) -> dict[str, float]:
        """The last evaluation's scores, and its KL to the reference where it was measured."""
        return self.scores if math.isnan(self.kl) else {**self.scores, "kl": self.kl}

    def _fps(self) -> float:
        spec = getattr(getattr(self.env, "model", None), "spec", None)
        return float(getattr(spec, "fps", 8.0))

    def _watch(self, found: Evaluation) -> None:
        """Writes down and says what the alarm finds in this evaluation, compared with all before it."""
        if self.alarm is None or not found.rows:
            return
        new = []
        if self.ranks.main:
            split = found.rows[0]["split"]
            rows = [row for row in read_rows(self.folder / "eval.jsonl") if row["split"] == split]
            new = [one for one in alarms(rows, self.alarm) if one["update"] == self.update]
        new = self.ranks.agreed(new)
        if new:
            self._append(ALARMS, new)
            self.alarmed = self.alarmed or self.alarm.stop
        for one in new:
            self.bar.say(message(one))
            self.watchers.tell("alarm", one, message(one))

    def _keep_best(self, reward: float) -> None:
        """Marks this update's checkpoint, and writes one if need be, where its reward is the highest so far."""
        if not self.update or not self.store.is_best(reward):
            return
        if self.saved_at != self.update:
            if self.checkpoint_every == 0 and not self._ended():
                return
            self._checkpoint()
        with writing(self.folder):
            if self.ranks.main:
                self.store.mark_best(self.update, reward)
            self.store.best_update, self.store.best_reward = self.update, reward

    def _checkpoint(self) -> None:
        """Writes one.

        Raises:
            RuntimeError: the weights of the processes have come apart.
        """
        self._check_together()
        with self.meter.phase("checkpoint"), writing(self.folder):
            state = {
                "update": self.update,
                "evaluation_due": self.evaluation_due,
                "evaluated_at": self.evaluated_at,
                "next_evaluation": self.schedule.next,
                "skipped": self.skipped,
                "skipped_in_row": self.skipped_in_row,
                "scores": self.scores,
                "kl": self.kl,
                "alarmed": self.alarmed,
                "halvings": self.halvings,
                "algorithm": self.algorithm.state_dict(),
                "meter": self.meter.state_dict(),
                "random": get_random_state(self.meter.device),
            }
            if self.ranks.main:
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
        self.halvings = [dict(one) for one in state.get("halvings", [])]
        if self.halvings:
            set_micro_batch(self.algorithm, self.halvings[-1]["micro_batch"])
        self.policy.load(path / "policy")
        self.algorithm.load_state_dict(state["algorithm"])
        self.meter.load_state_dict(state["meter"])
        set_random_state(state["random"], self.meter.device)
        self.update = self.saved_at = int(state["update"])
        self.evaluation_due = bool(state["evaluation_due"])
        self.evaluated_at = int(state["evaluated_at"])
        self.schedule.next = float(state["next_evaluation"])
        self.skipped, self.skipped_in_row = int(state["skipped"]), int(state["skipped_in_row"])
        self.scores, self.alarmed = dict(state["scores"]), bool(state["alarmed"])
        self.kl = float(state.get("kl", math.nan))

    def finish(self, name: str, reason: str) -> None:
        """Writes DONE, INTERRUPTED or FAILED with the last counts, those of a dropped update included."""
        if not self.ranks.main:
            return
        last = {key: value for key, value in self.meter.row(self.update, {}).items() if value is not None}
        last["skipped_updates"] = self.skipped
        self.watchers.tell("end", name)
        with writing(self.folder):
            replace_json(self.folder / name, {"reason": reason, **last})
