"""Every algorithm of the zoo on a CUDA device: an update, its state into another one, and on."""

from __future__ import annotations

import copy
import math
from dataclasses import fields, replace

import pytest
import torch

import algos
import vdm_env
from algos.preference_sampling import build_preferences



SMALL = {
    "videos_per_update": 16,
    "videos_per_rollout": 16,
    "groups_per_update": 2,
    "prompts": 2,
    "micro_batch": 8,
    "num_inner_epochs": 1,
    "updates_per_rollout": 1,
}


def built(name, folder):
    """The algorithm with its preset, made small where it has such a setting."""
    algorithm_class, config_class = algos.load(name)
    options = {"num_steps": 5, "guidance_scale": 1.0, "num_envs": 8, **algos.ZOO[name].env}
    env = vdm_env.make("MovingShapes-HPS", device="cpu", **options)
    policy = env.make_policy(lora_rank=4)
    config = config_class.preset("MovingShapes")
    known = {field.name for field in fields(config)}
    changes = {key: value for key, value in SMALL.items() if key in known and getattr(config, key) is not None}
    if "folder" in known:
        changes["folder"] = str(folder)
    if name == "offline_dpo" and not any(folder.iterdir()):
        sampler = env.derive(group_size=1)
        build_preferences(folder, sampler, policy, groups=8, candidates=4, groups_per_shard=8)
    return algorithm_class(env, policy, replace(config, **changes))


@pytest.mark.parametrize("name", sorted(algos.ZOO))
def test_it_runs_and_goes_on_from_a_state(name, tmp_path):
    algorithm = built(name, tmp_path)
    first = algorithm.update()
    assert all(math.isfinite(value) for value in first.values())
    parameters = algorithm.policy.trainable_parameters()
    assert parameters and all(p.device.type == "cpu" for p in parameters)
    state, weights = copy.deepcopy(algorithm.state_dict()), algorithm.policy.lora_state_dict()
    expected = algorithm.update()
    other = built(name, tmp_path)
    other.policy.load_lora_state_dict(weights)
    other.load_state_dict(state)
    found = other.update()
    assert found.keys() == expected.keys()
    if "reward_mean" in expected:  # kernels may not repeat to the last bit
        assert found["reward_mean"] == pytest.approx(expected["reward_mean"], rel=1e-2, abs=1e-3)
    assert all(torch.isfinite(p).all() for p in other.policy.trainable_parameters())
