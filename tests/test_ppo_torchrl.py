"""TorchRL's PPO on the environment: its loss, its advantages, the clip convention, resuming, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from conduct import goes_on_bit_for_bit
from gaussian import Recorder, ddpo_on, full_policy, gaussian_env
from models import tiny_env

import algos
import vdm_env
from algos.ppo_torchrl import TorchRLPPO, TorchRLPPOConfig, clip_of_sum


def ppo_on(env, policy, **options):
    options = {"videos_per_rollout": 32, "learning_rate": 0.03, "num_inner_epochs": 2, **options}
    return TorchRLPPO(env, policy, TorchRLPPOConfig(**options))


@pytest.mark.parametrize("options", [{}, {"critic": False, "baseline": "group"}])
def test_the_reward_rises(options):
    env = gaussian_env("flow", num_envs=32)
    ppo = ppo_on(env, full_policy(env), weight_decay=0.0, **options)
    rewards = [ppo.update()["reward_mean"] for _ in range(14)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


def test_the_gradient_is_that_of_ddpo():
    """Without a critic, and before the first step, both are the same sum over the same videos."""
    gradients = []
    for build, options in (
        (ppo_on, {"critic": False, "num_inner_epochs": 1}),
        (ddpo_on, {"advantage": "batch", "updates_per_rollout": 1}),
    ):
        env = gaussian_env(num_envs=16)
        algorithm = build(env, full_policy(env), max_grad_norm=1e9, **options)
        recorder = Recorder(algorithm)
        algorithm.update()
        gradients.append(recorder.gradients[0][0])
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_advantages_are_gae_of_the_standardised_reward():
    env = gaussian_env(num_envs=8)
    ppo = ppo_on(env, full_policy(env), videos_per_rollout=8, gae_lambda=0.7)
    with torch.no_grad():
        ppo.critic.value.weight.normal_(generator=torch.Generator().manual_seed(1))
    batch = ppo._rollout()
    raw = batch["next", "reward"][:, -1, 0].clone()
    score = (raw - raw.mean()) / (raw.std(correction=0) + 1e-8)
    parts = ppo._parts([batch], ppo._standardised(raw))
    values = ppo.critic(batch["latents"], batch["step"], batch["prompt_id"])[..., 0].detach()
    assert values.std() > 0.1 and len(parts) == 5
    later, expected = torch.zeros(8), torch.zeros(8, 5)
    for k in reversed(range(5)):
        after = values[:, k + 1] if k < 4 else torch.zeros(8)  # nothing comes after the video
        later = (score if k == 4 else 0.0) + after - values[:, k] + 0.7 * later
        expected[:, k] = later
    torch.testing.assert_close(batch["advantage"][..., 0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch["value_target"][..., 0], expected + values, rtol=1e-5, atol=1e-6)
    normalised = (expected - expected.mean()) / expected.std(correction=0)
    for k, part in enumerate(parts):
        torch.testing.assert_close(part["advantage"][:, 0], normalised[:, k], rtol=1e-4, atol=1e-5)


def test_a_clip_range_for_sums_becomes_one_for_means():
    low, high = clip_of_sum(0.2, 24)
    assert math.isclose((1 - low) ** 24, 0.8) and math.isclose((1 + high) ** 24, 1.2)
    low, high = clip_of_sum(0.2, 10**6)  # a real video's latents
    assert math.isclose(low, -math.log(0.8) / 1e6, rel_tol=1e-5) and math.isclose(
        high, math.log(1.2) / 1e6, rel_tol=1e-5
    )
    for arguments in ((0.0, 3), (1.0, 3), (0.2, 0)):
        with pytest.raises(ValueError, match="expected 0 < clip_range < 1"):
            clip_of_sum(*arguments)


def test_torchrl_clips_where_the_summed_ratio_leaves_its_range():
    env = gaussian_env(num_envs=32)
    policy = full_policy(env)
    ppo = ppo_on(env, policy, clip_range=0.2, clip_convention="sum", critic=False)
    batch = ppo._rollout()
    parts = ppo._parts([batch], ppo._standardised(batch["next", "reward"][:, -1, 0]))
    with torch.no_grad():
        old = [policy.dist(part).log_prob_sum(part["action"]) for part in parts]
        policy.trainable_parameters()[0].add_(0.05)
        new = [policy.dist(part).log_prob_sum(part["action"]) for part in parts]
    clipped = 0
    for part, before, after in zip(parts, old, new, strict=True):
        outside = (((after - before).exp() - 1).abs() > 0.2).float().mean()
        assert float(ppo.loss(part)["clip_fraction"]) == float(outside)
        clipped += float(outside)
    assert 0.2 < clipped / len(parts) < 0.98


def test_the_ratio_is_exactly_one_before_the_first_update():
    env = tiny_env(num_envs=4, guidance_scale=3.0)
    ppo = ppo_on(env, env.make_policy(lora_rank=2), videos_per_rollout=4, learning_rate=1e-3)
    for _ in range(2):  # the second time the adapter is no longer zero
        metrics = ppo.update()
        assert metrics["ratio_first_error"] == 0.0 and metrics["grad_norm"] > 0
        assert metrics["optimiser_steps"] == 2 and metrics["ratio_max"] > 1  # the second pass sees it move


def test_a_gradient_of_the_critic_that_is_not_finite_changes_nothing():
    env = gaussian_env()
    ppo = ppo_on(env, full_policy(env), num_inner_epochs=1)
    ppo.update()
    before = [p.detach().clone() for p in (*ppo.parameters, *ppo.critic_parameters)]
    hook = ppo.critic.value.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="critic's gradient norm is nan.*parameters were not changed"):
        ppo.update()
    hook.remove()
    for old, new in zip(before, (*ppo.parameters, *ppo.critic_parameters), strict=True):
        assert torch.equal(old, new) and new.grad is None
    assert math.isfinite(ppo.update()["loss_critic"])


def test_steps_without_noise_are_left_out():
    env = gaussian_env("flow", sampler="cps", noise_level=0.7)
    ppo = ppo_on(env, full_policy(env), num_inner_epochs=1)
    ppo.update()
    assert ppo.steps == [0, 1, 2, 3] and env.mdp.counters.denoiser_backwards == 32 * 4
    assert env.state_dict()["videos_drawn"] == 32  # no batch was drawn ahead


def test_the_same_seed_gives_the_same_run_and_it_continues_from_a_checkpoint(tmp_path):
    env = gaussian_env()
    policy = env.make_policy(lora_rank=2)
    ppo = ppo_on(env, policy)
    first = ppo.update()

    def another():
        env = gaussian_env()
        policy = env.make_policy(lora_rank=2, seed=5)
        return ppo_on(env, policy, seed=99), policy

    expected, state = goes_on_bit_for_bit(ppo, policy, another, tmp_path, 2)
    env = gaussian_env()
    torch.manual_seed(3)
    twin = ppo_on(env, env.make_policy(lora_rank=2))
    assert [twin.update() for _ in range(3)] == [first, *expected]
    with pytest.raises(ValueError, match="has a critic, this config has critic=False"):
        ppo_on(env, policy, critic=False).load_state_dict(state)


def test_it_runs_on_moving_shapes(tmp_path):
    env = vdm_env.make("MovingShapes-HPS", num_envs=4, group_size=4, num_steps=3, guidance_scale=1.0)
    policy = env.make_policy(lora_rank=4)
    before = policy.lora_state_dict()
    config = replace(TorchRLPPOConfig.preset("MovingShapes"), videos_per_rollout=4, num_inner_epochs=1)
    algorithm = TorchRLPPO(env, policy, config)
    assert algos.run(algorithm, updates=1, out=tmp_path / "run", progress=False).updates == 1
    row = json.loads((tmp_path / "run" / "train.jsonl").read_text())
    assert row["ratio_first_error"] == 0.0 and 0 < row["reward_mean"] < 1 and row["reward_queries"] == 4
    assert any(not torch.equal(before[k], v) for k, v in policy.lora_state_dict().items())


def test_it_refuses_what_it_cannot_do():
    for options, config, message in (
        ({"noise_level": 0.0}, {}, "at this noise level has none"),
        ({"group_size": 1}, {"baseline": "group"}, "group_size=1; make it with group_size=8"),
        ({}, {"videos_per_rollout": 40}, "videos_per_rollout is 40.*num_envs=16"),
        ({"num_envs": 1, "group_size": 1}, {"videos_per_rollout": 1}, "sample at least 2"),
    ):
        env = gaussian_env(**options)
        with pytest.raises(ValueError, match=message):
            ppo_on(env, full_policy(env), **config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_range": 1.0}, "clip_range is 1.0 .*less than 1"),
        ({"gae_lambda": 1.1}, "gae_lambda 1.1, expected .*at most 1"),
        ({"clip_convention": "nats"}, "clip_convention is 'nats', expected one of mean, sum"),
        ({"baseline": "prompt"}, "baseline is 'prompt'"),
        ({"num_inner_epochs": 0}, "num_inner_epochs is 0"),
    ],
)
def test_the_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TorchRLPPOConfig(**options)
    with pytest.raises(ValueError, match="no TorchRLPPOConfig preset for 'Sora', only for MovingShapes"):
        TorchRLPPOConfig.preset("Sora")
