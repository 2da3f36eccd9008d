"""The reward contract, held against every registered reward as published: real architectures, tiny and random."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdm_env import check_reward, make
from vdm_env.rewards import REWARDS, Chunked, RewardContext, select_frames

PROMPTS = ["playing piano in the rain", "riding scooter past a book"]
FRAMES = 4
READ_PROMPTS = {"HPS", "HPSv2", "HPSv2.1", "PickScore", "CLIP", "Action", "ViCLIP", "ImageReward"}
READ_PROMPTS |= {"VideoScore", "VideoAlign", "OmniScore"}
IGNORE_PROMPTS = {"Aesthetic", "AestheticV1", "Brightness", "JPEGCompressibility", "Compression", "Rainy", "Snowy"}
IGNORE_PROMPTS |= {"ObjectRemoval", "ObjectRemovalDINO", "VJEPA", "VJEPA2", "Motion", "JPEGSurrogate"}
# The chunk of these is a number of images or of videos.
CHUNKED = ["HPS", "HPSv2", "HPSv2.1", "PickScore", "CLIP", "Aesthetic", "AestheticV1", "Compression", "Rainy", "Snowy"]
CHUNKED += ["ObjectRemoval", "ObjectRemovalDINO", "VJEPA", "VJEPA2"]
CHUNKED += ["ViCLIP", "ImageReward", "Motion", "VideoScore", "VideoAlign"]
# Steps of finite differences: small where the score has kinks, large where transformers computes in float32 inside.
STEPS = {"Motion": 1e-8, "JPEGSurrogate": 1e-8, "VideoScore": 1e-3, "VideoAlign": 1e-3}

every_reward = pytest.mark.parametrize("name", sorted(REWARDS))
half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
differentiable = pytest.mark.parametrize("name", sorted(n for n, e in REWARDS.items() if e.differentiable))


def fresh(name: str, **changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return REWARDS[name].build(
            RewardContext(**({"weights": "random", "scale": "tiny", "seed": 5, "num_frames": FRAMES} | changes))
        )


@functools.cache
def built(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return fresh(name, dtype=dtype)


def videos(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (0.1 + 0.8 * torch.rand(2, FRAMES, 3, 20, 28, generator=generator, dtype=torch.float64)).to(dtype)


@every_reward
def test_contract(name: str) -> None:
    """Range, one finite float a video, batch independence, untouched input, gradients: `check_reward` has them all."""
    reward = built(name)
    assert (reward.name, reward.differentiable) == (name, REWARDS[name].differentiable)
    check_reward(reward, prompts=PROMPTS, size=(FRAMES, 20, 28))
    scores = reward(videos(), PROMPTS)
    assert scores.shape == (2,) and scores.dtype == torch.float32 and float(scores.std()) > 0
    assert select_frames(reward.frames, 16, 0).numel() >= 1


@every_reward
def test_each_video_is_scored_against_its_own_prompt(name: str) -> None:
    reward, video = built(name), videos()
    table = torch.stack([reward(v.expand(2, *v.shape), PROMPTS) for v in video])  # [video, prompt]
    torch.testing.assert_close(reward(video, PROMPTS), table.diagonal(), rtol=1e-4, atol=1e-5, check_stride=False)
    spread = float((table - table[:, :1]).abs().max())
    assert name not in READ_PROMPTS or spread > 1e-5
    assert name not in IGNORE_PROMPTS or spread < 1e-5


@differentiable
def test_gradient_equals_finite_differences(name: str) -> None:
    """In float64, along a random direction through two videos."""
    reward = built(name, torch.float64)
    video = videos(torch.float64).requires_grad_(True)
    scores = reward(video, PROMPTS)
    weights = torch.tensor([1.0, -0.5], dtype=scores.dtype)
    (gradient,) = torch.autograd.grad((weights * scores).sum(), video)
    direction = torch.randn(video.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = STEPS.get(name, 1e-6)
    with torch.no_grad():
        ends = [(weights * reward(video + s * h * direction, PROMPTS)).sum() for s in (1, -1)]
    numeric = (ends[0] - ends[1]) / (2 * h)
    assert scores.dtype == torch.float64 and abs(float(numeric)) > 1e-8
    rtol = 2e-2 if h > 1e-6 else 1e-4
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=rtol, atol=1e-7 if h < 1e-6 else 1e-8)


@every_reward
def test_same_seed_same_bits(name: str) -> None:
    state = torch.random.get_rng_state()
    first, second = built(name), fresh(name)
    assert torch.equal(first(videos(), PROMPTS), second(videos(), PROMPTS))
    assert torch.equal(first(videos(), PROMPTS), first(videos(), PROMPTS))
    assert torch.equal(state, torch.random.get_rng_state())


def _scale(name: str) -> float:
    return 100.0 if name in ("CLIP", "PickScore") else 1.0


def _same_way(given: Tensor, wanted: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(wanted.flatten().float(), given.flatten().float(), dim=0))


@half_types
@every_reward
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Networks and videos in half precision: scores stay float32 and near; the gradient is finite and points alike."""
    reward, rough = built(name), fresh(name, dtype=dtype)
    if isinstance(getattr(reward, "network", None), nn.Module):
        # Drawn in half precision: which numbers a seed gives there depends on the release of PyTorch.
        rough.network.load_state_dict(reward.network.state_dict())
    video, half = videos().requires_grad_(True), videos(dtype).requires_grad_(True)
    exact, near = reward(video, PROMPTS), rough(half, PROMPTS)
    assert near.dtype == torch.float32 and bool(torch.isfinite(near).all())
    torch.testing.assert_close(near, exact, rtol=0.05, atol=0.05 * _scale(name))
    with torch.no_grad():
        torch.testing.assert_close(rough(videos(), PROMPTS), exact, rtol=0.05, atol=0.05 * _scale(name))
    if reward.differentiable:
        wanted, given = torch.autograd.grad(exact.sum(), video)[0], torch.autograd.grad(near.sum(), half)[0]
        assert given.dtype == dtype and bool(torch.isfinite(given).all())
        assert _same_way(given, wanted) > 0.5


