"""Reads run folders (see `algos.run` for their files) into arrays. Needs numpy only, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROXY, GOLD = "proxy", "gold"  # names of rewards in eval.jsonl
SCHEMA_VERSION = 1
_ENDINGS = ("DONE", "INTERRUPTED", "FAILED")
# Runs that differ in one of these measured different things and must not be drawn as one curve, or against each other.
_SAME = ("schema_version", "device", "gpu_name", "cpu_name", "cpu_threads", "dtype")
_SAME_TASK = (
    "reward_train", "model_id", "num_frames", "height_px", "width_px", "num_steps", "sampler", "noise_level",
    "guidance_scale", "prompts_test_sha256", "eval_prompt_ids", "eval_noise_seeds",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Run:
    """One training run as its folder tells it. `status`: "DONE", "INTERRUPTED", "FAILED" or "UNFINISHED"."""

    folder: Path
    about: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    status: str
    reason: str

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
    def label(self) -> str:
        """The algorithm's name, flagged if the run did not reach its end."""
        return self.algo if self.status == "DONE" else f"{self.algo} ({self.status.lower()})"

    def rewards(self) -> list[str]:
        """Names of the rewards that were evaluated, in the order of the file."""
        return list(dict.fromkeys(row["reward"] for row in self.evals))

    def updates(self) -> list[int]:
        """Updates at which there was an evaluation."""
        return sorted({row["update"] for row in self.evals})

    def curve(self, reward: str, x: str = "device_s") -> tuple[np.ndarray, np.ndarray]:
        """Cost [N] and mean reward over the fixed (prompt, noise seed) pairs [N], in the order of updates.

        Args:
            reward: a name out of `rewards()`.
            x: a cost column of eval.jsonl, such as "device_s" or "reward_queries".
        """
        cost, mean = [], []
        for update in self.updates():
            rows = [row for row in self.evals if row["update"] == update and row["reward"] == reward]
            values = [row["value"] for row in rows if row["value"] is not None]
            if rows:
                cost.append(rows[0][x])
                mean.append(np.mean(values) if values else np.nan)
        return np.array(cost, float), np.array(mean, float)

    def per_prompt(self, reward: str, update: int) -> dict[int, float]:
        """Mean over the noise seeds for each prompt whose scores were all finite."""
        found: dict[int, list[float | None]] = {}
        for row in self.evals:
            if row["update"] == update and row["reward"] == reward:
                found.setdefault(row["prompt_id"], []).append(row["value"])
        finite = {prompt: [value for value in values if value is not None] for prompt, values in found.items()}
        return {prompt: float(np.mean(v)) for prompt, v in finite.items() if len(v) == len(found[prompt])}

    def missing(self) -> int:
        """Evaluation scores that were not finite."""
        return sum(row["value"] is None for row in self.evals)

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
        ValueError: no run.json, another schema, or a broken line inside a file.
    """
    path = folder / "run.json"
    if not path.exists():
        raise ValueError(f"{folder} is no run: it holds no run.json")
    about = json.loads(path.read_text(encoding="utf-8"))
    if about.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema {about.get('schema_version')}, this version reads {SCHEMA_VERSION}: repeat the run"
        )
    status = next((name for name in _ENDINGS if (folder / name).exists()), "UNFINISHED")
    reason = "" if status == "UNFINISHED" else json.loads((folder / status).read_text(encoding="utf-8"))["reason"]
    return Run(folder, about, _lines(folder / "train.jsonl"), _lines(folder / "eval.jsonl"), status, reason)


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

    Raises:
        ValueError: device, dtype, schema, evaluation prompts or noise seeds, model, reward or sampling differ.
    """
    for where, names in (("run.json", _SAME), ("its task", _SAME_TASK)):
        for name in names:
            values = {json.dumps((run.about if where == "run.json" else run.task).get(name)) for run in runs}
            if len(values) > 1:
                raise ValueError(
                    f"these runs cannot be compared: '{name}' differs ({', '.join(sorted(values))}): "
                    "give a folder with runs of one kind"
                )
