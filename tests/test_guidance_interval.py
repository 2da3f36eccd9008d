"""Guidance at some noise levels only: which they are, what they cost, and that a batch may be on both sides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from algos.ddpo import DDPO, DDPOConfig
from tests.every_model import small_env
from tests.models import tiny_env
from tests.svd import svd_env, tiny_svd
from tests.weights import trained
from vdm_env import make
from vdm_env.guidance import as_interval, inside, relative_noise
from vdm_env.models.svd import SVD_SCHEDULE
from vdm_env.models.unet3d import LVDM_SCHEDULE, SD_SCHEDULE
from vdm_env.schedule import FlowSchedule


def levels(env: Any) -> list[float]:
    return relative_noise(env.mdp.schedule, env.mdp.base_table.timesteps).tolist()


def states(env: Any, steps: list[int]) -> dict[str, Tensor]:
    """An observation whose videos stand at these steps of the grid."""
    return env.reset(seed=[5] * len(steps), options={"step": torch.tensor(steps), "prompt_ids": [0] * len(steps)})[0]


def forwards(env: Any, call: Any) -> tuple[Any, int]:
    before = env.mdp.counters.denoiser_forwards
    return call(), env.mdp.counters.denoiser_forwards - before


def test_noise_in_relation_to_the_clean_latents() -> None:
    t = torch.tensor([0.0, 500.0, 999.0])
    alpha = SD_SCHEDULE.alphas_cumprod.double()[t.long()]
    torch.testing.assert_close(relative_noise(SD_SCHEDULE, t), ((1 - alpha) / alpha).sqrt())
    assert LVDM_SCHEDULE.latent_scale is not None
    scale = LVDM_SCHEDULE.latent_scale.double()[t.long()]
    torch.testing.assert_close(relative_noise(LVDM_SCHEDULE, t), ((1 - alpha) / alpha).sqrt() / scale)
    flow = relative_noise(FlowSchedule(shift=3.0), torch.tensor([0.0, 250.0, 500.0, 1000.0]))
    assert flow.tolist() == [0.0, pytest.approx(1 / 3), 1.0, math.inf]
    sigma = torch.tensor([0.002, 1.0, 700.0], dtype=torch.float64)
    torch.testing.assert_close(relative_noise(SVD_SCHEDULE, sigma.log() / 4), sigma)
    assert inside(FlowSchedule(), torch.tensor([250.0, 500.0, 600.0, 1000.0]), (1 / 2, 1.5)).tolist() == [
        False, True, True, False,
    ]  # fmt: skip
    assert inside(FlowSchedule(), torch.tensor([500.0, 1000.0]), (1.0, math.inf)).tolist() == [False, True]


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_an_interval_around_everything_changes_nothing(kind: str) -> None:
    env = tiny_env(kind, guidance_scale=3.0)
    obs = states(env, [1, 2])
    want, cost = forwards(env, lambda: trained(env).mean(obs))
    got, same = forwards(env, lambda: trained(env, guidance_interval=(0.0, math.inf)).mean(obs))
    assert torch.equal(got, want) and cost == same == 4


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_a_batch_on_both_sides(kind: str) -> None:
    """Every video gets what it gets alone; only the guided ones cost a second pass; gradients add up."""
    env = tiny_env(kind, num_envs=4, num_steps=4)
    noise = levels(env)
    interval = (noise[2] * 1.01, noise[1] * 1.01)  # step 1 alone
    policy = trained(env, guidance_scale=3.0, guidance_interval=interval)
    everywhere = trained(env, guidance_scale=3.0)
    nowhere = trained(env, guidance_scale=1.0)
    for steps in ([0] * 4, [1] * 4, [2] * 4):
        obs = states(env, steps)
        got, cost = forwards(env, lambda o=obs: policy.mean(o))
        want = (everywhere if steps[0] == 1 else nowhere).mean(obs)
        assert torch.equal(got, want) and cost == (8 if steps[0] == 1 else 4)
    obs = states(env, [3, 1, 0, 1])
    got, cost = forwards(env, lambda: policy.mean(obs))
    assert cost == 6
    guided, plain = everywhere.mean(obs), nowhere.mean(obs)
    want = torch.stack([plain[0], guided[1], plain[2], guided[3]])
    assert float((guided - plain).detach().abs().max()) > 1e-3, "guidance does something here"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    mine = torch.autograd.grad((got * weight).sum(), policy.trainable_parameters())
    parts = [
        torch.autograd.grad((guided[[1, 3]] * weight[[1, 3]]).sum(), everywhere.trainable_parameters()),
        torch.autograd.grad((plain[[0, 2]] * weight[[0, 2]]).sum(), nowhere.trainable_parameters()),
    ]
    for found, one, other in zip(mine, *parts, strict=True):
        torch.testing.assert_close(found, one + other, rtol=1e-3, atol=1e-4)


def test_the_update_sees_what_the_rollout_saw() -> None:
    env = tiny_env("unet", num_envs=2, num_steps=4, guidance_scale=3.0)
    noise = levels(env)
    env = env.derive(guidance_interval=(noise[3], noise[0]))  # all but the last step
    policy = trained(env)
    before = env.mdp.counters.denoiser_forwards
    config = DDPOConfig(videos_per_rollout=2, updates_per_rollout=1, advantage="batch")
    metrics = DDPO(env, policy, config).update()
    noisy = int(env.mdp.base_table.stochastic[:3].sum()), int(env.mdp.base_table.stochastic[3:].sum())
    rollout, update = 2 * (2 * 3 + 1), 2 * (2 * noisy[0] + noisy[1])
    assert env.mdp.counters.denoiser_forwards - before == rollout + update
    assert metrics["ratio_first_error"] == 0.0 and metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6)


def test_guidance_of_frames_and_of_experts() -> None:
    """SVD guides each frame differently, Wan 2.2's networks have scales of their own."""
    env = svd_env(tiny_svd(), num_steps=4)
    noise = levels(env)
    policy = trained(env, guidance_scale=3.0, guidance_interval=(0.0, noise[2] * 1.01))
    obs = states(env, [0, 2])
    got, cost = forwards(env, lambda: policy.mean(obs))
    guided, plain = (trained(env, guidance_scale=w).mean(obs) for w in (3.0, 1.0))
    assert cost == 3
    torch.testing.assert_close(got, torch.stack([plain[0], guided[1]]), rtol=1e-4, atol=1e-5)

    env = small_env("Wan2.2_A14B-Brightness", num_envs=3, num_steps=4, decode_frames="first")
    noise = levels(env)
    policy = trained(env, guidance_scale=4.0, guidance_interval=(0.0, noise[1] * 1.01))
    obs = states(env, [0, 1, 3])
    got, cost = forwards(env, lambda: policy.mean(obs))
    guided, plain = (trained(env, guidance_scale=w).mean(obs) for w in (4.0, 1.0))
    assert cost == 5
    torch.testing.assert_close(got, torch.stack([plain[0], *guided[1:]]), rtol=1e-4, atol=1e-5)


