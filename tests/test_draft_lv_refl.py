"""DRaFT-LV and ReFL: gradients by hand, where they end, what they cost and refuse."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import START, Recorder, full_policy, gaussian_env
from models import tiny_env
from reward_gradient import (
    Idle,
    coefficients,
    draft_lv_on,
    exact_env,
    into_weight,
    levels,
    means_of,
    refl_on,
    run_gaussian,
)

from algos.draft_lv import DRaFTLVConfig
from algos.losses import hinge
from algos.refl import ReFLConfig
from vdm_env import noise

# ---------------------------------------------------------------------------------------------------------- DRaFT-LV


def copies_by_hand(env, policy, obs, clean, count, seed):
    """Copies of the last step's outcome, written with the schedules' definitions."""
    generator = torch.Generator().manual_seed(seed)
    k = env.num_steps - 1
    A, B, p, q = coefficients(env, k)
    signal, level = levels(env, k)
    mean, std = means_of(env, policy, obs["prompt_id"]), float(env.mdp.table.action_std[k])
    for _ in range(count):
        eps, z = (torch.randn(clean.shape, generator=generator).double() for _ in range(2))
        x = signal * clean + level * eps
        yield A * x + B * (p * x + q * mean + std * z)


@pytest.mark.parametrize("schedule", ["flow", "epsilon"])
@pytest.mark.parametrize("include", [False, True])
def test_draft_lv_gradient_is_the_chain_rule_by_hand(schedule, include):
    env = exact_env(schedule)
    policy = full_policy(env)
    options = {"copies": 3, "include_sample": include, "seed": 11}
    found, metrics = run_gaussian(env, policy, Recorder, draft_lv_on, **options)

    obs, _ = env.reset()
    with torch.no_grad():
        for _ in range(env.num_steps):
            obs, reward, *_ = env.step(policy(obs))
    clean = obs["latents"]
    outcomes = list(copies_by_hand(env, policy, obs, clean, 3, seed=11))
    rewards = torch.stack([-(x - 1).square().mean((1, 2, 3, 4)) for x in outcomes])
    assert metrics["copy_reward_mean"] == pytest.approx(float(rewards.mean()), rel=1e-9)
    assert metrics["copy_reward_std"] == pytest.approx(float(rewards.std(0, correction=0).mean()), rel=1e-9)
    assert metrics["reward_mean"] == pytest.approx(float(reward.mean()), rel=1e-12)
    outcomes += [clean] if include else []
    *_, B, _, q = coefficients(env, env.num_steps - 1)
    error = sum((x - 1).sum((2, 3, 4)) for x in outcomes) / len(outcomes)
    per_video = 2 * B * q * error / clean[0].numel() / len(clean)
    torch.testing.assert_close(found, into_weight(per_video, obs["prompt_id"], policy), rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 1e-3
    counters = env.mdp.counters
    assert counters.denoiser_backwards == counters.reward_backward_queries == 4 * (3 + include)


def test_more_copies_mean_less_variance():
    """The copies share x0, so the variance that the noise brings falls with their number."""

    def spread(copies):
        env = exact_env("epsilon", num_envs=1, noise_level=0.0)
        gradients = []
        for seed in range(40):
            draft = draft_lv_on(
                env, full_policy(env), copies=copies, include_sample=False, videos_per_update=1, seed=seed
            )
            env.load_state_dict({"seed": 5, "videos_drawn": 0, "groups_drawn": 0})  # the same x0 each time
            recorder = Recorder(draft)
            draft.update()
            gradients.append(recorder.gradients[0][0].flatten())
        return float(torch.stack(gradients).var(0).sum())

    assert spread(8) == pytest.approx(spread(1) / 8, rel=0.6)


@pytest.mark.parametrize(("schedule", "include"), [("flow", True), ("epsilon", False)])
def test_draft_lv_ends_where_its_copies_meet_the_target(schedule, include):
    env = gaussian_env(schedule, num_envs=32)
    policy = full_policy(env)
    options = {"learning_rate": 0.05, "weight_decay": 0.0, "include_sample": include}
    draft = draft_lv_on(env, policy, **options)
    history = [policy.trainable_parameters()[0].detach().clone() for _ in range(80) if draft.update()]
    gain = 0.0
    for k in range(env.num_steps):
        A, B, p, q = coefficients(env, k)
        gain = (A + B * p) * gain + B * q
    copy_gain = (A + B * p) * levels(env, env.num_steps - 1)[0] * gain + B * q
    best = 3 / (2 * copy_gain + gain) if include else 1 / copy_gain
    found = torch.stack(history[-20:]).mean(0)
    assert torch.allclose(found, torch.full_like(found, best), atol=0.06), (found, best)
    assert (START - best).abs().max() > 1


# -------------------------------------------------------------------------------------------------------------- ReFL


def estimates_by_hand(env, policy, k):
    """Clean estimates at step k of the env's next videos, and d estimate / d mean."""
    obs, _ = env.reset()
    with torch.no_grad():
        for _ in range(k):
            obs, *_ = env.step(policy(obs))
    p, q = coefficients(env, k)[2:]
    signal, level = levels(env, k)
    x, mean = obs["latents"], means_of(env, policy, obs["prompt_id"])
    output = p * x + q * mean
    if env.mdp.schedule.prediction == "flow":
        return obs, x - level * output, -level * q
    return obs, (x - level * output) / signal, -level / signal * q


