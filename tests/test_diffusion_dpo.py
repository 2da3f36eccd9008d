"""Online Diffusion-DPO: it learns from the order of rewards, repeats, resumes, and leaves the reference alone."""

from __future__ import annotations

import math

import pytest
import torch
from conduct import goes_on_bit_for_bit, refuses_a_gradient_that_is_not_finite, repeats
from gaussian import Recorder, full_policy, gaussian_env, tied
from models import tiny_env

from algos import DiffusionDPO, DiffusionDPOConfig
from vdm_env.worlds.gaussian import final_law, optimal_means


def dpo_on(env, policy, **options):
    options = {
        "videos_per_update": 32,
        "learning_rate": 0.02,
        "warmup_steps": 0,
        "beta": 2.0,
        "buffer_pairs": 24,
        "optimiser_steps": 2,
        "pairs_per_step": 8,
        **options,
    }
    return DiffusionDPO(env, policy, DiffusionDPOConfig(**options))


@pytest.mark.parametrize("schedule", ["epsilon", "flow", "v"])
def test_on_policy_pairs_lead_to_the_best_means(schedule):
    env = gaussian_env(schedule, num_envs=64, group_size=8)
    policy = full_policy(env)
    options = {"learning_rate": 0.05, "weight_decay": 0.0, "videos_per_update": 64, "micro_batch": 256}
    dpo = dpo_on(env, policy, on_policy=True, pairs="all_pairs", **options)
    history = [policy.trainable_parameters()[0].detach().clone() for _ in range(80) if dpo.update()]
    best = optimal_means(final_law(env.model, env.mdp.table), 1.0)
    found = torch.stack(history[-30:]).mean(0)
    assert torch.allclose(found.double(), best[:, None].expand_as(found), atol=0.2), found


@pytest.mark.parametrize("pairs", ["best_vs_worst", "best_vs_random", "all_pairs", "random"])
def test_replayed_pairs_raise_the_reward_without_a_differentiable_reward(pairs):
    def blind(video, prompts):
        return -(video.mean((1, 2, 3, 4)) - 0.6).abs().detach()

    blind.differentiable = False
    env = gaussian_env(reward=blind, num_envs=32, group_size=8)
    dpo = dpo_on(env, full_policy(env), pairs=pairs, weight_decay=0.0, buffer_pairs=112, pairs_per_step=16)
    rows = [dpo.update() for _ in range(40)]
    first, last = rows[0]["reward_mean"], sum(row["reward_mean"] for row in rows[-5:]) / 5
    assert last > first / 2  # rewards are <= 0: the distance to the target is halved
    assert env.mdp.counters.reward_backward_queries == 0


def test_winner_and_loser_share_noise_and_timestep_and_the_first_loss_is_log_2():
    env = gaussian_env("flow")
    dpo = dpo_on(env, full_policy(env), on_policy=True, micro_batch=3)
    seen, add_noise = [], env.mdp.add_noise

    def spy(clean, noise, t):
        seen.append((clean, noise, t))
        return add_noise(clean, noise, t)

    env.mdp.add_noise = spy
    metrics = dpo.update()
    assert [len(clean) for clean, _, _ in seen] == [6, 6, 4]  # 8 pairs in parts of 3
    for clean, noise, t in seen:
        for shared in (noise, t):
            assert torch.equal(*shared.chunk(2))
        assert not torch.equal(*clean.chunk(2))
    assert len({float(v) for _, _, t in seen for v in t}) == 8
    assert metrics["loss"] == pytest.approx(math.log(2)) and metrics["margin"] == 0.0


def test_the_parts_of_a_step_make_the_gradient_of_the_whole():
    env = gaussian_env(num_envs=16)
    dpo = dpo_on(env, full_policy(env), micro_batch=8)
    _, pairs = dpo._sample()
    pairs = {name: value[:3] for name, value in pairs.items()}
    drawn, recorder = dpo.generator.get_state(), Recorder(dpo)
    recorder.param_groups = []
    for micro_batch in (8, 2, 1):
        dpo.config = DiffusionDPOConfig(micro_batch=micro_batch, beta=2.0)
        dpo.generator.set_state(drawn)
        dpo._step(pairs)
    full, *parts = (gradients[0] for gradients in recorder.gradients)
    assert full.abs().max() > 0 and all(torch.allclose(part, full, rtol=1e-4, atol=1e-7) for part in parts)


def test_a_step_that_failed_half_way_leaves_no_gradient_behind():
    env = gaussian_env(num_envs=16)
    dpo = dpo_on(env, full_policy(env), micro_batch=2)
    _, pairs = dpo._sample()
    drawn, loss, recorder = dpo.generator.get_state(), dpo._loss, Recorder(dpo)
    recorder.param_groups, seen = [], []

    def second_fails(part):
        seen.append(part)
        if len(seen) == 2:
            raise MemoryError
        return loss(part)

    dpo._step(pairs)
    dpo._loss = second_fails
    with pytest.raises(MemoryError):
        dpo._step(pairs)
    dpo.generator.set_state(drawn)
    dpo._step(pairs)
    whole, again = (gradients[0] for gradients in recorder.gradients)
    assert whole.abs().max() > 0 and torch.equal(whole, again)


def test_the_buffer_keeps_the_latest_pairs_and_on_policy_keeps_none():
    env = gaussian_env()
    dpo = dpo_on(env, full_policy(env), buffer_pairs=12)
    counts, before = [], None
    for _ in range(3):
        metrics = dpo.update()
        counts.append((metrics["pairs_new"], metrics["pairs_buffered"], metrics["optimiser_steps"]))
        if before is not None:
            assert torch.equal(dpo.buffer["winner"][:4], before[-4:])
            for value in dpo.buffer.values():  # what was cut off is not kept in memory
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
        before = dpo.buffer["winner"].clone()
    assert counts == [(8, 8, 2), (8, 12, 2), (8, 12, 2)]
    metrics = dpo_on(env, full_policy(env), on_policy=True).update()
    assert (metrics["pairs_new"], metrics["pairs_buffered"], metrics["optimiser_steps"]) == (8, 0, 1)


