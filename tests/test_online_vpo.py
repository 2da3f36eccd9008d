"""OnlineVPO: its loss by hand, the reference refreshed exactly when it should be, learning, resume, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from conduct import goes_on_bit_for_bit, refuses_a_gradient_that_is_not_finite
from gaussian import full_policy, gaussian_env, tied, weight_of
from models import tiny_env

from algos.online_vpo import OnlineVPO, OnlineVPOConfig, logit_normal_timesteps
from algos.pairs import noise_of
from vdm_env.schedule import FlowSchedule


def vpo_on(env, policy, **options):
    options = {"videos_per_update": 32, "learning_rate": 0.02, "beta": 2.0, "refresh_every": None, **options}
    return OnlineVPO(env, policy, OnlineVPOConfig(**options))


def test_the_loss_by_hand():
    """Posterior means of Gaussian data written out, noise levels and noise from the same generator, in float64."""
    env = gaussian_env("flow", dtype=torch.float64)
    policy = full_policy(env)
    with torch.no_grad():
        weight_of(policy).add_(0.3)
    policy.refresh_reference()
    means = {"reference": weight_of(policy).detach().T.clone()}
    with torch.no_grad():
        weight_of(policy).mul_(1.5).sub_(0.2)
    means["policy"] = weight_of(policy).detach().T.clone()
    generator = torch.Generator().manual_seed(3)
    winner, loser = torch.randn(2, 5, 3, 2, 2, 2, generator=generator, dtype=torch.float64)
    pairs = {"winner": winner, "loser": loser, "prompt_id": torch.tensor([0, 1, 1, 0, 1])}
    vpo = vpo_on(env, policy, beta=3.0, loss_scale=0.01, seed=8)
    found, metrics = vpo._loss(pairs)

    generator = torch.Generator().manual_seed(8)
    noise = noise_of(torch.randint(2**62, (5,), generator=generator), (3, 2, 2, 2)).double()
    u = 1 / (1 + torch.exp(-torch.randn(5, generator=generator).double()))
    level = (3 * u / (1 + 2 * u)).view(-1, 1, 1, 1, 1)  # the schedule's shift is 3

    def error(video, model):
        centre = (1 - level) * model[pairs["prompt_id"]][:, :, None, None, None]
        x = (1 - level) * video + level * noise
        variance = ((1 - level) * 0.5) ** 2 + level**2
        velocity = (level - (1 - level) * 0.25) / variance * (x - centre) - centre / (1 - level)
        return (velocity - (noise - video)).square().mean((1, 2, 3, 4))

    change = {name: error(v, means["policy"]) - error(v, means["reference"]) for name, v in pairs.items() if v.ndim > 1}
    inside = -1.5 * (change["winner"] - change["loser"])
    expected = 0.01 * torch.log1p(torch.exp(-inside)).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # timesteps are float32
    assert float(inside.abs().min()) > 0.01 and float(metrics["margin"]) == pytest.approx(
        float(inside.mean()), rel=1e-5
    )


def test_the_reference_is_refreshed_after_every_k_optimiser_steps_and_never_else():
    env = gaussian_env()
    policy = full_policy(env)
    vpo = vpo_on(env, policy, refresh_every=3, optimiser_steps=2)
    step, history, references = vpo._step, [], []

    def recorded(pairs):
        row = step(pairs)
        history.append(weight_of(policy).detach().clone())
        references.append(next(iter(policy.reference_state_dict().values()), None))
        return row

    vpo._step = recorded
    rows = [vpo.update() for _ in range(4)]
    assert [row["reference_refreshes"] for row in rows] == [0, 1, 2, 2]
    assert [row["reference_age"] for row in rows] == [2, 1, 0, 2]
    assert references[0] is references[1] is None  # the untrained model
    for i, source in enumerate([2, 2, 2, 5, 5, 5], start=2):
        assert torch.equal(references[i], history[source]), i
    assert len({float(w.sum()) for w in history}) == 8  # every step moved the policy
    margins = [row["margin"] for row in rows]
    assert all(margins[i] != 0 for i in (0, 1, 3))
    assert vpo_on(gaussian_env(), full_policy(env)).update()["reference_refreshes"] == 0


def test_a_reference_refreshed_after_every_step_is_the_policy_at_every_loss():
    env = tiny_env("flow", num_envs=4, group_size=2)
    policy = env.make_policy(lora_rank=2)
    vpo = vpo_on(env, policy, refresh_every=1, optimiser_steps=2, videos_per_update=4, loss_scale=0.5, beta=500.0)
    rows = [vpo.update() for _ in range(2)]
    for row in rows:
        assert row["margin"] == 0.0 and row["loss"] == pytest.approx(0.5 * math.log(2)) and row["grad_norm"] > 0
    fixed = vpo_on(env, env.make_policy(lora_rank=2), optimiser_steps=2, videos_per_update=4, beta=500.0)
    assert fixed.update()["margin"] != 0.0


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_training_moves_the_adapter_and_leaves_reference_and_network_alone(kind):
    env = tiny_env(kind, num_envs=4, group_size=2, guidance_scale=2.0)
    policy = env.make_policy(lora_rank=2)
    obs, _ = env.reset(seed=3)
    with torch.no_grad(), policy.reference():
        before = policy.mean(obs)
    vpo = vpo_on(env, policy, videos_per_update=4, beta=500.0)
    first = env.mdp.counters.denoiser_forwards
    metrics = vpo.update()
    # 4 videos with guidance, then one step on 2 pairs: each video once by the policy and once by the reference
    assert env.mdp.counters.denoiser_forwards - first == 4 * 2 * env.num_steps + 2 * 4
    assert all(type(v) is float and math.isfinite(v) for v in metrics.values()) and metrics["grad_norm"] > 0
    with torch.no_grad():
        assert not torch.equal(policy.mean(obs), before)
        with policy.reference():
            assert torch.equal(policy.mean(obs), before)


@pytest.mark.parametrize("schedule", ["flow", "epsilon"])
def test_it_moves_to_the_better_side_and_further_than_with_a_fixed_reference(schedule):
    def final(refresh_every):
        env = gaussian_env(schedule, num_envs=64, group_size=8)
        options = {"weight_decay": 0.0, "beta": 500.0, "videos_per_update": 64, "learning_rate": 0.05}
        vpo = vpo_on(env, full_policy(env), refresh_every=refresh_every, **options)
        rows = [vpo.update() for _ in range(30)]
        return rows[0]["reward_mean"], sum(row["reward_mean"] for row in rows[-5:]) / 5

    first, fixed = final(None)
    again, refreshed = final(5)
    assert first == again < 0
    # Rewards are <= 0. beta = 500 holds the policy back near a fixed reference, and less where the reference follows.
    assert fixed > 0.8 * first and refreshed > first / 2 and refreshed > 0.7 * fixed


def test_the_size_of_a_backward_pass_does_not_change_the_run():
    def run(micro_batch):
        env = gaussian_env()
        vpo = vpo_on(env, full_policy(env), micro_batch=micro_batch, optimiser_steps=2, beta=50.0)
        return vpo.update()

    whole = run(8)
    assert whole["margin"] != 0
    for micro_batch in (3, 1):
        assert run(micro_batch) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "timesteps", "logit_normal"),
    [("flow", "auto", True), ("flow", "schedule", False), ("epsilon", "auto", False), ("v", "schedule", False)],
)
def test_timesteps_are_drawn_as_the_family_is_trained(schedule, timesteps, logit_normal):
    env = gaussian_env(schedule)
    vpo = vpo_on(env, full_policy(env), timesteps=timesteps, seed=4)
    seen, add_noise = [], env.mdp.add_noise
    env.mdp.add_noise = lambda clean, noise, t: seen.append((clean, noise, t)) or add_noise(clean, noise, t)
    vpo.update()
    ((clean, noise, t),) = seen
    assert torch.equal(*noise.chunk(2)) and torch.equal(*t.chunk(2)) and not torch.equal(*clean.chunk(2))
    generator = torch.Generator().manual_seed(4)
    seeds = torch.randint(2**62, (8,), generator=generator)
    assert torch.equal(noise[:8], noise_of(seeds, (3, 2, 2, 2))) and len(seeds.unique()) == 8
    if logit_normal:
        u = torch.randn(8, generator=generator).sigmoid()
        torch.testing.assert_close(t[:8], 1000 * 3 * u / (1 + 2 * u))
    else:
        assert torch.equal(t[:8], env.mdp.schedule.sample_timesteps(8, generator))


def test_logit_normal_timesteps_have_the_law_they_are_named_after():
    generator = torch.Generator().manual_seed(0)
    t = logit_normal_timesteps(FlowSchedule(shift=1.0, num_train_timesteps=50), 20_000, generator)
    z = torch.logit(t.double() / 50)
    assert float(z.mean()) == pytest.approx(0, abs=0.03) and float(z.std()) == pytest.approx(1, abs=0.03)
    shifted = logit_normal_timesteps(FlowSchedule(shift=3.0), 20_000, generator)
    assert float(shifted.median()) == pytest.approx(750, abs=8)  # u = 1/2
    assert float(shifted.min()) > 0 and float(shifted.max()) < 1000


@pytest.mark.parametrize(("rank", "updates"), [(2, 3), (0, 3), (2, 0)])
def test_a_run_continues_bit_for_bit_from_a_checkpoint_with_its_refreshed_reference(rank, updates, tmp_path):
    options = {"refresh_every": 2, "warmup_steps": 6, "optimiser_steps": 1, "pairs": "random"}
    env = gaussian_env()
    policy = env.make_policy(lora_rank=rank)
    vpo = vpo_on(env, policy, **options)
    for _ in range(updates):
        vpo.update()
    assert bool(policy.reference_state_dict()) == bool(updates)

    def another():
        env = gaussian_env()
        policy = env.make_policy(lora_rank=rank, seed=5)
        policy.refresh_reference()  # what an earlier use left behind is not carried on
        return vpo_on(env, policy, seed=99, **options), policy

    goes_on_bit_for_bit(vpo, policy, another, tmp_path, 3)


def test_tied_rewards_change_nothing():
    env = gaussian_env(reward=tied)
    policy = full_policy(env)
    before = weight_of(policy).detach().clone()
    metrics = vpo_on(env, policy, refresh_every=1).update()
    assert metrics["optimiser_steps"] == metrics["pairs"] == metrics["reference_refreshes"] == 0.0
    assert torch.equal(weight_of(policy), before) and policy.reference_state_dict() == {}


def test_the_learning_rate_warms_up_and_a_gradient_that_is_not_finite_changes_nothing():
    env = gaussian_env()
    policy = full_policy(env)
    vpo = vpo_on(env, policy, warmup_steps=4, learning_rate=0.4, optimiser_steps=2)
    assert [vpo.update()["learning_rate"] for _ in range(3)] == pytest.approx([0.2, 0.4, 0.4])
    refuses_a_gradient_that_is_not_finite(vpo, policy)
    assert vpo.steps_taken == 6


def test_refusals_name_the_way_out():
    env = gaussian_env(group_size=1)
    with pytest.raises(ValueError, match="group_size=1.*group_size=6.*DDPO"):
        vpo_on(env, full_policy(env))
    env = gaussian_env("epsilon")
    with pytest.raises(ValueError, match="logit_normal.*VPSchedule with epsilon.*'auto' or 'schedule'"):
        vpo_on(env, full_policy(env), timesteps="logit_normal")
    with pytest.raises(ValueError, match="videos_per_update is 24.*num_envs=16"):
        vpo_on(env, full_policy(env), videos_per_update=24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta is 0"),
        ({"loss_scale": 0}, "loss_scale is 0"),
        ({"refresh_every": 0}, "refresh_every is 0.*None"),
        ({"timesteps": "uniform"}, "timesteps is 'uniform', expected one of auto, schedule, logit_normal"),
        ({"optimiser_steps": 0}, "optimiser_steps is 0"),
    ],
)
def test_the_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        OnlineVPOConfig(**options)


def test_published_settings_and_preset():
    videocrafter = OnlineVPOConfig()
    assert (videocrafter.learning_rate, videocrafter.refresh_every, videocrafter.loss_scale) == (1e-4, 200, 1.0)
    sora = OnlineVPOConfig.open_sora(beta=70.0)
    assert (sora.learning_rate, sora.warmup_steps, sora.loss_scale, sora.timesteps, sora.beta) == (
        2e-6,
        500,
        0.01,
        "logit_normal",
        70.0,
    )
    assert OnlineVPOConfig.preset("MovingShapes").warmup_steps == 0
    with pytest.raises(ValueError, match="only for MovingShapes"):
        OnlineVPOConfig.preset("Sora")