@pytest.mark.parametrize("schedule", ["flow", "epsilon"])
def test_refl_gradient_is_the_chain_rule_by_hand(schedule):
    env = exact_env(schedule)
    policy = full_policy(env)
    steps = set()
    for seed in range(6):
        build = {"seed": seed, "loss": "hinge", "loss_target": -1.5, "loss_coefficient": 0.5}
        found, metrics = run_gaussian(env, policy, Recorder, refl_on, **build)
        k = int(metrics["step_mean"])
        steps.add(k)
        env.load_state_dict({"seed": seed, "videos_drawn": 0, "groups_drawn": 0})
        obs, clean, slope = estimates_by_hand(env, policy, k)
        reward = -(clean - 1).square().mean((1, 2, 3, 4))
        below = (reward < -1.5).double()
        assert metrics["loss"] == pytest.approx(float(0.5 * ((-1.5 - reward) * below).mean()), rel=1e-9, abs=1e-12)
        per_video = 0.5 * below[:, None] * 2 * slope * (clean - 1).sum((2, 3, 4)) / clean[0].numel() / len(clean)
        expected = into_weight(per_video, obs["prompt_id"], policy)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert steps == {3, 4}


@pytest.mark.parametrize(("window", "expected"), [(None, {3, 4}), (1, {4}), (5, {0, 1, 2, 3, 4})])
def test_refl_learns_at_the_steps_of_its_window_only(window, expected):
    refl = refl_on(gaussian_env(), Idle(), window_steps=window)
    assert {refl._draw_step() for _ in range(200)} == expected


def test_refl_runs_the_network_up_to_its_step_and_queries_once():
    env = gaussian_env()
    refl = refl_on(env, full_policy(env), window_steps=1)
    refl.update()
    counters = env.mdp.counters
    assert counters.denoiser_forwards == 32 * 5 and counters.denoiser_backwards == 32
    assert counters.reward_queries == counters.reward_backward_queries == 32
    assert counters.rollout_s > 0