def test_prompts_have_their_own_unconditional_side() -> None:
    """Open-Sora's null caption has the prompt's mask: the guided videos' own prompts make it."""
    env = small_env("OpenSora1.2-Brightness", num_envs=2, num_steps=4, decode_frames="first", prompts=["a", "a b c"])
    noise = levels(env)
    policy = trained(env, guidance_scale=4.0, guidance_interval=(0.0, noise[1] * 1.01))
    obs = env.reset(seed=[1, 2], options={"step": torch.tensor([0, 2]), "prompt_ids": [0, 1]})[0]
    guided, plain = (trained(env, guidance_scale=w).mean(obs) for w in (4.0, 1.0))
    torch.testing.assert_close(policy.mean(obs), torch.stack([plain[0], guided[1]]), rtol=1e-4, atol=1e-5)


def test_configuration() -> None:
    env = tiny_env("unet", guidance_scale=3.0, guidance_interval=[0.5, 20])
    assert env.config.guidance_interval == (0.5, 20.0)
    assert env.make_policy(lora_rank=1).guidance_interval == (0.5, 20.0)
    assert env.make_policy(lora_rank=1, guidance_interval=None).guidance_interval is None
    assert env.derive(num_steps=3).config.guidance_interval == (0.5, 20.0)
    assert env.derive(guidance_interval=(1, math.inf)).make_policy(lora_rank=1).guidance_interval == (1.0, math.inf)
    assert env.derive(guidance_interval=None).config.guidance_interval is None
    assert tiny_env("unet").config.guidance_interval is None
    none = env.derive(guidance_scale=1.0)  # no guidance has no interval to keep to
    obs, _ = none.reset(seed=0)
    assert forwards(none, lambda: none.make_policy(lora_rank=1).mean(obs))[1] == 2


@pytest.mark.parametrize(
    "given", [(1.0,), (2.0, 1.0), (1.0, 1.0), (-1.0, 2.0), (math.nan, 1.0), "ab", ("0", "1"), (True, 2.0), 3.0]
)
def test_no_interval(given: Any) -> None:
    with pytest.raises(ValueError, match=r"expected two noise levels \(lo, hi\) with 0 <= lo < hi"):
        as_interval(given)


def test_what_does_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="guidance_scale is 1.0, which is none; give guidance_scale too"):
        tiny_env("unet", guidance_scale=1.0, guidance_interval=(0.5, 2.0))
    with pytest.raises(ValueError, match="an input of the network, as T2V-Turbo's, acts at every step"):
        small_env("T2VTurbo-Brightness", guidance_interval=(0.5, 2.0))
    env = tiny_env("unet", guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"holds none of the 4 steps, whose noise levels are .*around some of them"):
        env.derive(guidance_interval=(1000.0, 1001.0))
    with pytest.raises(ValueError, match="which is none"):
        env.derive(guidance_interval=(0.5, 2.0), guidance_scale=1.0)
    with pytest.raises(ValueError, match="which is none"):
        env.make_policy(guidance_interval=(0.5, 2.0), guidance_scale=1.0)


def test_a_policy_that_would_never_guide_is_refused() -> None:
    env = make("MovingShapes-Brightness", num_envs=1, num_steps=3)
    with pytest.raises(ValueError, match="guidance_interval"):
        env.make_policy(guidance_scale=5.0, guidance_interval=(1e6, 1e7))
