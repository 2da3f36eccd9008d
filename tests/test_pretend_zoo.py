"""Every algorithm of the zoo on a pretended CUDA device, and `vdm-env train` there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import algos
import vdm_env
from benchmarks.commands.train import main
from tests.pretend_device import Waits, pretend_cuda
from tests.updates import built, check_it_goes_on

SMALL = {
    "videos_per_update": 2,
    "videos_per_rollout": 2,
    "groups_per_update": 1,
    "prompts": 1,
    "micro_batch": 2,
    "num_inner_epochs": 1,
    "updates_per_rollout": 1,
    "optimiser_steps": 1,
    "pairs_per_step": 1,
    "candidates": 2,
}
PAIRS = {"groups": 2, "candidates": 2, "groups_per_shard": 2}


@pytest.fixture(scope="module")
def cuda() -> Iterator[Waits]:
    with warnings.catch_warnings(), pretend_cuda() as waits:
        yield waits


@pytest.fixture(scope="module")
def env(cuda: Waits) -> Any:
    return vdm_env.make("MovingShapes-HPS", device="cuda", num_envs=2, num_steps=2, guidance_scale=1.0)


@pytest.mark.parametrize("name", sorted(algos.ZOO))
def test_it_runs_and_goes_on_from_a_state(name: str, env: Any, tmp_path: Path) -> None:
    options = dict(algos.ZOO[name].env)
    if "group_size" in options:
        options["group_size"] = 2

    def build() -> Any:
        return built(name, env.derive(**options), tmp_path, SMALL, PAIRS)

    check_it_goes_on(build, "cuda")


def test_train_command(cuda: Waits, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = [
        "--env", "MovingShapes-HPS", "--algo", "vader", "--device", "cuda", "--updates", "2", "--num-envs", "1",
        "--num-steps", "2", "--num-frames", "2", "--lora-rank", "1", "--set", "videos_per_update=1",
        "--eval-prompts", "1", "--eval-seeds", "1", "--eval-videos", "1", "--checkpoint-every", "1", "--out", str(out),
    ]  # fmt: skip
    assert main(given) == 0
    assert main([*given, "--resume"]) == 0
    (folder,) = (file.parent for file in out.rglob("run.json"))
    about = json.loads((folder / "run.json").read_text())
    assert about["device"] == "cuda" and about["gpu_name"] == "Pretended 0" and about["num_gpus_policy"] == 1
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2]
    assert all(row["peak_allocated_gib"] == 3 and row["device_s"] == row["train_s"] > 0 for row in rows)