@pytest.mark.parametrize("schedule", ["flow", "epsilon"])
def test_refl_ends_where_its_estimates_meet_the_target(schedule):
    env = gaussian_env(schedule, num_envs=32)
    policy = full_policy(env)
    refl = refl_on(env, policy, learning_rate=0.05, weight_decay=0.0, videos_per_update=64)
    history = [policy.trainable_parameters()[0].detach().clone() for _ in range(80) if refl.update()]
    gain, above, below = 0.0, 0.0, 0.0
    for k in range(env.num_steps):
        A, B, p, q = coefficients(env, k)
        signal, level = levels(env, k)
        scale = 1 if schedule == "flow" else signal
        if k >= 3:  # E[estimate] = seen m, d estimate / d m = slope, and sum_k slope_k (seen_k m - 1) = 0
            slope = -level * q / scale
            seen = (1 - level * p) * gain / scale + slope
            above, below = above + slope, below + slope * seen
        gain = (A + B * p) * gain + B * q
    found = torch.stack(history[-30:]).mean(0)
    assert torch.allclose(found, torch.full_like(found, above / below), atol=0.08), (found, above / below)


def test_hinge():
    reward = torch.tensor([1.0, 2.5, -1.0], dtype=torch.float64, requires_grad=True)
    loss = hinge(reward, 2.0, scale=0.3)
    assert loss.item() == pytest.approx(0.3 * (1 + 0 + 3) / 3)
    (gradient,) = torch.autograd.grad(loss, reward)
    assert gradient.tolist() == pytest.approx([-0.1, 0.0, -0.1])
    with pytest.raises(ValueError, match="scale is 0"):
        hinge(reward, 2.0, scale=0)
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        hinge(torch.zeros(2, 1), 1.0)


# ------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("build", [draft_lv_on, refl_on])
@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_a_network_learns(build, kind):
    env = tiny_env(kind, num_envs=2, guidance_scale=2.0)
    policy = env.make_policy(lora_rank=2)
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    metrics = build(env, policy, videos_per_update=4).update()
    assert metrics["grad_norm"] > 0 and all(math.isfinite(value) for value in metrics.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.trainable_parameters(), strict=True))


@pytest.mark.parametrize("build", [draft_lv_on, refl_on])
def test_what_they_refuse(build):
    def blind(video, prompts):
        return video.mean((1, 2, 3, 4)).detach()

    blind.differentiable = False
    env = gaussian_env(reward=blind)
    with pytest.raises(ValueError, match="differentiable=False.*DDPO"):
        build(env, full_policy(env))
    blind.differentiable = True
    env = gaussian_env(reward=blind)
    with pytest.raises(ValueError, match="no graph"):
        build(env, full_policy(env)).update()
    env = gaussian_env()
    with pytest.raises(ValueError, match="videos_per_update is 24.*num_envs=16"):
        build(env, full_policy(env), videos_per_update=24)
    env.mdp.clips = 3
    with pytest.raises(ValueError, match="learns from one clip, but an episode of this env makes 3.*VADER"):
        build(env, full_policy(env))


def test_a_window_outside_the_chain_is_refused():
    with pytest.raises(ValueError, match="window_steps is 6.* 5 denoising steps.*at most 5"):
        refl_on(gaussian_env(), Idle(), window_steps=6)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (DRaFTLVConfig, {"copies": 0}, "copies is 0"),
        (DRaFTLVConfig, {"loss": "hinge"}, "loss is 'hinge', expected one of negative"),
        (ReFLConfig, {"window_steps": 0}, "window_steps is 0, expected at least 1"),
        (ReFLConfig, {"loss_coefficient": 0}, "loss_coefficient is 0"),
        (ReFLConfig, {"loss": "target_l1"}, "loss is 'target_l1'"),
    ],
)
def test_configs_are_checked(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_presets():
    for config in (DRaFTLVConfig, ReFLConfig):
        assert config.preset("MovingShapes").videos_per_update == 64
        with pytest.raises(ValueError, match="only for MovingShapes"):
            config.preset("Sora")


def test_exploration_noise_is_keyed_by_the_video():
    """The formulas above rely on it."""
    env = exact_env()
    obs, _ = env.reset(seed=0)
    policy = full_policy(env)
    z = noise.normal(obs["video_seed"], 0, env.mdp.latent_shape).double()
    expected = policy.mean(obs) + obs["action_std"][:, None, None, None, None] * z
    torch.testing.assert_close(policy(obs), expected)
