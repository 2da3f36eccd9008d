"""Every algorithm of the zoo on a CUDA device; `tests/test_pretend_device.py` does the same without one."""

from __future__ import annotations

from pathlib import Path

import pytest

import algos
import vdm_env
from tests.updates import built, check_it_goes_on

pytestmark = pytest.mark.gpu

SMALL = {
    "videos_per_update": 16,
    "videos_per_rollout": 16,
    "groups_per_update": 2,
    "prompts": 2,
    "micro_batch": 8,
    "num_inner_epochs": 1,
    "updates_per_rollout": 1,
}
PAIRS = {"groups": 8, "candidates": 4, "groups_per_shard": 8}


@pytest.mark.parametrize("name", sorted(algos.ZOO))
def test_it_runs_and_goes_on_from_a_state(name: str, tmp_path: Path) -> None:
    options = {"num_steps": 5, "guidance_scale": 1.0, "num_envs": 8, **algos.ZOO[name].env}

    def build() -> object:
        return built(name, vdm_env.make("MovingShapes-HPS", device="cuda", **options), tmp_path, SMALL, PAIRS)

    check_it_goes_on(build, "cuda")
