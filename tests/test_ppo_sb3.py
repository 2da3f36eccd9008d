"""Stable-Baselines3's PPO on the environment: what reaches it, its gradient, resuming, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conduct import goes_on_bit_for_bit
from gaussian import Recorder, full_policy, gaussian_env
from models import tiny_env
from stable_baselines3.common.vec_env import VecEnv

import algos
import vdm_env
from algos.ppo_sb3 import SB3PPO, SB3PPOConfig, SB3VecEnv
from algos.rollout import collect


def ppo_on(env, policy, **options):
    options = {"videos_per_rollout": 32, "learning_rate": 0.01, **options}
    return SB3PPO(env, policy, SB3PPOConfig(**options))


class StandStill(Recorder):
    """SB3 also sets the learning rate, which is nothing here."""

    param_groups: list = []

    def __init__(self, ppo):
        super().__init__(ppo)
        ppo.model.policy.optimizer = self


def rows_of(ppo):
    return list(ppo.model.rollout_buffer.get())


@pytest.mark.parametrize("baseline", ["batch", "group"])
def test_the_reward_rises(baseline):
    env = gaussian_env("flow", num_envs=32)
    ppo = ppo_on(env, full_policy(env), weight_decay=0.0, baseline=baseline, learning_rate=0.02)
    rewards = [ppo.update()["reward_mean"] for _ in range(14)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


def test_what_is_stored_is_what_the_policy_does_and_the_ratio_is_exactly_one():
    env = tiny_env(num_envs=4, guidance_scale=3.0)
    policy = env.make_policy(lora_rank=2)
    ppo = ppo_on(env, policy, videos_per_rollout=8, learning_rate=1e-3)
    ppo.update()  # the adapter is no longer zero
    stream = env.state_dict()
    StandStill(ppo)
    metrics = ppo.update()
    buffer = ppo.model.rollout_buffer
    env.load_state_dict(stream)
    rewards = []
    for b in range(2):
        rollout = collect(env, policy)
        rewards.append(rollout.reward)
        for k in range(4):
            row, obs = b * 4 + k, rollout.observations[k]
            assert np.array_equal(buffer.actions[row], rollout.actions[k].flatten(1).numpy())
            assert np.array_equal(buffer.log_probs[row], rollout.log_probs[k].numpy())
            for name, value in obs.items():
                assert np.array_equal(buffer.observations[name][row].reshape(value.shape), value.numpy()), name
        score = (rollout.reward - rollout.reward.mean()) / (rollout.reward.std(correction=0) + 1e-8)
        np.testing.assert_allclose(buffer.rewards[b * 4 + 3], score.numpy(), rtol=1e-5, atol=1e-6)
        assert not buffer.rewards[b * 4 : b * 4 + 3].any()
    assert metrics["reward_mean"] == float(torch.cat(rewards).mean())
    noisy = [b * 4 + k for b in range(2) for k in ppo.steps]
    rows = rows_of(ppo)
    assert len(rows) == len(noisy) == metrics["optimiser_steps"]
    for row in rows:
        _, log_prob, _ = ppo.model.policy.evaluate_actions(row.observations, row.actions)
        assert log_prob.requires_grad and torch.equal(log_prob.detach(), row.old_log_prob)
    assert metrics["clip_fraction"] == 0.0 and metrics["kl_old_nats"] == 0.0


def test_the_divergence_is_that_of_the_summed_log_ratios():
    """So close to 1 that SB3's own estimate, in float32, is nothing but rounding."""
    env = gaussian_env(num_envs=8)
    policy = full_policy(env)
    ppo = ppo_on(env, policy, videos_per_rollout=8, num_inner_epochs=2, learning_rate=1e-5, weight_decay=0.0)
    ratios, evaluate = [], ppo.model.policy.evaluate_actions

    def watched(obs, actions):
        with torch.no_grad():
            plain = {name: v if name == "latents" else v[:, 0] for name, v in obs.items()}
            after = policy.dist(plain).log_prob_sum(actions.view_as(plain["latents"]))
            now = [p.detach().clone() for p in policy.trainable_parameters()]
            for p, start in zip(policy.trainable_parameters(), first, strict=True):
                p.copy_(start)
            ratios.append(after - policy.dist(plain).log_prob_sum(actions.view_as(plain["latents"])))
            for p, value in zip(policy.trainable_parameters(), now, strict=True):
                p.copy_(value)
        return evaluate(obs, actions)

    first = [p.detach().clone() for p in policy.trainable_parameters()]
    ppo.model.policy.evaluate_actions = watched
    metrics = ppo.update()
    assert len(ratios) == 2 * len(ppo.steps) == metrics["optimiser_steps"]
    expected = 0.5 * float(torch.cat(ratios).square().mean()) * len(ppo.steps)
    assert 0 < expected < 1e-3 and metrics["kl_old_nats"] == pytest.approx(expected, rel=1e-2)


