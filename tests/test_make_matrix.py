"""`make(id, weights="random", scale="tiny")` for every model with one reward and every reward with one model.

Nothing else is given: no size, no number of steps, no prompts. Each goes the whole way: reset, rollout, reward, and the
reward's gradient back into the policy. Each is meant to take less than 30 seconds on two CPU cores; what is tested is
what that follows from, the number of network calls and the size of the videos.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.every_model import NAMES
from vdm_env import make
from vdm_env.models import MODELS
from vdm_env.models.base import TINY_STEPS
from vdm_env.rewards import REWARDS

MODEL, REWARD = "Wan2.1_1.3B", "Brightness"
"""The smallest of each."""
TRAINED_STEPS = 10
"""Of the embedded models, which are small as they are."""
MOST_PIXELS = 17 * 64 * 64
"""Of a video; of 50 guided steps at 320x512x16 each takes about a second."""


def literally(env_id: str) -> Any:
    """`make` with no more than this."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*random weights")
        return make(env_id, weights="random", scale="tiny")


def whole_way(env: Any) -> tuple[Tensor, list[Tensor]]:
    """Reward [1] of a rollout and, if there is one, its gradient by parameter."""
    policy = env.make_policy(lora_rank=1)
    obs, _ = env.reset(seed=0)
    assert obs["latents"].shape == (1, *env.mdp.latent_shape)
    for step in range(env.num_steps):
        obs, reward, terminated, truncated, info = env.step(policy(obs))
        assert bool(terminated) == (step == env.num_steps - 1) and not bool(truncated)
    assert reward.shape == (1,) and reward.dtype == torch.float32 and bool(torch.isfinite(reward))
    video = info["video"]
    assert video.shape[:1] == (1,) and video.shape[2:] == (3, env.mdp.height, env.mdp.width)
    assert float(video.min()) >= 0 and float(video.max()) <= 1
    if not reward.requires_grad:
        return reward, []
    gradients = torch.autograd.grad(reward.sum(), policy.trainable_parameters(), allow_unused=True)
    return reward, [gradient for gradient in gradients if gradient is not None]


def check_gradients(gradients: list[Tensor]) -> None:
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients), "no gradient of the reward reaches the policy"


def check_cost(env: Any) -> None:
    """At most ten guided steps, on a small video."""
    assert env.num_steps <= (TINY_STEPS if MODELS[env.config.id.partition("-")[0]].world is None else TRAINED_STEPS)
    assert 0 < env.mdp.counters.denoiser_forwards <= 2 * env.num_steps
    frames, height, width = env.config.size
    assert frames * height * width <= MOST_PIXELS


@pytest.mark.parametrize("model", NAMES)
def test_every_model(model: str) -> None:
    env = literally(f"{model}-{REWARD}")
    _, gradients = whole_way(env)
    check_gradients(gradients)
    check_cost(env)


@pytest.mark.parametrize("reward", list(REWARDS))
def test_every_reward(reward: str) -> None:
    env = literally(f"{MODEL}-{reward}")
    score, gradients = whole_way(env)
    assert score.requires_grad == REWARDS[reward].differentiable == env.config.reward.differentiable
    if REWARDS[reward].differentiable:
        check_gradients(gradients)
    check_cost(env)
