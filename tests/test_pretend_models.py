"""Every family of models and every reward on a pretended CUDA device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.every_model import small_env
from tests.pretend_device import Waits, pretend_cuda
from tests.test_make_matrix import check_gradients, whole_way
from vdm_env.rewards import REWARDS

FAMILIES = (
    "VideoCrafter2",
    "OpenSora1.2",
    "AnimateDiff",
    "CogVideoX2B",
    "HunyuanVideo",
    "LTXVideo",
    "Mochi",
    "Wan2.2_A14B",
    "SVD",
)
"""One model each; all of them, with the steps of `make`, were run by hand."""


@pytest.fixture(scope="module")
def cuda() -> Iterator[Waits]:
    with warnings.catch_warnings(), pretend_cuda() as waits:
        warnings.filterwarnings("ignore", ".*random weights")
        yield waits


@pytest.fixture(scope="module")
def env(cuda: Waits) -> Any:
    return small_env("Wan2.1_1.3B-Brightness", device="cuda", prompts=["a girl dancing ballet"])


@pytest.mark.parametrize("model", FAMILIES)
def test_each_family_goes_the_whole_way(model: str, cuda: Waits) -> None:
    reward, gradients = whole_way(small_env(f"{model}-Brightness", device="cuda"))
    assert reward.is_cuda and all(g.is_cuda for g in gradients)
    check_gradients(gradients)


@pytest.mark.parametrize("name", list(REWARDS))
def test_each_reward_scores_and_gives_gradients_there(name: str, env: Any) -> None:
    twin = env.derive(reward=name, decode_frames=None, num_envs=1)
    latents = twin.reset(seed=0)[0]["latents"].requires_grad_()
    outcome = twin.mdp.outcome(latents, torch.tensor([0]), torch.tensor([5]))
    assert outcome.reward.is_cuda and outcome.video.is_cuda and all(p.is_cuda for p in outcome.parts.values())
    assert outcome.reward.requires_grad == REWARDS[name].differentiable
    if outcome.reward.requires_grad:
        (gradient,) = torch.autograd.grad(outcome.reward.sum(), latents)
        assert gradient.is_cuda and bool(torch.isfinite(gradient).all())
