"""VADER's cuts, its published settings, and what stopping the latents' gradient does."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import Recorder, full_policy, gaussian_env, vader_on
from reward_gradient import Idle, coefficients, exact_env, into_weight, run_gaussian
from scipy.stats import norm

from algos.vader import VADERConfig


def test_gaussian_cuts_are_alignprops_on_its_grid():
    """floor(N(42, 5)) of 50 steps, given that it lies in 1..49."""
    vader = vader_on(gaussian_env(num_steps=50), Idle(), truncation="gaussian")
    drawn = torch.tensor([vader._cut() for _ in range(4000)])
    assert drawn.min() >= 1 and drawn.max() <= 49
    weight = [norm.cdf((k + 1 - 42) / 5) - norm.cdf((k - 42) / 5) for k in range(1, 50)]
    law = torch.tensor(weight, dtype=torch.float64) / sum(weight)
    expected = law * len(drawn)
    found = drawn.bincount(minlength=50)[1:50].double()
    common = expected > 5
    chi = ((found - expected).square() / expected)[common].sum()
    assert chi < common.sum() + 5 * math.sqrt(2 * common.sum())
    assert found[~common].sum() < 4 * expected[~common].sum() + 10


def test_gaussian_cuts_scale_with_the_chain_and_random_ones_are_uniform():
    vader = vader_on(gaussian_env(), Idle(), truncation="gaussian")
    drawn = [vader._cut() for _ in range(500)]
    assert {3, 4} <= set(drawn) <= {1, 2, 3, 4}  # 5 N(0.84, 0.1): 4.2 +- 0.5
    inside = norm.cdf(1.6) - norm.cdf(-6.4)
    assert drawn.count(4) / 500 == pytest.approx((norm.cdf(1.6) - norm.cdf(-0.4)) / inside, abs=0.1)
    vader = vader_on(gaussian_env(), Idle(), truncation="random")
    drawn = [vader._cut() for _ in range(500)]
    assert all(60 < drawn.count(k) < 140 for k in range(5))


@pytest.mark.parametrize(("steps", "mean"), [(1, 0.84), (5, 9.0), (50, 0.001)])
def test_cuts_outside_the_chain_are_refused_before_they_are_drawn_for_ever(steps, mean):
    env = gaussian_env(num_steps=steps)
    with pytest.raises(ValueError, match=rf"lies in steps 1\.\.{steps - 1} of {steps}.*cutoff_mean"):
        vader_on(env, Idle(), truncation="gaussian", cutoff_mean=mean, cutoff_std=0.001)


@pytest.mark.parametrize("schedule", ["flow", "epsilon"])
@pytest.mark.parametrize("stop", [False, True])
def test_whole_chain_gradient_with_and_without_the_networks_jacobian(schedule, stop):
    """g_{k+1} = (A + B p) g_k + B q; with the network's input constant, A g_k + B q."""
    env = exact_env(schedule)
    policy = full_policy(env)
    options = {"truncation": "last", "backprop_steps": 5, "stop_latent_gradient": stop, "loss": "negative"}
    found, _ = run_gaussian(env, policy, Recorder, vader_on, **options)
    obs, _ = env.reset()
    slope = 0.0
    for k in range(5):
        A, B, p, q = coefficients(env, k)
        slope = (A + (0 if stop else B * p)) * slope + B * q
        with torch.no_grad():
            obs, *_ = env.step(policy(obs))
    error = obs["latents"] - 1.0
    per_video = 2 * slope * error.sum((2, 3, 4)) / error[0].numel() / len(error)
    torch.testing.assert_close(found, into_weight(per_video, obs["prompt_id"], policy), rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 0.01


def test_the_last_step_alone_does_not_notice_stopped_latent_gradients():
    def gradient(**options):
        env = exact_env()
        return run_gaussian(env, full_policy(env), Recorder, vader_on, truncation="last", **options)[0]

    assert torch.equal(gradient(backprop_steps=1), gradient(backprop_steps=1, stop_latent_gradient=True))
    assert not torch.equal(gradient(backprop_steps=2), gradient(backprop_steps=2, stop_latent_gradient=True))


def test_published_settings():
    align = VADERConfig.alignprop()
    assert (align.truncation, align.cutoff_mean * 50, align.cutoff_std * 50) == ("gaussian", 42.0, 5.0)
    assert (align.loss, align.loss_target, align.loss_scale, align.loss_coefficient) == ("target_l1", 10.0, 1.0, 0.01)
    assert VADERConfig.alignprop(loss="one_minus").loss == "one_minus"
    assert VADERConfig.draft(3).backprop_steps == 3 and VADERConfig.draft().loss == "negative"
    tail = VADERConfig.videox_fun(stop_latent_gradient=True)
    assert (tail.truncation, tail.backprop_steps, tail.max_grad_norm) == ("last", 5, 0.3)
    assert tail.stop_latent_gradient and not VADERConfig().stop_latent_gradient
    assert (VADERConfig().truncation, VADERConfig().backprop_steps, VADERConfig().loss_coefficient) == ("last", 1, 1.0)
    with pytest.raises(TypeError, match="steps"):
        VADERConfig.alignprop(steps=3)


def test_the_loss_coefficient_scales_loss_and_gradient():
    def run(coefficient):
        env = exact_env()
        options = {"truncation": "last", "loss": "target_l1", "loss_coefficient": coefficient}
        return run_gaussian(env, full_policy(env), Recorder, vader_on, **options)

    (full, row), (small, small_row) = run(1.0), run(0.01)
    torch.testing.assert_close(small, 0.01 * full)
    assert small_row["loss"] == pytest.approx(0.01 * row["loss"])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("random1", 1), ([3], 1), (3, 3), ("alternate", 3), ("all", 6)],
)
def test_every_frame_policy_of_vader_reaches_the_reward(policy, expected):
    seen = []

    def spy(video, prompts):
        seen.append(video.shape[1])
        return video.mean((1, 2, 3, 4))

    env = gaussian_env(num_frames=6, decode_frames=policy, reward=spy, num_envs=4, group_size=1)
    vader_on(env, full_policy(env), videos_per_update=8).update()
    assert seen == [expected, expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoff_std": 0}, "cutoff_std is 0"),
        ({"cutoff_mean": math.nan}, "cutoff_mean is nan"),
        ({"loss_coefficient": -1}, "loss_coefficient is -1"),
    ],
)
def test_configs_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        VADERConfig(**options)