def test_advantages_are_gae_and_the_gradient_is_that_of_the_clipped_surrogate():
    env = gaussian_env(num_envs=8)
    policy = full_policy(env)
    ppo = ppo_on(env, policy, videos_per_rollout=16, gae_lambda=0.7, max_grad_norm=1e9)
    with torch.no_grad():
        ppo.critic.value.weight.normal_(generator=torch.Generator().manual_seed(1))
    recorder = StandStill(ppo)
    ppo.update()
    buffer = ppo.model.rollout_buffer
    assert buffer.values.std() > 0.1
    for b in range(2):
        later = np.zeros(8)
        for row in reversed(range(b * 5, b * 5 + 5)):
            last = row == b * 5 + 4
            after = 0.0 if last else buffer.values[row + 1]
            later = buffer.rewards[row] + after - buffer.values[row] + 0.7 * later
            np.testing.assert_allclose(buffer.advantages[row], later, rtol=1e-4, atol=1e-5)
    total = 0.0
    for row in rows_of(ppo):
        obs = {name: v if v.ndim > 2 else v[:, 0] for name, v in row.observations.items()}
        log_prob = policy.dist(obs).log_prob(row.actions.view_as(obs["latents"]))
        advantage = (row.advantages - row.advantages.mean()) / (row.advantages.std() + 1e-8)
        total = total - (advantage * (log_prob - log_prob.detach()).exp()).mean()
    (expected,) = torch.autograd.grad(total, policy.trainable_parameters())
    found = torch.stack([g[0] for g in recorder.gradients]).sum(0)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_global_random_states_are_left_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    env = gaussian_env()
    ppo_on(env, full_policy(env), videos_per_rollout=16).update()
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numbers)
    assert env.state_dict()["videos_drawn"] == 16  # no batch was drawn ahead


def test_actions_that_sb3_would_clip_are_refused():
    env = gaussian_env()
    with pytest.raises(ValueError, match="reached action_bound=0.5 .*Raise action_bound"):
        ppo_on(env, full_policy(env), action_bound=0.5).update()


def test_a_gradient_that_is_not_finite_is_refused():
    env = gaussian_env()
    policy = full_policy(env)
    ppo = ppo_on(env, policy)
    (weight,) = policy.trainable_parameters()
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, math.nan)
    with pytest.raises(FloatingPointError, match="parameters were not changed"):
        ppo.optimizer.step()
    assert torch.equal(weight, before) and weight.grad is None


def test_the_vector_env_keeps_sb3_s_contract():
    env = gaussian_env(num_envs=4, noise_level=0.0)
    vec = SB3VecEnv(env, episodes=2, baseline="batch", bound=100.0)
    assert isinstance(vec, VecEnv) and vec.num_envs == 4 and np.isfinite(vec.action_space.high).all()
    obs = vec.reset()
    for episode in range(2):
        first = obs["video_seed"]
        for k in range(5):
            for i in range(4):
                assert vec.observation_space.contains({name: value[i] for name, value in obs.items()})
            assert (obs["step"] == k).all() and obs["step"].shape == (4, 1)
            obs, reward, done, infos = vec.step(0.1 * obs["latents"])
            assert done.all() == (k == 4) and len(infos) == 4 and reward.shape == (4,)
        assert abs(reward.mean()) < 1e-5 and abs(reward.std() - 1) < 1e-3
        if episode == 0:
            assert (obs["step"] == 0).all() and (obs["video_seed"] != first).all()  # reset by itself
    assert (obs["step"] == 5).all()  # and not after the last
    assert vec.get_attr("num_steps") == [5] * 4 and vec.env_is_wrapped(object) == [False] * 4


def test_the_same_seed_gives_the_same_run_and_it_continues_from_a_checkpoint(tmp_path):
    env = gaussian_env()
    policy = env.make_policy(lora_rank=2)
    ppo = ppo_on(env, policy)
    first = ppo.update()

    def another():
        env = gaussian_env()
        policy = env.make_policy(lora_rank=2, seed=5)
        return ppo_on(env, policy, seed=99), policy

    expected, _ = goes_on_bit_for_bit(ppo, policy, another, tmp_path, 2)
    env = gaussian_env()
    twin = ppo_on(env, env.make_policy(lora_rank=2))
    assert [twin.update() for _ in range(3)] == [first, *expected]


def test_it_runs_on_moving_shapes(tmp_path):
    env = vdm_env.make("MovingShapes-HPS", num_envs=4, group_size=4, num_steps=3, guidance_scale=1.0)
    policy = env.make_policy(lora_rank=4)
    before = policy.lora_state_dict()
    config = replace(SB3PPOConfig.preset("MovingShapes"), videos_per_rollout=4)
    algorithm = SB3PPO(env, policy, config)
    assert algos.run(algorithm, updates=1, out=tmp_path / "run", progress=False).updates == 1
    row = json.loads((tmp_path / "run" / "train.jsonl").read_text())
    assert 0 < row["reward_mean"] < 1 and row["reward_queries"] == 4
    assert any(not torch.equal(before[k], v) for k, v in policy.lora_state_dict().items())


def test_it_refuses_what_it_cannot_do():
    for options, config, message in (
        ({"noise_level": 0.0}, {}, "at this noise level has none"),
        ({"group_size": 1}, {"baseline": "group"}, "group_size=1; make it with group_size=8"),
        ({"num_envs": 1, "group_size": 1}, {}, "num_envs is 1"),
        ({"dtype": torch.float64}, {}, "latents are torch.float64, SB3 stores float32"),
        ({}, {"videos_per_rollout": 40}, "videos_per_rollout is 40.*num_envs=16"),
    ):
        env = gaussian_env(**options)
        with pytest.raises(ValueError, match=message):
            ppo_on(env, full_policy(env), **config)
    for options, message in (
        ({"clip_range": 1.0}, "clip_range is 1.0"),
        ({"action_bound": 0.0}, "action_bound is 0.0"),
        ({"baseline": "prompt"}, "baseline is 'prompt'"),
    ):
        with pytest.raises(ValueError, match=message):
            SB3PPOConfig(**options)
    with pytest.raises(ValueError, match="no SB3PPOConfig preset for 'Sora', only for MovingShapes"):
        SB3PPOConfig.preset("Sora")
