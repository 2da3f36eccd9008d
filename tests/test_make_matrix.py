"""`make(id, weights="random", scale="tiny")` for every model with one reward and every reward with one model.

Each goes the whole way: reset, rollout, reward, and the reward's gradient back into the policy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.every_model import NAMES, small_env
from vdm_env.rewards import REWARDS

MODEL, REWARD = "Wan2.1_1.3B", "Brightness"
"""The smallest of each."""
PROMPTS = ["a person playing the piano beside a book"]
"""Names an action and an object, which some rewards want."""


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
    assert video.shape[:1] == (1,) and video.shape[2:] == (3, *env.mdp.model.decode(obs["latents"]).shape[-2:])
    assert float(video.detach().min()) >= 0 and float(video.detach().max()) <= 1
    if not reward.requires_grad:
        return reward, []
    gradients = torch.autograd.grad(reward.sum(), policy.trainable_parameters(), allow_unused=True)
    return reward, [gradient for gradient in gradients if gradient is not None]


def check_gradients(gradients: list[Tensor]) -> None:
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients), "no gradient of the reward reaches the policy"


@pytest.mark.parametrize("model", NAMES)
def test_every_model(model: str) -> None:
    _, gradients = whole_way(small_env(f"{model}-{REWARD}", decode_frames="first"))
    check_gradients(gradients)


@pytest.mark.parametrize("reward", list(REWARDS))
def test_every_reward(reward: str) -> None:
    env = small_env(f"{MODEL}-{reward}", prompts=PROMPTS)
    score, gradients = whole_way(env)
    assert score.requires_grad == REWARDS[reward].differentiable == env.config.reward.differentiable
    if REWARDS[reward].differentiable:
        check_gradients(gradients)
