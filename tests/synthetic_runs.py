"""Run folders as training writes them, with made-up numbers: for tests of what is read from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = 6
TEXTS = ("a red circle moving left", "a <blue> square", "a green star")


def write_run(
    root: Path,
    algo: str,
    *,
    seed: int = 0,
    gain: float = 0.3,
    gold: float = 0.1,
    end: float = 60.0,
    status: str = "DONE",
    task: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
    spread: float = 0.01,
    evaluations: int = 5,
    queries: int = 40,
    full: bool = False,
    alarms: Sequence[str] = (),
    nan_from: int | None = None,
) -> Path:
    """A run whose reward rises by `gain` and whose gold score changes by `gold` up to `end` device-seconds.

    Args:
        root: folder of the runs.
        algo: its label.
        seed: of the run; the untrained model is the same for all.
        gain: of the reward on test prompts.
        gold: change of the gold score.
        end: device-seconds of the last evaluation.
        status: "DONE", "FAILED", "INTERRUPTED" or "UNFINISHED".
        task: what its task says besides.
        about: what its run.json says besides.
        spread: standard deviation of the noise of scores.
        evaluations: the first one counts.
        queries: reward queries between two evaluations.
        full: also held-out rewards, KL, diversity, motion, train prompts and operations counted.
        alarms: names of alarms that went off.
        nan_from: update from which on no reward is finite.
    """
    env_id = (task or {}).get("env_id", "Task")
    folder = root / algo.replace(" ", "_") / env_id / f"seed_{seed}"
    (folder / "samples").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**_about(algo, seed, task or {}, full), **(about or {})}))
    rng = np.random.default_rng([seed, *algo.encode()])
    base = np.random.default_rng(7).normal(0.2, 0.1, PROMPTS)  # the untrained model, the same in every run
    train, evals = [], []
    for index, part in enumerate(np.linspace(0, 1, evaluations)):
        update = 5 * index
        at: dict[str, Any] = {"update": update, "device_s": end * part, "reward_queries": queries * index}
        if full:
            at |= {"flops": 3e12 * end * part, "denoiser_flops": 2e12 * end * part}
        for prompt in range(PROMPTS):
            noise = rng.normal(0, spread) if index else 0.0
            for reward, change in (("proxy", gain), ("gold", gold)):
                value = float(base[prompt] + change * part + noise)
                missing = reward == "proxy" and nan_from is not None and update >= nan_from
                evals.append({**at, **_row("test", reward, prompt, None if missing else value)})
            if full:
                evals += [{**at, **row} for row in _beside(prompt, float(base[prompt]), gain, part, noise)]
        if index:
            train.append({**at, **_train_row(index, part, end, full)})
        video = rng.integers(0, 255, (3, 4, 16, 16, 3)).astype(np.uint8)
        np.savez(
            folder / "samples" / f"eval_{update:06d}.npz",
            videos=video,
            prompt_ids=np.arange(3),
            noise_seeds=np.zeros(3, int),
            prompts=np.array(TEXTS),
        )
    _write_lines(folder / "train.jsonl", train)
    _write_lines(folder / "eval.jsonl", evals)
    if alarms:
        _write_lines(folder / "alarms.jsonl", [{"update": 5, "alarm": name} for name in alarms])
    if status != "UNFINISHED":
        (folder / status).write_text(json.dumps({"reason": "budget" if status == "DONE" else "Error: x"}))
    return folder


def _about(algo: str, seed: int, task: dict[str, Any], full: bool) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "algo": algo,
        "seed": seed,
        "config": {"learning_rate": 1e-4},
        "budget_device_s": 60.0,
        "budget_updates": None,
        "device": "cpu",
        "gpu_name": None,
        "cpu_name": "A CPU",
        "cpu_threads": 2,
        "dtype": "float32",
        "python": "3.11",
        "torch": "2",
        "packages": {"numpy": "2"},
        "git_commit": "abc",
        "git_dirty": True,
        "task": {
            "env_id": "MovingShapes-HPS",
            "reward_train": "MovingShapes-HPS (own small weights)",
            "eval_prompt_ids": list(range(PROMPTS)),
            "eval_noise_seeds": [0],
            "prompts_test_sha256": "p",
            "question": "Which <one> is better & why?",
            "limits": ["A limit of the task."],
            "command": "python -m benchmarks.demo --seed 0",
            **({"eval_split": "test", "eval_splits": ["test", "train"], "heldout": ["A", "B"]} if full else {}),
            **task,
        },
    }


def _row(split: str, reward: str, prompt: int, value: float | None, noise_seed: int | None = 0) -> dict[str, Any]:
    return {"split": split, "reward": reward, "prompt_id": prompt, "noise_seed": noise_seed, "value": value}


def _beside(prompt: int, base: float, gain: float, part: float, noise: float) -> list[dict[str, Any]]:
    """What newer logs hold beside the reward and the gold score."""
    return [
        _row("test", "heldout/A", prompt, 5 + gain * part + noise),
        _row("test", "heldout/B", prompt, 0.4 - 0.2 * gain * part + noise),
        _row("test", "kl_ref_nats", prompt, 300 * abs(gain) * part**2),
        _row("test", "diversity", prompt, 0.5 - 0.3 * abs(gain) * part, noise_seed=None),
        _row("test", "motion", prompt, 1.5 - gain * part),
        # 100 higher, so that a mean that mixed the splits would be seen.
        _row("train", "proxy", prompt, 100 + base + 1.5 * gain * part + noise),
    ]


def _train_row(index: int, part: float, end: float, full: bool) -> dict[str, Any]:
    row = {
        "videos_sampled": 40 * index, "denoiser_forwards": 400 * index, "denoiser_backwards": 40 * index,
        "rollout_s": 20 * part if full else None, "decode_s": 5 * part, "reward_s": 5 * part,
        "update_s": (30 if full else 50) * part, "peak_rss_gib": 1.5, "peak_allocated_gib": None, "cpu_s": end * part,
    }  # fmt: skip
    return {**row, **({"train_s": 60 * part} if full else {})}


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_benchmark(root: Path, labels: Sequence[str], **fields: Any) -> None:
    """A benchmark.json with arms of these labels."""
    arms = [{"label": label, "algo": label, "evaluate_as_trained": False} for label in labels]
    (root / "benchmark.json").write_text(
        json.dumps({"schema_version": 1, "name": root.name, "arms": arms, "seeds": [0, 1, 2], **fields})
    )
