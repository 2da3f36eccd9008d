"""D3PO: its loss by hand and its bound, one pass per video, learning from order alone, resume, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from conduct import goes_on_bit_for_bit
from gaussian import Recorder, full_policy, gaussian_env, tied, weight_of
from models import tiny_env

from algos.d3po import D3PO, D3POConfig
from algos.losses import d3po_loss
from algos.preferences import preference_pairs
from algos.rollout import collect
from vdm_env.worlds.gaussian import TargetReward

BOUND = 0.1 * (math.log(1.1) - math.log(0.9))


def d3po_on(env, policy, **options):
    options = {"videos_per_update": 32, "learning_rate": 0.02, **options}
    return D3PO(env, policy, D3POConfig(**options))


def moved(policy):
    with torch.no_grad():
        weight_of(policy).mul_(1.2).add_(0.1)
    return policy


# ------------------------------------------------------------------------------------------------------ the loss


def test_the_loss_by_hand():
    log_ratios = [0.05, 0.3, -0.02, 0.04]  # two winners, then their losers; 0.3 is beyond log 1.1
    reference = torch.tensor([-1.0, 2.0, 0.5, -3.0], dtype=torch.float64)
    log_prob = (reference + torch.tensor(log_ratios, dtype=torch.float64)).requires_grad_()
    margins = [0.1 * (0.05 + 0.02), 0.1 * (math.log(1.1) - 0.04)]
    loss, metrics = d3po_loss(log_prob, reference, 0.1, 0.1)
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 2, rel=1e-12)
    assert float(metrics["margin"]) == pytest.approx(sum(margins) / 2, rel=1e-12)
    assert float(metrics["clip_fraction"]) == 0.25 and float(metrics["implicit_accuracy"]) == 1.0
    assert float(metrics["ratio_winner"]) == pytest.approx((math.exp(0.05) + math.exp(0.3)) / 2)
    loss.backward()
    pull = [0.5 * 0.1 / (1 + math.exp(m)) for m in margins]
    expected = torch.tensor([-pull[0], 0.0, pull[0], pull[1]], dtype=torch.float64)  # nothing beyond the clip
    torch.testing.assert_close(log_prob.grad, expected, rtol=1e-12, atol=0)

    free, _ = d3po_loss(log_prob.detach(), reference, 0.1, None)
    margins[1] = 0.1 * (0.3 - 0.04)
    assert float(free) == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 2, rel=1e-12)


@torch.no_grad()
def test_the_clip_bounds_margin_and_loss_and_without_it_nothing_does():
    generator = torch.Generator().manual_seed(0)
    assert pytest.approx(0.0201, abs=5e-5) == BOUND
    losses = []
    for size in (0.01, 0.1, 1.0, 30.0):
        reference = torch.randn(40, generator=generator, dtype=torch.float64)
        for row in reference + size * torch.randn(200, 40, generator=generator, dtype=torch.float64):
            loss, metrics = d3po_loss(row[:2], reference[:2], 0.1, 0.1)
            losses.append(float(loss))
            assert abs(float(metrics["margin"])) <= BOUND + 1e-12
    assert 0.683 < min(losses) < 0.6832 and 0.7031 < max(losses) < 0.7033  # both ends are reached
    free, _ = d3po_loss(torch.tensor([-60.0, 60.0]), torch.zeros(2), 0.1, None)
    assert float(free) == pytest.approx(12, rel=1e-4)


def test_ratios_beyond_all_numbers_are_clipped_and_not_nan():
    log_prob = torch.tensor([0.05, 95.0, 0.0, -200.0], requires_grad=True)  # exp(95) is infinite in float32
    loss, metrics = d3po_loss(log_prob, torch.zeros(4), 0.1, 0.1)
    loss.backward()
    assert log_prob.grad[[1, 3]].tolist() == [0.0, 0.0] and float(log_prob.grad[0]) < 0 < float(log_prob.grad[2])
    assert math.isfinite(loss.item()) and float(metrics["clip_fraction"]) == 0.5


def test_equal_log_probabilities_give_log_2():
    value = torch.linspace(-3, 3, 8, dtype=torch.float64)
    for clip_range in (0.1, None):
        loss, metrics = d3po_loss(value, value, 0.1, clip_range)
        assert float(loss) == pytest.approx(math.log(2), rel=1e-14)
        assert float(metrics["ratio_winner"]) == float(metrics["ratio_loser"]) == 1.0
        assert float(metrics["margin"]) == float(metrics["clip_fraction"]) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3), 0.1), "log_prob has 3 numbers, expected 2P"),
        ((torch.zeros(2), torch.zeros(4), 0.1), "reference has shape"),
        ((torch.zeros(2), torch.zeros(2), 0.0), "beta is 0.0"),
        ((torch.zeros(2), torch.zeros(2), 0.1, 1.0), "clip_range 1.0"),
    ],
)
def test_the_loss_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        d3po_loss(*arguments)


# ------------------------------------------------------------------------------------------------------ the algorithm


def test_the_loss_of_a_denoising_step_from_the_gaussians_themselves():
    """Log-ratios of N(mean, std^2) written out, in float64, for pairs that share videos."""
    env = gaussian_env("flow", dtype=torch.float64)
    policy = full_policy(env)
    algorithm = d3po_on(env, policy, beta=2.0, clip_range=None)
    rollout = collect(env, policy)
    pairs = preference_pairs(rollout.reward, 4, "all_pairs")
    assert len(pairs) == 4 * 6
    moved(policy)
    for k in (0, 3):
        obs, action, std = rollout.observations[k], rollout.actions[k], rollout.observations[k]["action_std"][0]
        with torch.no_grad():
            new = policy.mean(obs)
            with policy.reference():
                old = policy.mean(obs)
        log_ratio = (((action - old) ** 2 - (action - new) ** 2) / (2 * std**2)).mean((1, 2, 3, 4))
        margins = [2.0 * float(log_ratio[i] - log_ratio[j]) for i, j in pairs.tolist()]
        assert max(abs(m) for m in margins) > 0.01
        loss, metrics = algorithm._loss(rollout, pairs, k)
        expected = sum(math.log1p(math.exp(-m)) for m in margins) / len(margins)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert float(metrics["implicit_accuracy"]) == sum(m > 0 for m in margins) / len(margins)


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_the_first_step_starts_from_ratio_1_and_moves_only_the_adapter(kind):
    env = tiny_env(kind, num_envs=4, group_size=2, guidance_scale=2.0)
    policy = env.make_policy(lora_rank=2)
    obs, _ = env.reset(seed=3)
    with torch.no_grad(), policy.reference():
        before = policy.mean(obs)
    algorithm = d3po_on(env, policy, videos_per_update=4)
    first = env.mdp.counters.denoiser_forwards
    metrics = algorithm.update()
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-6) and metrics["margin"] == 0.0
    assert metrics["ratio_winner"] == metrics["ratio_loser"] == 1.0 and metrics["clip_fraction"] == 0.0
    assert metrics["grad_norm"] > 0 and metrics["pairs"] == 2.0
    # with guidance each is two: the rollout, and then policy and reference at each noisy step
    forwards = 4 * 2 * (env.num_steps + 2 * len(algorithm.steps))
    assert env.mdp.counters.denoiser_forwards - first == forwards
    assert 0.6831 < algorithm.update()["loss"] < 0.7033
    with torch.no_grad():
        assert not torch.equal(policy.mean(obs), before)
        with policy.reference():
            assert torch.equal(policy.mean(obs), before)


def test_each_video_runs_once_in_however_many_pairs_and_not_at_all_in_none():
    forwards = {}
    for pairs in ("all_pairs", "best_vs_worst"):
        env = gaussian_env()
        algorithm = d3po_on(env, full_policy(env), pairs=pairs, videos_per_update=16)
        metrics = algorithm.update()
        assert metrics["pairs"] == (4 * 6 if pairs == "all_pairs" else 4)
        forwards[pairs] = env.mdp.counters.denoiser_forwards - 16 * env.num_steps
    assert forwards == {"all_pairs": 16 * 2 * len(algorithm.steps), "best_vs_worst": 8 * 2 * len(algorithm.steps)}


def test_the_parts_of_a_step_make_the_gradient_of_the_whole():
    found = []
    for micro_batch in (None, 4, 8):
        env = gaussian_env(num_envs=16)
        algorithm = d3po_on(env, full_policy(env), micro_batch=micro_batch, clip_range=None, beta=5.0)
        moved(algorithm.policy)
        recorder = Recorder(algorithm)
        recorder.param_groups = []
        metrics = algorithm.update()
        found.append((recorder.gradients[0][0], metrics["loss"], metrics["margin"]))
    whole = found[0]
    assert whole[0].abs().max() > 0 and whole[2] != 0
    for gradient, *values in found[1:]:
        assert torch.allclose(gradient, whole[0], rtol=1e-4) and values == pytest.approx(list(whole[1:]), rel=1e-5)


def test_groups_and_timesteps_are_dealt_into_optimiser_steps():
    env = gaussian_env()
    algorithm = d3po_on(
        env, full_policy(env), steps_per_update=3, num_inner_epochs=2, timestep_fraction=0.5, videos_per_update=32
    )
    seen, loss = [], algorithm._loss
    algorithm._loss = lambda rollout, pairs, k: seen.append((id(rollout), pairs, k)) or loss(rollout, pairs, k)
    metrics = algorithm.update()
    assert metrics["optimiser_steps"] == 6 and metrics["pairs"] == 8 * 6
    used = sum(len(pairs) for _, pairs, _ in seen)
    assert used == 2 * 8 * 6 * max(1, len(algorithm.steps) // 2)  # every pair once a pass, at half of the steps
    assert {k for _, _, k in seen} <= set(algorithm.steps)
    # The optimiser steps of a pass hold different groups, together all; each draws its timesteps anew.
    half, dealt = max(1, len(algorithm.steps) // 2), []
    algorithm._step = lambda parts, step=algorithm._step: dealt.append(len(seen)) or step(parts)
    seen.clear()
    algorithm.update()
    ends = [*dealt[1:], len(seen)]
    steps = [seen[start:end] for start, end in zip(dealt, ends, strict=True)]
    assert len(steps) == 6
    for epoch in (steps[:3], steps[3:]):
        groups = [{(key, int(pair[0]) // 4) for key, pairs, _ in step for pair in pairs} for step in epoch]
        assert sorted(map(len, groups)) == [2, 3, 3] and len(set.union(*groups)) == 8
    times = [{k for _, _, k in step} for step in steps]
    assert all(len(found) == half for found in times) and len({tuple(sorted(found)) for found in times}) > 1


@pytest.mark.parametrize("schedule", ["flow", "epsilon"])
@pytest.mark.parametrize(("pairs", "clip_range"), [("all_pairs", 0.1), ("best_vs_worst", None)])
def test_it_moves_to_the_better_side_without_a_differentiable_reward(schedule, pairs, clip_range):
    def blind(video, prompts):
        return TargetReward(1.0)(video, prompts).detach()

    blind.differentiable = False
    env = gaussian_env(schedule, reward=blind, num_envs=32, group_size=8)
    options = {"weight_decay": 0.0, "learning_rate": 0.05}
    algorithm = d3po_on(env, full_policy(env), pairs=pairs, clip_range=clip_range, **options)
    rows = [algorithm.update() for _ in range(25)]
    assert sum(row["reward_mean"] for row in rows[-5:]) / 5 > 0.6 * rows[0]["reward_mean"]  # rewards are <= 0
    assert env.mdp.counters.reward_backward_queries == 0
    if clip_range:
        assert all(math.log1p(math.exp(-BOUND)) - 1e-6 <= row["loss"] <= math.log1p(math.exp(BOUND)) for row in rows)


def test_tied_rewards_change_nothing():
    env = gaussian_env(reward=tied)
    policy = full_policy(env)
    before = weight_of(policy).detach().clone()
    metrics = d3po_on(env, policy).update()
    assert metrics["optimiser_steps"] == metrics["pairs"] == metrics["loss"] == 0.0
    assert torch.equal(weight_of(policy), before)


@pytest.mark.parametrize("refreshed", [False, True])
def test_a_run_continues_bit_for_bit_from_a_checkpoint(refreshed, tmp_path):
    options = {"pairs": "random", "timestep_fraction": 0.5, "steps_per_update": 2}
    env = gaussian_env()
    policy = env.make_policy(lora_rank=2)
    algorithm = d3po_on(env, policy, **options)
    algorithm.update()
    if refreshed:
        policy.refresh_reference()
    algorithm.update()

    def another():
        env = gaussian_env()
        policy = env.make_policy(lora_rank=2, seed=5)
        return d3po_on(env, policy, seed=99, **options), policy

    goes_on_bit_for_bit(algorithm, policy, another, tmp_path, 2)


def test_refusals_name_the_way_out():
    env = gaussian_env(noise_level=0.0)
    with pytest.raises(ValueError, match="noise_level > 0.*DiffusionDPO"):
        d3po_on(env, full_policy(env))
    env = gaussian_env("flow", sampler="flow_ode", noise_level=None)
    with pytest.raises(ValueError, match="has none; make the env with noise_level > 0"):
        d3po_on(env, full_policy(env))
    env = gaussian_env(group_size=1)
    with pytest.raises(ValueError, match="group_size=1.*group_size=8"):
        d3po_on(env, full_policy(env))
    env = gaussian_env()
    with pytest.raises(ValueError, match="micro_batch is 6.*group_size=4.*set it to 4"):
        d3po_on(env, full_policy(env), micro_batch=6)
    with pytest.raises(ValueError, match="steps_per_update is 9, more than the 8 groups"):
        d3po_on(env, full_policy(env), steps_per_update=9)
    with pytest.raises(ValueError, match="videos_per_update is 24.*num_envs=16"):
        d3po_on(env, full_policy(env), videos_per_update=24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta is 0"),
        ({"clip_range": 1.0}, "clip_range is 1.0.*None for no clip"),
        ({"timestep_fraction": 1.5}, "timestep_fraction is 1.5"),
        ({"pairs": "best"}, "pairs is 'best'"),
    ],
)
def test_the_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        D3POConfig(**options)


def test_published_settings_and_preset():
    published = D3POConfig()
    assert (published.beta, published.clip_range, published.learning_rate) == (0.1, 0.1, 3e-5)
    assert (published.videos_per_update, published.pairs, published.weight_decay) == (20, "all_pairs", 1e-4)
    assert D3POConfig.preset("MovingShapes").videos_per_update == 64
    with pytest.raises(ValueError, match="only for MovingShapes"):
        D3POConfig.preset("Sora")
