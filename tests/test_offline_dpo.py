"""Offline Diffusion-DPO: it finds the best fit to the stored preferences, samples nothing, repeats and resumes."""

from __future__ import annotations

import math

import pytest
import torch
from conduct import goes_on_bit_for_bit
from gaussian import START, Recorder, full_policy, gaussian_env
from models import tiny_env
from offline import left_to_gain

from algos.offline_dpo import OfflineDPO, OfflineDPOConfig
from algos.pairs import epoch_rows
from algos.preference_data import PreferenceData
from algos.preference_files import DamagedDataError, PreferenceWriter
from algos.preference_sampling import build_preferences


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Preference data of the Gaussian world, by schedule."""
    made = {}
    for schedule in ("epsilon", "flow"):
        env = gaussian_env(schedule)
        made[schedule] = tmp_path_factory.mktemp(schedule)
        build_preferences(made[schedule], env, full_policy(env), groups=40, candidates=4, groups_per_shard=16)
    return made


def dpo_on(env, policy, folder, **options):
    options = {
        "learning_rate": 0.02,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "beta": 2.0,
        "pairs_per_step": 16,
        "micro_batch": 64,
        **options,
    }
    return OfflineDPO(env, policy, OfflineDPOConfig(folder=str(folder), **options))


@pytest.mark.parametrize(("schedule", "beta"), [("epsilon", 1600.0), ("flow", 64.0)])
def test_it_finds_the_means_that_fit_the_preferences_best(schedule, beta, folders):
    env = gaussian_env(schedule)
    policy = full_policy(env)
    options = {"pairs": "all_pairs", "learning_rate": 0.1, "max_grad_norm": 1e6, "pairs_per_step": 120}
    dpo = dpo_on(env, policy, folders[schedule], beta=beta, **options)
    pairs = dpo.data.load(dpo.learner.table, torch.arange(len(dpo.learner.table)), dpo.learner.prompt_ids)
    weight = policy.trainable_parameters()[0]
    history = [weight.detach().clone() for _ in range(80) if dpo.update()]
    found = torch.stack(history[-40:]).mean(0)
    assert left_to_gain(env.model, beta, pairs, found) < 0.04
    away = (START.T - 1).abs() > 0.4  # the reward is minus the squared distance from 1: on the side of the winners
    assert bool(((found - START.T)[away].sign() == (1 - START.T)[away].sign()).all()), found


def test_nothing_is_sampled_and_no_reward_is_asked(folders):
    env = gaussian_env()
    dpo = dpo_on(env, full_policy(env), folders["epsilon"])
    metrics = dpo.update()
    counters = env.mdp.counters
    assert counters.videos_sampled == counters.reward_queries == 0
    assert counters.denoiser_forwards == 2 * 2 * 16 and counters.denoiser_backwards == 2 * 16
    assert metrics["loss"] == pytest.approx(math.log(2)) and metrics["margin"] == 0.0
    made = dpo.data.cost()  # by 16 + 16 + 8 groups of four
    assert made["reward_queries"] == made["videos_sampled"] == 160 and made["device_s"] > 0
    assert {name: metrics[f"data_{name}"] for name in made} == made == dpo.state_dict()["data_cost"]
    fewer = dpo_on(env, full_policy(env), folders["epsilon"], groups=20)
    assert fewer.update()["data_reward_queries"] == 80
    assert metrics["pairs"] == 40.0 and metrics["epoch"] == pytest.approx(16 / 40)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


def test_winner_and_loser_share_noise_and_timestep(folders):
    env = gaussian_env("flow")
    dpo = dpo_on(env, full_policy(env), folders["flow"], micro_batch=7)
    seen, add_noise = [], env.mdp.add_noise
    env.mdp.add_noise = lambda clean, noise, t: seen.append((clean, noise, t)) or add_noise(clean, noise, t)
    dpo.update()
    assert [len(clean) for clean, _, _ in seen] == [14, 14, 4]  # 16 pairs in parts of 7
    for clean, noise, t in seen:
        assert torch.equal(*noise.chunk(2)) and torch.equal(*t.chunk(2))
        reward = env.mdp.reward(env.mdp.decode(clean), [""] * len(clean))
        assert bool((reward[: len(clean) // 2] > reward[len(clean) // 2 :]).all())
    assert len({float(value) for _, _, t in seen for value in t}) == 16


def test_every_pass_takes_each_pair_once():
    rows = [epoch_rows(5, start, 3, seed=1) for start in range(0, 30, 3)]
    passes = torch.cat(rows).reshape(6, 5)
    assert bool((passes.sort(1).values == torch.arange(5)).all())
    assert len({tuple(row) for row in passes.tolist()}) > 1
    assert torch.equal(epoch_rows(5, 0, 30, seed=1), torch.cat(rows))
    assert not torch.equal(epoch_rows(5, 0, 30, seed=2), torch.cat(rows))
    with pytest.raises(ValueError, match="count=0"):
        epoch_rows(0, 0, 1, seed=0)


def test_the_gradient_of_a_step_is_the_mean_over_its_pairs(folders):
    """By hand: at the reference every margin is 0, and the loss of a pair has slope -1/2 in h."""
    env = gaussian_env("epsilon", dtype=torch.float64)
    dpo = dpo_on(env, full_policy(env), folders["epsilon"], micro_batch=5, beta=3.0)
    seen, add_noise = [], env.mdp.add_noise
    env.mdp.add_noise = lambda clean, noise, t: seen.append((clean, t)) or add_noise(clean, noise, t)
    recorder = Recorder(dpo.learner)
    recorder.param_groups = []
    dpo.update()
    (gradient,) = recorder.gradients[0]
    expected = torch.zeros(3, 2, dtype=torch.float64)
    rows = epoch_rows(40, 0, 16, seed=0)
    prompts = dpo.learner.prompt_ids[dpo.learner.table.group[rows]]
    differences = torch.cat([clean.chunk(2)[0] - clean.chunk(2)[1] for clean, _ in seen]).mean((2, 3, 4))
    times = torch.cat([t.chunk(2)[0] for _, t in seen])
    p, q = env.model.denoiser.coefficients(times)
    signal = env.model.schedule.alphas_cumprod.double()[times.long()].sqrt()
    for row in range(16):
        slope = -3.0 * p[row] * q[row] * signal[row] * differences[row] / 3  # dh / d mean
        expected[:, prompts[row]] += -0.5 * slope / 16
    assert expected.abs().max() > 1e-3
    assert torch.allclose(gradient, expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_only_the_adapter_moves(kind, tmp_path):
    env = tiny_env(kind, num_envs=3, num_steps=2)
    policy = env.make_policy(lora_rank=2)
    data = build_preferences(tmp_path, env, policy, groups=2, candidates=3)
    assert list(data.scores) == ["brightness"]
    original = {n: p.detach().clone() for n, p in env.model.denoiser.named_parameters() if "policy_" not in n}
    adapter = [p.detach().clone() for p in policy.trainable_parameters()]
    metrics = dpo_on(env, policy, tmp_path, beta=500.0, pairs_per_step=2, micro_batch=1).update()
    assert metrics["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(adapter, policy.trainable_parameters(), strict=True))
    for name, parameter in env.model.denoiser.named_parameters():
        assert "policy_" in name or (torch.equal(parameter, original[name]) and parameter.grad is None), name


def test_the_same_seed_gives_the_same_run_and_another_one_another(folders):
    def run(seed):
        env = gaussian_env()
        dpo = dpo_on(env, full_policy(env), folders["epsilon"], seed=seed, pairs="random")
        return [dpo.update() for _ in range(3)]

    assert run(0) == run(0) != run(1)


@pytest.mark.parametrize(("updates", "refreshed"), [(0, False), (3, False), (3, True)])
def test_a_run_continues_bit_for_bit_from_a_checkpoint(updates, refreshed, folders, tmp_path):
    env = gaussian_env()
    policy = env.make_policy(lora_rank=2)
    options = {"warmup_steps": 9, "optimiser_steps": 2, "pairs_per_step": 13}  # 13 does not divide the 40 pairs
    dpo = dpo_on(env, policy, folders["epsilon"], **options)
    for _ in range(updates):
        dpo.update()
    if refreshed:
        policy.refresh_reference()

    def another():
        env = gaussian_env()
        policy = env.make_policy(lora_rank=2, seed=5)
        return dpo_on(env, policy, folders["epsilon"], seed=99, **options), policy

    _, state = goes_on_bit_for_bit(dpo, policy, another, tmp_path, 3)
    for other in ({"groups": 39}, {"pairs": "all_pairs"}):
        with pytest.raises(ValueError, match="saved while learning from other pairs"):
            dpo_on(env, policy, folders["epsilon"], **options, **other).load_state_dict(state)


def test_the_learning_rate_warms_up(folders):
    env = gaussian_env()
    dpo = dpo_on(env, full_policy(env), folders["epsilon"], warmup_steps=4, learning_rate=0.4, optimiser_steps=2)
    assert [dpo.update()["learning_rate"] for _ in range(3)] == pytest.approx([0.2, 0.4, 0.4])


def test_another_score_turns_the_preference_round(tmp_path):
    env = gaussian_env()
    writer = PreferenceWriter(
        tmp_path, {"model": "Gaussian", "latent_shape": [3, 2, 2, 2], "candidates": 2, "reward": "Given"}
    )
    latents = torch.tensor([0.0, 3.0]).view(1, 2, 1, 1, 1, 1).expand(1, 2, 3, 2, 2, 2)
    writer.append(["prompt 0"], latents, torch.tensor([[0.0, 1.0]]), {"Dark": torch.tensor([[1.0, 0.0]])})
    moved = {}
    for score in (None, "Dark"):
        policy = full_policy(env)
        dpo = dpo_on(env, policy, tmp_path, rank_by=score, learning_rate=0.01)
        for _ in range(5):
            dpo.update()
        moved[score] = policy.trainable_parameters()[0].detach() - START.T
    assert bool((moved[None][:, 0] > 0.01).all()) and bool((moved["Dark"][:, 0] < -0.01).all())
    assert not moved[None][:, 1].any()  # no pair of the other prompt


def test_refusals(folders, tmp_path):
    env = gaussian_env()
    policy = full_policy(env)
    with pytest.raises(FileNotFoundError, match="build_preferences"):
        dpo_on(env, policy, tmp_path)
    with pytest.raises(ValueError, match="no score 'HPS'"):
        dpo_on(env, policy, folders["epsilon"], rank_by="HPS")
    settings = {"model": "Gaussian", "latent_shape": [3, 2, 2, 2], "candidates": 2, "reward": "Given"}
    PreferenceWriter(tmp_path, settings).append(["prompt 0"], torch.zeros(1, 2, 3, 2, 2, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="makes no pairs: in each of its 1 groups"):
        dpo_on(env, policy, tmp_path)
    other = gaussian_env(means=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="does not know 1 of the prompts.*'prompt 1'"):
        dpo_on(other, full_policy(other), folders["epsilon"])
    shard = next(tmp_path.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DamagedDataError, match="bytes, expected"):
        PreferenceData(tmp_path)


def test_the_place_in_the_passes_is_saved_and_not_worked_out_from_the_settings(folders):
    env = gaussian_env()
    dpo = dpo_on(env, full_policy(env), folders["epsilon"], pairs_per_step=10)
    dpo.update()
    other = dpo_on(env, full_policy(env), folders["epsilon"], pairs_per_step=15)
    other.load_state_dict(dpo.state_dict())
    assert [other.update()["epoch"] for _ in range(2)] == [25 / 40, 40 / 40]


def test_data_that_do_not_say_their_cost_leave_it_out(tmp_path):
    env = gaussian_env()
    settings = {"model": "Gaussian", "latent_shape": [3, 2, 2, 2], "candidates": 2, "reward": "Given"}
    reward = torch.tensor([[0.0, 1.0]])
    PreferenceWriter(tmp_path, settings).append(["prompt 0"], torch.arange(48.0).view(1, 2, 3, 2, 2, 2), reward)
    dpo = dpo_on(env, full_policy(env), tmp_path)
    assert not [name for name in dpo.update() if name.startswith("data_")] and dpo.state_dict()["data_cost"] is None
    dpo.load_state_dict(dpo.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta is 0"),
        ({"groups": 0}, "groups is 0"),
        ({"pairs": "best"}, "pairs is 'best', expected one of best_vs_worst"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"micro_batch": 0}, "micro_batch is 0"),
    ],
)
def test_the_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        OfflineDPOConfig(**options)


def test_defaults_and_preset():
    config = OfflineDPOConfig()
    assert (config.beta, config.pairs_per_step, config.warmup_steps) == (5000, 2048, 500)
    assert config.learning_rate == pytest.approx(1e-8 * 2048)
    assert OfflineDPOConfig.preset("MovingShapes").warmup_steps == 0
    with pytest.raises(ValueError, match="only for MovingShapes"):
        OfflineDPOConfig.preset("Sora")
