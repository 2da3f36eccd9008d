"""What holds for any algorithm: it finds the optimum, repeats, resumes, and changes what it may change only."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from conduct import goes_on_bit_for_bit, refuses_a_gradient_that_is_not_finite, repeats
from gaussian import START, ddpo_on, full_policy, gaussian_env, vader_on

from algos.ddpo import DDPO, DDPOConfig
from algos.vader import VADER, VADERConfig
from vdm_env.worlds.gaussian import final_law, optimal_means

VADER_CASES = {
    "one step": {"backprop_steps": 1},
    "three steps": {"backprop_steps": 3, "loss": "one_minus"},
    "whole chain": {"backprop_steps": 5, "loss": "target_l1", "loss_target": 0.0, "loss_scale": 1.0},
    "random cut": {"truncation": "random"},
    "from step 2": {"truncation": "step", "cutoff_step": 2},
}


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("case", VADER_CASES)
def test_vader_finds_the_optimum(case, level):
    env = gaussian_env(noise_level=level, num_envs=32)
    policy = full_policy(env)
    options = {
        "loss": "negative",
        "learning_rate": 0.05,
        "weight_decay": 0.0,
        "videos_per_update": 32,
        **VADER_CASES[case],
    }
    vader = VADER(env, policy, VADERConfig(**options))
    history = [policy.trainable_parameters()[0].detach().clone() for _ in range(80) if vader.update()]
    best = optimal_means(final_law(env.model, env.mdp.table), 1.0)
    found = torch.stack(history[-20:]).mean(0)
    assert torch.allclose(found.double(), best[:, None].expand_as(found), atol=0.06), found
    assert (START.T - best[:, None]).abs().max() > 1


@pytest.mark.parametrize(("schedule", "advantage"), [("flow", "group"), ("epsilon", "per_prompt"), ("v", "batch")])
def test_ddpo_finds_the_optimum(schedule, advantage):
    env = gaussian_env(schedule, num_envs=64, group_size=8)
    policy = full_policy(env)
    config = DDPOConfig(
        videos_per_rollout=64, updates_per_rollout=1, learning_rate=0.04, weight_decay=0.0, advantage=advantage
    )
    ddpo = DDPO(env, policy, config)
    history = [policy.trainable_parameters()[0].detach().clone() for _ in range(100) if ddpo.update()]
    best = optimal_means(final_law(env.model, env.mdp.table), 1.0)
    found = torch.stack(history[-40:]).mean(0)
    assert torch.allclose(found.double(), best[:, None].expand_as(found), atol=0.2), found


def test_ddpo_penalty_brings_the_policy_back_to_the_reference():
    """With equal rewards every advantage is 0 and only the KL is left; its minimum is the untrained model."""
    env = gaussian_env(reward=lambda video, prompts: torch.ones(len(video)))
    policy = full_policy(env)
    (weight,) = policy.trainable_parameters()
    with torch.no_grad():
        weight += 0.3
    config = DDPOConfig(
        videos_per_rollout=16,
        updates_per_rollout=1,
        learning_rate=0.02,
        weight_decay=0.0,
        kl_coefficient=1.0,
        advantage="batch",
    )
    ddpo = DDPO(env, policy, config)
    for _ in range(80):
        ddpo.update()
    assert torch.allclose(weight.detach(), START.T, atol=0.02)


ALGORITHMS = {"ddpo": ddpo_on, "vader": vader_on}
each_algorithm = pytest.mark.parametrize("build", ALGORITHMS.values(), ids=ALGORITHMS)


@each_algorithm
@pytest.mark.parametrize("rank", [0, 2])
def test_only_trainable_parameters_get_gradients_and_the_reference_stays(build, rank):
    env = gaussian_env()
    policy = env.make_policy(lora_rank=rank)
    obs, _ = env.reset(seed=3)
    with torch.no_grad(), policy.reference():
        before = policy.mean(obs)
    original = {name: p.detach().clone() for name, p in env.model.denoiser.named_parameters() if "policy_" not in name}
    algorithm = build(env, policy)
    trainable = {id(p) for p in policy.trainable_parameters()}
    assert {id(p) for p in algorithm.parameters} == trainable
    touched = []

    def remember(key, gradient):
        touched.append(key)

    for parameter in [*env.model.denoiser.parameters(), *policy._model.denoiser.parameters()]:
        if id(parameter) not in trainable:
            assert not parameter.requires_grad
        elif parameter.requires_grad:
            parameter.register_hook(partial(remember, id(parameter)))
    for _ in range(2):
        algorithm.update()
    assert set(touched) == trainable
    with torch.no_grad(), policy.reference():
        assert torch.equal(policy.mean(obs), before)
    with torch.no_grad():
        assert not torch.equal(policy.mean(obs), before)
    for name, parameter in env.model.denoiser.named_parameters():
        if "policy_" not in name:
            assert torch.equal(parameter, original[name]), name


@each_algorithm
def test_the_same_seed_gives_the_same_run_and_another_one_another(build):
    def run(seed):
        env = gaussian_env()
        algorithm = build(env, full_policy(env), seed=seed)
        return [algorithm.update() for _ in range(3)]

    repeats(run)


@each_algorithm
def test_a_run_continues_bit_for_bit_from_a_checkpoint(build, tmp_path):
    env = gaussian_env()
    policy = env.make_policy(lora_rank=2)
    algorithm = build(env, policy)
    for _ in range(2):
        algorithm.update()

    def another():
        env = gaussian_env()
        policy = env.make_policy(lora_rank=2, seed=5)
        return build(env, policy, seed=99), policy

    goes_on_bit_for_bit(algorithm, policy, another, tmp_path, 3)


@each_algorithm
def test_metrics_are_plain_finite_numbers_and_the_costs_are_counted(build):
    env = gaussian_env()
    algorithm = build(env, full_policy(env))
    metrics = algorithm.update()
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert {"reward_mean", "reward_std", "zero_std_fraction", "loss", "grad_norm", "learning_rate"} <= set(metrics)
    counters = env.mdp.counters
    assert counters.videos_sampled == counters.reward_queries == 32
    if build is ddpo_on:
        assert counters.denoiser_forwards == 2 * 32 * 5 and counters.denoiser_backwards == 32 * 5
        assert counters.reward_backward_queries == 0
    else:
        assert counters.denoiser_forwards == 32 * 5 and counters.reward_backward_queries == 32


@each_algorithm
def test_a_gradient_that_is_not_finite_changes_nothing(build):
    env = gaussian_env()
    policy = full_policy(env)
    algorithm = build(env, policy)
    refuses_a_gradient_that_is_not_finite(algorithm, policy)
    algorithm.update()
    assert torch.isfinite(policy.trainable_parameters()[0]).all()
