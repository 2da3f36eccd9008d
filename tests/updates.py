"""Any algorithm of the zoo on any device: an update, its state into another one, and on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import algos
from algos.preference_sampling import build_preferences


def built(name: str, env: Any, folder: Path, small: Mapping[str, Any], pairs: Mapping[str, int]) -> Any:
    """The algorithm with its preset on a policy of its own.

    Args:
        name: of the zoo.
        env: made with the options that suit it.
        folder: of preference data.
        small: settings that replace those of the preset, where it has them.
        pairs: of `build_preferences`, for an algorithm that reads what is there.
    """
    algorithm_class, config_class = algos.load(name)
    policy = env.make_policy(lora_rank=4)
    config = config_class.preset("MovingShapes")
    known = {field.name for field in fields(config)}
    changes = {key: value for key, value in small.items() if key in known and getattr(config, key) is not None}
    if "folder" in known:
        changes["folder"] = str(folder)
    if name == "offline_dpo" and not any(folder.iterdir()):
        build_preferences(folder, env.derive(group_size=1), policy, **pairs)
    return algorithm_class(env, policy, replace(config, **changes))


def check_it_goes_on(build: Callable[[], Any], device: str) -> None:
    """Updates, moves the state into another algorithm, and compares what both do next."""
    algorithm = build()
    first = algorithm.update()
    assert all(math.isfinite(value) for value in first.values())
    parameters = algorithm.policy.trainable_parameters()
    assert parameters and all(p.device.type == device for p in parameters)
    state, weights = copy.deepcopy(algorithm.state_dict()), algorithm.policy.lora_state_dict()
    expected = algorithm.update()
    other = build()
    other.policy.load_lora_state_dict(weights)
    other.load_state_dict(state)
    found = other.update()
    assert found.keys() == expected.keys()
    if "reward_mean" in expected:  # kernels may not repeat to the last bit
        assert found["reward_mean"] == pytest.approx(expected["reward_mean"], rel=1e-2, abs=1e-3)
    assert all(torch.isfinite(p).all() for p in other.policy.trainable_parameters())