@half_types
@every_reward
def test_videos_in_half_precision_lose_nothing_more(name: str, dtype: torch.dtype) -> None:
    """A float32 network scores them as the same numbers in float32."""
    reward = built(name)
    half = videos(dtype).requires_grad_(True)
    whole = half.detach().float().requires_grad_(True)
    given, wanted = reward(half, PROMPTS), reward(whole, PROMPTS)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6 * _scale(name))
    if reward.differentiable:
        gradients = torch.autograd.grad(given.sum(), half)[0], torch.autograd.grad(wanted.sum(), whole)[0]
        assert _same_way(*gradients) > 0.99


@every_reward
def test_any_reward_a_few_videos_at_a_time(name: str) -> None:
    reward, video = built(name), videos().requires_grad_(True)
    whole, parts = reward(video, PROMPTS), Chunked(reward, 1)(video, PROMPTS)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6 * _scale(name))
    if reward.differentiable:
        wanted, given = (torch.autograd.grad(s.sum(), video)[0] for s in (whole, parts))
        torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-6 * _scale(name))


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_change_neither_scores_nor_gradients(name: str) -> None:
    reward, video = fresh(name), videos().requires_grad_(True)
    whole = reward(video, PROMPTS)
    (gradient,) = torch.autograd.grad(whole.sum(), video)
    reward.chunk_size = 3 if reward.frames == "all" else 1
    parts = reward(video, PROMPTS)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(parts.sum(), video)[0], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["ObjectRemoval", "VJEPA", "ViCLIP", "ImageReward"])
def test_impossible_chunks_are_refused(name: str) -> None:
    reward = fresh(name)
    reward.chunk_size = 0
    with pytest.raises(ValueError, match="chunk_size must be at least 1.*got 0"):
        reward(videos(), PROMPTS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["ObjectRemoval", "VJEPA2", "ViCLIP"])
def test_environments_take_published_rewards_with_random_weights(name: str) -> None:
    env = make(f"MovingShapes-{name}", weights="random", scale="tiny", num_envs=2, num_steps=1, seed=1)
    assert env.mdp.reward.name == name
    _, reward, terminated, _, _ = env.step(env.make_policy()(env.reset(seed=0)[0]))
    assert bool(terminated.all()) and reward.shape == (2,) and bool(torch.isfinite(reward).all())
    low, high = env.mdp.reward.range
    assert bool(((reward >= low) & (reward <= high)).all())
