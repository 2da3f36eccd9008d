"""The sanity checks pass for what is right, and each fails for a mistake made on purpose."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from gaussian import ddpo_on, full_policy, gaussian_env, vader_on
from models import PROMPTS, brightness, tiny_env, tiny_model

import vdm_env
from algos.ppo_torchrl import TorchRLPPO, TorchRLPPOConfig
from algos.rollout import collect
from algos.sanity import (
    check_algorithm,
    gradients_where_they_belong,
    log_prob_other_batch,
    log_prob_parity,
    ratio_before_update,
    ratio_of_algorithm,
    reference_unchanged,
    sde_marginals,
    table,
)
from algos.trial import parameters_of, try_update
from vdm_env import MeanNormal, noise


def ppo_on(env, policy):
    config = TorchRLPPOConfig(videos_per_rollout=16, num_inner_epochs=2, learning_rate=0.01)
    return TorchRLPPO(env, policy, config)


class Bent:
    """A policy with one thing changed: `bend` gets the mean, the observation and the policy itself."""

    def __init__(self, policy, bend, scale=1.0):
        self.policy, self.bend, self.scale = policy, bend, scale

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def mean(self, obs):
        return self.bend(self.policy.mean(obs), obs)

    def dist(self, obs):
        return MeanNormal(self.mean(obs), obs["action_std"])

    def __call__(self, obs):
        drawn = noise.normal(obs["video_seed"], obs["step"], obs["latents"].shape[1:])
        return self.mean(obs) + self.scale * obs["action_std"].view(-1, 1, 1, 1, 1) * drawn


class Faulty:
    """An algorithm with a fault: `fault` is called after its update."""

    def __init__(self, algorithm, fault):
        self.inner, self.fault = algorithm, fault

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def update(self):
        metrics = self.inner.update()
        return self.fault(metrics) or metrics


@pytest.fixture(scope="module")
def tiny():
    env = tiny_env(num_envs=3, guidance_scale=2.0)
    policy = env.make_policy(lora_rank=2)
    with torch.no_grad():
        for i, parameter in enumerate(policy.trainable_parameters()):
            parameter.add_(0.05 * noise.normal([i], 0, parameter.shape)[0])
    return env, policy


# ----------------------------------------------------------------------------------------- what is right passes


@pytest.mark.parametrize("build", [ddpo_on, vader_on, ppo_on])
def test_a_good_algorithm_passes_and_is_left_as_it_was(build, capsys):
    def make():
        env = gaussian_env()
        algorithm = build(env, env.make_policy(lora_rank=2))
        algorithm.update()  # in the middle of a run: the optimiser has a state
        return algorithm

    algorithm, untouched = make(), make()
    counters = dataclasses.replace(algorithm.env.mdp.counters)
    results = check_algorithm(algorithm)
    assert all(r.ok for r in results), table(results)
    names = [r.name for r in results]
    assert names[:6] == [
        "ratio_before_update",
        "log_prob_parity(float32)",
        "log_prob_other_batch(float32)",
        "log_prob_parity(bfloat16)",
        "log_prob_other_batch(bfloat16)",
        "sde_marginals",
    ]
    assert ("ratio_of_algorithm" in names) == (build is not vader_on)
    assert names[-2:] == ["gradients_where_they_belong", "reference_unchanged"]
    printed = capsys.readouterr().out
    assert printed.count("ok    ") == len(results) and "FAILED" not in printed
    assert algorithm.env.mdp.counters == counters
    assert algorithm.update() == untouched.update()
    for a, b in zip(algorithm.policy.trainable_parameters(), untouched.policy.trainable_parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_env_that_was_used_with_other_noise_is_checked_all_the_same():
    env = gaussian_env("flow", num_envs=8)
    algorithm = ddpo_on(env, full_policy(env), videos_per_rollout=8, updates_per_rollout=1)
    env.reset(options={"noise_levels": [0.0] * 5})
    names = [result.name for result in check_algorithm(algorithm, show=False)]
    assert "ratio_before_update" in names and "sde_marginals" in names


def test_a_rollout_with_noise_of_its_own_is_checked_where_it_has_any():
    env = gaussian_env("flow", num_envs=8)
    policy = full_policy(env)
    rollout = collect(env, policy, noise_levels=[0.7, 0.7, 0.0, 0.0, 0.0])
    env.reset()
    result = ratio_before_update(env, policy, rollout=rollout)
    assert result.ok and result.measured == 0.0
    with pytest.raises(ValueError, match="no noise here"):
        ratio_before_update(env, policy, rollout=collect(env, policy, noise_levels=[0.0] * 5))


def test_only_what_applies_is_checked():
    env = gaussian_env(noise_level=0.0)
    results = check_algorithm(vader_on(env, full_policy(env)), show=False)
    assert [r.name for r in results] == ["gradients_where_they_belong", "reference_unchanged"]
    for check in (ratio_before_update, log_prob_parity, log_prob_other_batch, sde_marginals):
        with pytest.raises(ValueError, match="no noise here"):
            check(env, full_policy(env))
    with pytest.raises(ValueError, match="num_envs is 1"):
        log_prob_other_batch(gaussian_env(num_envs=1, group_size=1), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_a_real_network(tiny, dtype):
    env, policy = tiny
    parity = log_prob_parity(env, policy, dtype)
    assert parity.ok and parity.measured == 0.0
    other = log_prob_other_batch(env, policy, dtype)
    assert other.ok and other.bound < 1.0
    assert ratio_before_update(env, policy).ok


def test_bfloat16_is_really_used(tiny):
    env, policy = tiny
    seen = []
    hook = env.model.denoiser.proj_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    log_prob_parity(env, policy, torch.bfloat16)
    low, seen[:] = list(seen), []
    log_prob_parity(env, policy)
    hook.remove()
    assert set(low) == {torch.bfloat16} and set(seen) == {torch.float32} and len(low) == len(seen)
    bounds = [log_prob_other_batch(env, policy, dtype).bound for dtype in (torch.float32, torch.bfloat16)]
    assert bounds[1] > 1e4 * bounds[0]


def test_weights_in_bfloat16(tiny):
    env = vdm_env.make(model=tiny_model("flow", torch.bfloat16), reward=brightness, prompts=PROMPTS, num_envs=3)
    policy = env.make_policy(lora_rank=2)
    assert {p.dtype for p in env.model.denoiser.parameters()} == {torch.bfloat16, torch.float32}  # LoRA in float32
    assert log_prob_parity(env, policy).measured == 0.0
    result, single = log_prob_other_batch(env, policy), log_prob_other_batch(*tiny)
    assert result.ok and result.bound > 1e4 * single.bound  # the weights' unit, not the latents'


# -------------------------------------------------------------------------------------------- mistakes are found


def dropping():
    generator = torch.Generator().manual_seed(0)
    return lambda mean, obs: mean * (torch.rand(mean.shape, generator=generator) > 0.1)


def other_when_learning(mean, obs):
    return mean * 1.01 if torch.is_grad_enabled() else mean


@pytest.mark.parametrize("bend", [dropping(), other_when_learning])
def test_an_update_that_sees_another_policy_is_found(tiny, bend):
    env, policy = tiny
    for result in (
        ratio_before_update(env, Bent(policy, bend)),
        log_prob_parity(env, Bent(policy, bend)),
        log_prob_parity(env, Bent(policy, bend), torch.bfloat16),
    ):
        assert not result.ok and result.measured > 1e-5 and "look for: " in result.message
    assert "FAILED" in table([result]) and "log_prob_parity(bfloat16)" in table([result])


@pytest.mark.parametrize("bend", [lambda mean, obs: mean - 0.01 * mean.mean(0, keepdim=True), dropping()])
def test_videos_that_influence_each_other_are_found(tiny, bend):
    env, policy = tiny
    result = log_prob_other_batch(env, Bent(policy, bend))
    assert not result.ok and "mixes the videos" in result.message


def test_training_of_the_reference_is_found_and_undone():
    env = gaussian_env()
    base = env.model.denoiser.mean.weight
    before = base.detach().clone()

    def train_the_reference(metrics):
        with torch.no_grad():
            base.add_(0.25)

    algorithm = Faulty(ddpo_on(env, full_policy(env)), train_the_reference)
    trial = try_update(algorithm)
    assert torch.equal(base, before)
    assert len(trial.strays) == 1 and trial.strays[0].endswith("model.denoiser.mean.weight")
    assert not gradients_where_they_belong(algorithm, trial=trial).ok
    result = reference_unchanged(algorithm)
    assert not result.ok and result.measured > 0.01 and result.bound == 0.0


def test_gradients_in_the_base_weights_are_found():
    env = tiny_env(num_envs=4, group_size=2)
    algorithm = ddpo_on(env, env.make_policy(lora_rank=2), videos_per_rollout=4, updates_per_rollout=1)
    assert gradients_where_they_belong(algorithm).ok
    env.model.denoiser.proj_out.requires_grad_(True)
    result = gradients_where_they_belong(algorithm)
    assert not result.ok and result.measured == 2 and "proj_out.weight" in result.message
    assert env.model.denoiser.proj_out.weight.grad is None


def test_a_change_of_the_decoder_is_found():
    env = tiny_env(num_envs=4, group_size=2)
    algorithm = ddpo_on(env, env.make_policy(lora_rank=2), videos_per_rollout=4, updates_per_rollout=1)
    weight = next(env.model.codec.vae.parameters())

    def change(metrics):
        with torch.no_grad():
            weight.mul_(1.5)

    result = gradients_where_they_belong(Faulty(algorithm, change))
    assert result.measured == 1 and "vae" in result.message


def test_all_networks_are_watched():
    env = tiny_env()
    policy = env.make_policy(lora_rank=2)
    found = {id(p) for _, p in parameters_of(env.mdp, policy)}
    for part in (env.model.denoiser, env.model.codec.vae, env.model.text.encoder):
        assert {id(p) for p in part.parameters()} <= found


def test_a_policy_that_no_gradient_reaches_is_found():
    env = gaussian_env()

    class Asleep:
        def __init__(self):
            self.env, self.policy = env, full_policy(env)

        def update(self):
            return {"loss": 0.0}

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    result = gradients_where_they_belong(Asleep())
    assert not result.ok and result.measured == math.inf and "no gradient reached the policy" in result.message
    with pytest.raises(ValueError, match="Asleep.update.. returns no 'ratio_first_error'"):
        ratio_of_algorithm(Asleep())


@pytest.mark.parametrize("error", [0.1, math.nan])
def test_an_algorithm_s_own_ratio_is_read(error):
    env = gaussian_env()
    algorithm = Faulty(ddpo_on(env, full_policy(env)), lambda metrics: {**metrics, "ratio_first_error": error})
    assert not ratio_of_algorithm(algorithm).ok
    assert ratio_of_algorithm(algorithm.inner).ok


def test_a_failed_update_is_undone_too():
    env = gaussian_env()
    policy = full_policy(env)
    (weight,) = policy.trainable_parameters()
    before, stream = weight.detach().clone(), env.state_dict()

    def fail(metrics):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        try_update(Faulty(ddpo_on(env, policy), fail))
    assert torch.equal(weight, before) and env.state_dict()["videos_drawn"] == stream["videos_drawn"]


FAST = {"videos": 256, "batch": 256, "num_steps": 60}


@pytest.mark.parametrize("schedule", ["flow", "v"])
def test_noise_that_is_not_the_sampler_s_is_found(schedule):
    env = gaussian_env(schedule)
    policy = full_policy(env)
    good = sde_marginals(env, policy, **FAST)
    assert good.ok and good.bound == 4.5
    for scale in (0.6, 1.4):
        bad = sde_marginals(env, Bent(policy, lambda mean, obs: mean, scale), **FAST)
        assert not bad.ok and bad.measured > 6
    drifting = Bent(policy, lambda mean, obs: mean + 0.3 * obs["stochastic"].view(-1, 1, 1, 1, 1))
    assert not sde_marginals(env, drifting, **FAST).ok


def test_a_sampler_that_does_not_keep_the_marginals_is_found():
    env = gaussian_env("flow", sampler="cps", noise_level=0.7)
    assert sde_marginals(env, full_policy(env), **FAST).measured > 4.5
    with pytest.raises(ValueError, match="give 8 or more"):
        sde_marginals(env, full_policy(env), videos=4)
