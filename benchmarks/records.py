"""Reads run folders (see `algos.run` for their files) into arrays. Needs numpy only, no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import one_curve, plan_file

PROXY, GOLD = "proxy", "gold"  # names of rewards in eval.jsonl
KL, DIVERSITY, MOTION = "kl_ref_nats", "diversity", "motion"  # what else is measured there, under "reward"
HELDOUT = "heldout/"  # in front of the names of rewards that are evaluated and never optimised
SCHEMA_VERSION = 1
_WAY_OUT = "put the file back, or remove the run's folder and repeat the run"
_ENDINGS = ("DONE", "INTERRUPTED", "FAILED")
# Runs that differ in one of these measured different things and must not be drawn as one curve, or against each other.
_SAME = (
    "schema_version", "device", "gpu_name", "num_gpus_policy", "num_gpus_reward", "cpu_name", "cpu_threads", "dtype",
)  # fmt: skip
_SAME_TASK = (
    "reward_train", "model_id", "num_frames", "height_px", "width_px", "num_steps", "sampler", "noise_level",
    "guidance_scale", "guidance_interval", "prompts_train_sha256", "prompts_test_sha256", "eval_prompt_ids",
    "eval_noise_seeds", "eval_split", "heldout", "diversity_features", "process",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Run:
    """One training run as its folder tells it. `status`: "DONE", "INTERRUPTED", "FAILED" or "UNFINISHED".

    `evals` are the evaluations on the main split only; those on other splits are in `further`, {split: rows}, so that
    no mean ever mixes them. `alarms` are the rows of alarms.jsonl.
    """

    folder: Path
    about: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    status: str
    reason: str
    further: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    alarms: list[dict[str, Any]] = field(default_factory=list)

    @property
    def algo(self) -> str:
        return str(self.about["algo"])

    @property
    def seed(self) -> int:
        return int(self.about["seed"])

    @property
    def task(self) -> dict[str, Any]:
        return self.about.get("task", {})

    @property
    def env_id(self) -> str:
        return str(self.task.get("env_id", "-"))

    @property
    def split(self) -> str:
        """The split whose prompts the evaluations are on."""
        return str(self.evals[0].get("split", "fixed")) if self.evals else "fixed"

    @property
    def label(self) -> str:
        """The algorithm's name, flagged if the run did not reach its end."""
        return self.algo if self.status == "DONE" else f"{self.algo} ({self.status.lower()})"

    def rewards(self) -> list[str]:
        """Names of what was evaluated, in the order of the file."""
        return list(dict.fromkeys(row["reward"] for row in self.evals))

    def updates(self) -> list[int]:
        """Updates at which there was an evaluation."""
        return sorted({row["update"] for row in self.evals})

    @cached_property
    def _by_evaluation(self) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
        """Rows by (split, reward, update)."""
        found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
        for split, rows in ((self.split, self.evals), *self.further.items()):
            for row in rows:
                found.setdefault((split, row["reward"], row["update"]), []).append(row)
        return found

    def rows(self, reward: str, update: int, split: str | None = None) -> list[dict[str, Any]]:
        """What one evaluation found for one reward; on the main split unless another one is given."""
        return self._by_evaluation.get((split or self.split, reward, update), [])

    def mean(self, reward: str, update: int, split: str | None = None) -> float:
        """Mean over the fixed (prompt, noise seed) pairs of one evaluation; NaN where no score was finite."""
        values = [row["value"] for row in self.rows(reward, update, split) if row["value"] is not None]
        return float(np.mean(values)) if values else float("nan")

    def curve(self, reward: str, x: str = "device_s", split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Cost [N] and mean reward over the fixed (prompt, noise seed) pairs [N], in the order of updates.

        Args:
            reward: a name out of `rewards()`.
            x: a cost column of eval.jsonl, such as "device_s" or "reward_queries"; evaluations without it are left
                out.
            split: of the prompts; None: the main one.
        """
        at = [update for update in self.updates() if self.cost(update, x) is not None]
        at = [update for update in at if self.rows(reward, update, split)]
        cost = [self.cost(update, x) for update in at]
        return np.array(cost, float), np.array([self.mean(reward, update, split) for update in at], float)

    def cost(self, update: int, x: str = "device_s") -> float | None:
        """What the run had cost at an evaluation; None where that was not recorded."""
        return next((row.get(x) for row in self.evals if row["update"] == update), None)

    def per_prompt(self, reward: str, update: int) -> dict[int, float]:
        """Mean over the noise seeds for each prompt whose scores were all finite."""
        found: dict[int, list[float | None]] = {}
        for row in self.rows(reward, update):
            found.setdefault(row["prompt_id"], []).append(row["value"])
        finite = {prompt: [value for value in values if value is not None] for prompt, values in found.items()}
        return {prompt: float(np.mean(v)) for prompt, v in finite.items() if len(v) == len(found[prompt])}

    def missing(self) -> int:
        """Evaluation scores that were not finite."""
        return sum(row["value"] is None for row in self.evals)

    def diverged(self) -> bool:
        """Whether the last evaluation found no finite reward at all."""
        return bool(self.updates()) and bool(np.isnan(self.mean(PROXY, self.updates()[-1])))

    def device_s(self) -> float:
        """Device-seconds spent so far."""
        costs = [row["device_s"] for row in (*self.evals, *self.train)]
        return float(max(costs, default=0.0))

    def samples(self, update: int) -> tuple[np.ndarray, list[tuple[int, int]], list[str]] | None:
        """Videos uint8 [n, F, H, W, 3], their (prompt_id, noise_seed) and prompts; None if none were kept."""
        path = self.folder / "samples" / f"eval_{update:06d}.npz"
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as kept:
            pairs = list(zip(kept["prompt_ids"].tolist(), kept["noise_seeds"].tolist(), strict=True))
            return kept["videos"], pairs, [str(text) for text in kept["prompts"]]


def read_run(folder: Path) -> Run:
    """Reads one run, also one that is still going on: a last line that is not complete yet is left out.

    Raises:
        ValueError: no run.json, another schema, a broken file, or a broken line inside one.
    """
    path = folder / "run.json"
    if not path.exists():
        raise ValueError(f"{folder} is no run: it holds no run.json")
    about = json_object(path)
    if about.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema {about.get('schema_version')}, this version reads {SCHEMA_VERSION}: repeat the run"
        )
    status = next((name for name in _ENDINGS if (folder / name).exists()), "UNFINISHED")
    reason = "" if status == "UNFINISHED" else str(json_object(folder / status).get("reason", ""))
    by_split: dict[str, list[dict[str, Any]]] = {}
    for row in _lines(folder / "eval.jsonl"):
        by_split.setdefault(str(row.get("split", "fixed")), []).append(row)
    main = str(about.get("task", {}).get("eval_split") or next(iter(by_split), "fixed"))
    return Run(
        folder, about, _lines(folder / "train.jsonl"), by_split.pop(main, []), status, reason, by_split,
        _lines(folder / "alarms.jsonl"),
    )  # fmt: skip


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file is broken, or holds something else; the message names it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}; {_WAY_OUT}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is broken: it holds {type(found).__name__}, expected an object; {_WAY_OUT}")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is broken: {error}") from None
    return rows


def read_runs(root: str | Path) -> list[Run]:
    """All runs below a folder that have at least one evaluation, by algorithm and seed.

    Raises:
        ValueError: there is none.
    """
    folders = sorted(path.parent for path in Path(root).rglob("run.json"))
    runs = [run for run in map(read_run, folders) if run.evals]
    if not runs:
        raise ValueError(f"no run with an evaluation below {root}: start one with `python -m benchmarks.demo`")
    return sorted(runs, key=lambda run: (run.algo, run.seed))


def by_algorithm(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs grouped by algorithm, in the given order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.algo, []).append(run)
    return groups


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuses runs that measured different things.

    Runs of several environments are compared within each of them only, so their tasks may differ; the device may not.
    What a run.json does not say counts as None.

    Raises:
        ValueError: device, number of devices, dtype or schema differ; within one environment, prompts of training or
            evaluation, noise seeds, model, reward, held-out rewards or sampling differ; runs of one algorithm, which
            are one curve, differ in their settings or budgets (`benchmarks.one_curve`); the costs of a CPU were
            counted in two ways; or a seed was run twice.
    """
    _same("run.json", _SAME, runs, lambda run, name: run.about.get(name))
    newer = {"train_s" in run.train[-1] for run in runs if run.train and not run.about.get("gpu_name")}
    if len(newer) > 1:
        raise ValueError(
            "these runs cannot be compared: some count a CPU's device_s in CPU-seconds, older ones in wall seconds "
            "(their train.jsonl has no train_s): repeat the older ones"
        )
    for group in by_task(runs).values():
        # No list and an empty one are both no held-out rewards.
        _same("its task", _SAME_TASK, group, lambda run, name: None if run.task.get(name) == [] else run.task.get(name))
        seen: dict[tuple[str, int], Path] = {}
        for run in group:
            first = seen.setdefault((run.algo, run.seed), run.folder)
            if first != run.folder:
                raise ValueError(
                    f"{first} and {run.folder} are both {run.algo} with seed {run.seed} on {run.env_id}: a seed counts "
                    "once, remove one of them"
                )
        for algo, of_one in by_algorithm(group).items():
            if keys := one_curve.differing([run.about for run in of_one]):
                raise ValueError(
                    f"the runs of {algo} on {of_one[0].env_id} are one curve, and were made with different settings: "
                    f"{'; '.join(keys)}. Give a folder with runs of one kind, or repeat those that differ"
                )


def _same(where: str, names: Sequence[str], runs: Sequence[Run], value: Callable[[Run, str], Any]) -> None:
    for name in names:
        values = {json.dumps(value(run, name)) for run in runs}
        if len(values) > 1:
            raise ValueError(
                f"these runs cannot be compared: '{name}' differs in {where} ({', '.join(sorted(values))}): "
                "give a folder with runs of one kind"
            )


def by_task(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs grouped by environment, in the given order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.env_id, []).append(run)
    return groups


def read_plan(root: str | Path) -> dict[str, Any]:
    """What was planned before the runs: the benchmark.json in or below a folder (see `benchmarks.plan.Benchmark`).

    Returns:
        Its fields; empty where the runs belong to no planned benchmark.

    Raises:
        ValueError: there are several, whose runs must not be mixed, or the file is broken.
    """
    found = sorted(path.parent for path in Path(root).rglob(plan_file.NAME))
    if len(found) > 1:
        names = ", ".join(path.as_posix() for path in found)
        raise ValueError(f"{root} holds several benchmarks: give the folder of one of them ({names})")
    return (plan_file.read(found[0]) or {}) if found else {}