@pytest.mark.parametrize("on_policy", [True, False])
def test_tied_rewards_change_nothing(on_policy):
    env = gaussian_env(reward=tied)
    policy = full_policy(env)
    before = policy.trainable_parameters()[0].detach().clone()
    metrics = dpo_on(env, policy, on_policy=on_policy).update()
    assert metrics["optimiser_steps"] == metrics["pairs_new"] == metrics["grad_norm"] == 0.0
    assert metrics["zero_std_fraction"] == 1.0
    assert torch.equal(policy.trainable_parameters()[0], before)


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_only_the_adapter_moves_and_the_reference_stays(kind):
    env = tiny_env(kind, num_envs=4, group_size=2, guidance_scale=3.0)
    policy = env.make_policy(lora_rank=2)
    obs, _ = env.reset(seed=3)
    with torch.no_grad(), policy.reference():
        before = policy.mean(obs)
    original = {n: p.detach().clone() for n, p in env.model.denoiser.named_parameters() if "policy_" not in n}
    adapter = [p.detach().clone() for p in policy.trainable_parameters()]
    dpo = dpo_on(env, policy, videos_per_update=4, beta=500.0)
    first = env.mdp.counters.denoiser_forwards
    metrics = dpo.update()
    # 4 videos with guidance, then 2 steps on 2 pairs: each video once by the policy and once by the reference
    assert env.mdp.counters.denoiser_forwards - first == 4 * 2 * env.num_steps + 2 * 4 * 2
    assert env.mdp.counters.denoiser_backwards == 2 * 4
    assert metrics["grad_norm"] > 0 and all(type(v) is float and math.isfinite(v) for v in metrics.values())
    assert any(not torch.equal(a, b) for a, b in zip(adapter, policy.trainable_parameters(), strict=True))
    with torch.no_grad(), policy.reference():
        assert torch.equal(policy.mean(obs), before)
    for name, parameter in env.model.denoiser.named_parameters():
        assert "policy_" in name or (torch.equal(parameter, original[name]) and parameter.grad is None), name


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_same_seed_gives_the_same_run_and_another_one_another(on_policy):
    def run(seed):
        env = gaussian_env()
        dpo = dpo_on(env, full_policy(env), seed=seed, on_policy=on_policy, pairs="random")
        return [dpo.update() for _ in range(3)]

    repeats(run)


@pytest.mark.parametrize(("updates", "refreshed"), [(0, False), (2, False), (2, True)])
def test_a_run_continues_bit_for_bit_from_a_checkpoint(updates, refreshed, tmp_path):
    env = gaussian_env()
    policy = env.make_policy(lora_rank=2)
    dpo = dpo_on(env, policy, warmup_steps=9)
    for _ in range(updates):
        dpo.update()
    if refreshed:
        policy.refresh_reference()

    def another():
        env = gaussian_env()
        policy = env.make_policy(lora_rank=2, seed=5)
        return dpo_on(env, policy, warmup_steps=9, seed=99), policy

    _, state = goes_on_bit_for_bit(dpo, policy, another, tmp_path, 3)
    if updates:
        with pytest.raises(ValueError, match="saved buffer holds 16 pairs.*buffer_pairs=8"):
            dpo_on(env, policy, buffer_pairs=8).load_state_dict(state)


def test_the_learning_rate_warms_up():
    env = gaussian_env()
    dpo = dpo_on(env, full_policy(env), warmup_steps=4, learning_rate=0.4)
    assert [dpo.update()["learning_rate"] for _ in range(3)] == pytest.approx([0.2, 0.4, 0.4])
    assert dpo.optimizer.param_groups[0]["lr"] == pytest.approx(0.4)


def test_a_gradient_that_is_not_finite_changes_nothing():
    env = gaussian_env()
    policy = full_policy(env)
    dpo = dpo_on(env, policy)
    refuses_a_gradient_that_is_not_finite(dpo, policy)
    assert dpo.steps_taken == 0


def test_refusals_name_the_way_out():
    env = gaussian_env(group_size=1)
    with pytest.raises(ValueError, match="group_size=1.*group_size=8.*DDPO"):
        dpo_on(env, full_policy(env))
    env = gaussian_env()
    with pytest.raises(ValueError, match="videos_per_update is 24.*num_envs=16"):
        dpo_on(env, full_policy(env), videos_per_update=24)
    with pytest.raises(ValueError, match="an update can make 48 pairs.*8 groups of 4.*buffer_pairs=48 or more"):
        dpo_on(env, full_policy(env), pairs="all_pairs")
    dpo_on(env, full_policy(env), pairs="all_pairs", on_policy=True)  # keeps no pairs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta is 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"pairs": "best"}, "pairs is 'best', expected one of best_vs_worst"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"buffer_pairs": 4}, "pairs_per_step is 32.*buffer_pairs=4; raise buffer_pairs"),
    ],
)
def test_the_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDPOConfig(**options)


def test_defaults_and_preset():
    config = DiffusionDPOConfig()
    assert (config.beta, config.warmup_steps, config.weight_decay) == (5000, 500, 1e-2)
    assert config.learning_rate == pytest.approx(1e-8 * config.pairs_per_step)
    assert DiffusionDPOConfig.preset("MovingShapes").warmup_steps == 0
    with pytest.raises(ValueError, match="only for MovingShapes"):
        DiffusionDPOConfig.preset("Sora")
