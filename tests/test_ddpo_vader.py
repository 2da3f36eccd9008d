"""What is DDPO's or VADER's own: ratios, optimiser steps, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import ddpo_on, full_policy, gaussian_env, vader_on
from models import tiny_env

from algos.ddpo import DDPOConfig
from algos.rollout import collect
from algos.vader import VADERConfig


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_the_ratio_is_exactly_one_before_the_first_update(kind):
    env = tiny_env(kind, num_envs=4, group_size=2, guidance_scale=3.0)
    policy = env.make_policy(lora_rank=2)
    ddpo = ddpo_on(env, policy, videos_per_rollout=8, updates_per_rollout=1, advantage="group")
    for _ in range(2):  # the second time the adapter is no longer zero
        metrics = ddpo.update()
        assert metrics["ratio_first_error"] == 0.0
        assert metrics["ratio_mean"] == 1.0 and metrics["ratio_std"] == 0.0 and metrics["kl_old_nats"] == 0.0
        assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0.0
        assert metrics["grad_norm"] > 0


def test_later_updates_on_a_rollout_see_the_ratio_move_and_clip():
    env = gaussian_env()
    metrics = ddpo_on(env, full_policy(env), num_inner_epochs=2, updates_per_rollout=2).update()
    assert metrics["ratio_first_error"] == 0.0
    assert metrics["ratio_std"] > 0 and metrics["kl_old_nats"] > 0
    assert metrics["clip_fraction_low"] > 0 and metrics["clip_fraction_high"] > 0
    assert metrics["optimiser_steps"] == 4


@pytest.mark.parametrize(
    ("options", "optimiser_steps", "backwards"),
    [
        ({"updates_per_rollout": 1}, 1, 32 * 5),
        ({"updates_per_rollout": 2}, 2, 32 * 5),
        ({"updates_per_rollout": 1, "accumulate_timesteps": False}, 5, 32 * 5),
        ({"updates_per_rollout": 2, "accumulate_timesteps": False, "timestep_fraction": 0.6}, 6, 32 * 3),
        ({"updates_per_rollout": 1, "timestep_fraction": 0.01}, 1, 32),
    ],
)
def test_optimiser_steps_are_those_asked_for(options, optimiser_steps, backwards):
    env = gaussian_env()
    assert ddpo_on(env, full_policy(env), **options).update()["optimiser_steps"] == optimiser_steps
    assert env.mdp.counters.denoiser_backwards == backwards


def test_steps_without_noise_are_left_out():
    env = gaussian_env("flow", sampler="cps", noise_level=0.7)
    ddpo = ddpo_on(env, full_policy(env))
    assert ddpo.steps == [0, 1, 2, 3]
    ddpo.update()
    assert env.mdp.counters.denoiser_backwards == 32 * 4


def test_a_rollout_is_what_the_policy_does():
    env = gaussian_env()
    policy = full_policy(env)
    env.reset(seed=7)
    stream = env.state_dict()
    rollout = collect(env, policy)
    env.load_state_dict(stream)
    obs, _ = env.reset()
    for k in range(env.num_steps):
        with torch.no_grad():
            action = policy(obs)
            assert torch.equal(rollout.actions[k], action)
            assert torch.equal(rollout.log_probs[k], policy.dist(obs).log_prob(action))
        assert torch.equal(rollout.observations[k]["latents"], obs["latents"])
        obs, reward, *_ = env.step(action)
    assert torch.equal(rollout.reward, reward)


def blind(video, prompts):
    return video.mean((1, 2, 3, 4)).detach()


def test_vader_refuses_what_it_cannot_do():
    blind.differentiable = False
    env = gaussian_env(reward=blind)
    with pytest.raises(ValueError, match="differentiable=False.*DDPO"):
        vader_on(env, full_policy(env))
    blind.differentiable = True
    env = gaussian_env(reward=blind)
    with pytest.raises(ValueError, match="no graph"):
        vader_on(env, full_policy(env)).update()
    env = gaussian_env()
    for options, message in (
        ({"truncation": "last", "backprop_steps": 6}, "backprop_steps is 6.* 5 denoising steps"),
        ({"truncation": "step", "cutoff_step": 5}, r"cutoff_step is 5, expected 0\.\.4"),
        ({"videos_per_update": 24}, "videos_per_update is 24.*num_envs=16"),
    ):
        with pytest.raises(ValueError, match=message):
            vader_on(env, full_policy(env), **options)


def test_ddpo_refuses_what_it_cannot_do():
    for options, message in (
        ({"noise_level": 0.0}, "'ddim' at this noise level has none.*VADER"),
        ({"group_size": 1}, "group_size=1.*make it with group_size=8"),
    ):
        env = gaussian_env(**options)
        with pytest.raises(ValueError, match=message):
            ddpo_on(env, full_policy(env), advantage="group")
    env = gaussian_env()
    for options, message in (
        ({"videos_per_rollout": 40}, "videos_per_rollout is 40.*num_envs=16"),
        ({"updates_per_rollout": 3}, "updates_per_rollout is 3.*2 batches"),
        ({"tracker_min_count": 20}, "min_count 20"),
    ):
        with pytest.raises(ValueError, match=message):
            ddpo_on(env, full_policy(env), **options)
    env = gaussian_env(num_envs=1, group_size=1)
    with pytest.raises(ValueError, match="sample at least 2"):
        ddpo_on(env, full_policy(env), videos_per_rollout=1, updates_per_rollout=1)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (DDPOConfig, {"learning_rate": 0}, "learning_rate is 0"),
        (DDPOConfig, {"clip_range": math.nan}, "clip_range is nan"),
        (DDPOConfig, {"advantage": "none"}, "advantage is 'none', expected one of per_prompt, group, batch"),
        (DDPOConfig, {"timestep_fraction": 1.5}, "timestep_fraction is 1.5 .*at most 1"),
        (DDPOConfig, {"kl_coefficient": -1}, "kl_coefficient is -1, expected a number >= 0"),
        (DDPOConfig, {"micro_batch": 0}, "micro_batch is 0"),
        (VADERConfig, {"backprop_steps": 0}, "backprop_steps is 0"),
        (VADERConfig, {"loss": "mse"}, "loss is 'mse', expected one of one_minus"),
        (VADERConfig, {"truncation": "first"}, "truncation is 'first'"),
        (VADERConfig, {"cutoff_step": -1}, "cutoff_step is -1"),
    ],
)
def test_configs_are_checked(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_presets():
    assert DDPOConfig.preset("MovingShapes").advantage == "group"
    assert VADERConfig.preset("MovingShapes").videos_per_update == 64
    for config in (DDPOConfig, VADERConfig):
        with pytest.raises(ValueError, match="only for MovingShapes"):
            config.preset("Sora")
