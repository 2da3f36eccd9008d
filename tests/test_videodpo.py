"""VideoDPO: it builds its data once, weighs rare pairs up, finds the weighted optimum, and resumes at any moment."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conduct import goes_on_bit_for_bit
from gaussian import START, full_policy, gaussian_env
from offline import left_to_gain

import vdm_env
from algos.checkpoint import load_checkpoint, save_checkpoint
from algos.offline_dpo import OfflineDPO, OfflineDPOConfig
from algos.preference_data import PairTable, PreferenceData
from algos.preference_files import DamagedDataError
from algos.videodpo import VideoDPO, VideoDPOConfig, pair_probabilities


def dpo_on(env, policy, folder, **options):
    options = {
        "prompts": 12,
        "videos_per_update": 20,
        "learning_rate": 0.02,
        "weight_decay": 0.0,
        "beta": 2.0,
        "pairs_per_step": 8,
        "micro_batch": 256,
        **options,
    }
    return VideoDPO(env, policy, VideoDPOConfig(folder=str(folder), **options))


def built(env, policy, folder, **options):
    dpo = dpo_on(env, policy, folder, **options)
    while not dpo.learner.ready:
        dpo.update()
    return dpo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve groups of four, by the default settings."""
    folder = tmp_path_factory.mktemp("videodpo")
    env = gaussian_env()
    built(env, full_policy(env), folder)
    return folder


# ------------------------------------------------------------------ weights


def test_probabilities_and_weights_by_hand():
    reward = torch.tensor([[0.0, 10.0, 1.0], [0.5, 4.0, 9.9]], dtype=torch.float64)
    table = PairTable(
        group=torch.tensor([0, 1, 1]),
        winner=torch.tensor([1, 2, 1]),
        loser=torch.tensor([0, 0, 0]),
        winner_reward=torch.tensor([10.0, 9.9, 4.0], dtype=torch.float64),
        loser_reward=torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64),
    )
    # differences 10, 9.4, 3.5 in two bins of 3.5 .. 6.75 .. 10
    assert pair_probabilities(table, reward, "difference", 2).tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    # a value on an edge belongs to the bin above: differences 0, 5, 10
    edge = replace(table, winner_reward=torch.tensor([10.0, 5.0, 7.0]), loser_reward=torch.tensor([0.0, 0.0, 7.0]))
    assert pair_probabilities(edge, reward, "difference", 2).tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    # rewards in two bins of 0 .. 5 .. 10: four low ones and two high ones of six
    expected = [2 / 6 * 4 / 6, 2 / 6 * 4 / 6, 4 / 6 * 4 / 6]
    assert pair_probabilities(table, reward, "product", 2).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["difference", "product"])
def test_every_pair_has_the_weight_of_its_probability(kind, folder):
    env = gaussian_env()
    dpo = dpo_on(env, full_policy(env), folder, probability=kind, pairs="all_pairs", bins=5, weight_exponent=0.5)
    data, table = dpo.learner.data, dpo.learner.table
    assert len(table) == 72
    rewards = data.reward.flatten()
    gaps = (data.reward[:, :, None] - data.reward[:, None]).flatten()
    gaps = gaps[gaps > 0]

    def share(value, values):
        edges = torch.linspace(float(values.min()), float(values.max()), 6, dtype=torch.float64)
        place = int((value >= edges[1:-1]).sum())
        return float(torch.histc(values, 5)[place]) / len(values)

    for row in range(0, 72, 7):
        w, loser = float(table.winner_reward[row]), float(table.loser_reward[row])
        p = share(w - loser, gaps) if kind == "difference" else share(w, rewards) * share(loser, rewards)
        assert float(dpo.learner.weight[row]) == pytest.approx((0.72 / p) ** 0.5, rel=1e-5)
    metrics = dpo.update()
    assert metrics["weight_mean"] == pytest.approx(float(dpo.learner.weight.mean()))
    assert metrics["weight_max"] > metrics["weight_mean"] > 0


def test_the_first_loss_is_log_2_times_the_weights(folder):
    env = gaussian_env()
    dpo = dpo_on(env, full_policy(env), folder, pairs_per_step=12, micro_batch=5)
    assert dpo.update()["loss"] == pytest.approx(math.log(2) * float(dpo.learner.weight.mean()))
    assert dpo_on(env, full_policy(env), folder, weight_exponent=0.0).update()["loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize(("schedule", "beta"), [("epsilon", 1600.0), ("flow", 64.0)])
def test_it_finds_the_means_that_fit_the_weighted_preferences_best(schedule, beta, tmp_path):
    env = gaussian_env(schedule)
    policy = full_policy(env)
    options = {"prompts": 40, "videos_per_update": 160, "pairs": "all_pairs", "pairs_per_step": 120}
    options |= {"learning_rate": 0.1, "beta": beta, "max_grad_norm": 1e6}
    dpo = built(env, policy, tmp_path, **options)
    pairs = dpo.learner.data.load(dpo.learner.table, torch.arange(240), dpo.learner.prompt_ids)
    weight = policy.trainable_parameters()[0]
    history = [weight.detach().clone() for _ in range(80) if dpo.update()]
    found = torch.stack(history[-40:]).mean(0)
    assert left_to_gain(env.model, beta, pairs, found, dpo.learner.weight) < 0.04
    away = (START.T - 1).abs() > 0.4  # the reward is minus the squared distance from 1: on the side of the winners
    assert bool(((found - START.T)[away].sign() == (1 - START.T)[away].sign()).all()), found


# ------------------------------------------------------------------ building


def test_the_first_updates_sample_and_the_next_ones_learn(tmp_path):
    env = gaussian_env()
    policy = full_policy(env)
    dpo = dpo_on(env, policy, tmp_path)
    before = policy.trainable_parameters()[0].detach().clone()
    rows = [dpo.update() for _ in range(3)]
    assert [row["groups_built"] for row in rows] == [5, 10, 12]
    assert [row["optimiser_steps"] for row in rows] == [0, 0, 0]
    assert [row["pairs"] for row in rows] == [0, 0, 12]
    assert torch.equal(policy.trainable_parameters()[0], before)
    data = PreferenceData(tmp_path)
    assert rows[1]["reward_mean"] == pytest.approx(float(data.reward[5:10].mean()))
    assert rows[1]["reward_group_std_mean"] == pytest.approx(float(data.reward[5:10].std(1, correction=0).mean()))
    assert rows[2]["data_reward_queries"] == rows[2]["data_device_s"] == 0  # of its own making: its own cost
    sampled = env.mdp.counters.reward_queries
    learned = dpo.update()
    assert learned["optimiser_steps"] == 1 and learned["grad_norm"] > 0 and "reward_mean" not in learned
    assert set(learned) < set(rows[0]) and env.mdp.counters.reward_queries == sampled
    assert not torch.equal(policy.trainable_parameters()[0], before)
    assert all(type(value) is float and math.isfinite(value) for row in (*rows, learned) for value in row.values())


def test_data_that_are_there_are_not_sampled_again(folder):
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    env = gaussian_env()
    policy = full_policy(env)
    dpo = dpo_on(env, policy, folder, pairs="best_vs_random", weight_exponent=0.0)  # made anew from the same videos
    row = dpo.update()
    assert row["optimiser_steps"] == 1
    # what is found has been paid for: batches of sixteen for five, five and two groups of four
    assert row["data_reward_queries"] == row["data_videos_sampled"] == 80 and row["data_device_s"] > 0
    assert row["data_denoiser_forwards"] == 80 * env.num_steps
    assert dpo.state_dict()["data_cost"]["reward_queries"] == 80
    fewer = dpo_on(env, policy, folder, prompts=7)
    assert len(fewer.learner.table) == 7 and fewer.update()["groups_built"] == 7
    assert env.mdp.counters.videos_sampled == env.mdp.counters.reward_queries == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    # and another algorithm may learn from them
    offline = OfflineDPO(env, policy, OfflineDPOConfig(folder=str(folder), pairs_per_step=4))
    assert offline.update()["pairs"] == 12


def test_data_made_differently_are_refused_with_the_keys(folder, tmp_path):
    env = gaussian_env()
    with pytest.raises(ValueError, match="differently in candidates, seed .candidates: 4 there, 2 asked"):
        dpo_on(env, full_policy(env), folder, candidates=2, seed=1)
    other = gaussian_env(reward=lambda video, prompts: video.mean((1, 2, 3, 4)), num_steps=3)
    with pytest.raises(ValueError, match="differently in num_steps, reward .*take another folder"):
        dpo_on(other, full_policy(other), folder)
    first = dpo_on(env, full_policy(env), folder)
    with pytest.raises(ValueError, match="in seed .*data_seed sets it apart"):
        dpo_on(env, full_policy(env), folder, seed=1)
    shared = dpo_on(env, full_policy(env), folder, seed=1, data_seed=0)
    assert shared.learner.ready and first.update()["loss"] != shared.update()["loss"]  # other pairs come first
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: -1 if path.suffix == ".safetensors" else None])
    with pytest.raises(DamagedDataError, match="bytes, expected"):
        dpo_on(env, full_policy(env), broken)


def test_building_is_continued_by_another_run(tmp_path):
    env = gaussian_env()
    dpo_on(env, full_policy(env), tmp_path / "data").update()
    env = gaussian_env()
    dpo = dpo_on(env, full_policy(env), tmp_path / "data")
    assert dpo.update()["groups_built"] == 10 and env.mdp.counters.videos_sampled == 32  # 20 videos in batches of 16
    dpo.update()
    whole = built(gaussian_env(), full_policy(env), tmp_path / "whole", videos_per_update=48)
    assert torch.equal(whole.learner.data.reward, dpo.learner.data.reward)


def test_a_tie_everywhere_is_refused(tmp_path):
    env = gaussian_env(reward=lambda video, prompts: torch.ones(len(video)))
    dpo = dpo_on(env, full_policy(env), tmp_path, prompts=5)
    with pytest.raises(ValueError, match="makes no pairs: in each of its 5 groups"):
        dpo.update()


def test_omniscore_with_its_sub_scores_in_the_embedded_world(tmp_path):
    env = vdm_env.make("MovingShapes-OmniScore", num_envs=4, num_steps=2, guidance_scale=1.0)
    policy = env.make_policy(lora_rank=2)
    dpo = dpo_on(env, policy, tmp_path, prompts=2, videos_per_update=8, pairs_per_step=2, micro_batch=1)
    dpo.update()
    metrics = dpo.update()
    assert metrics["loss"] > 0 and metrics["grad_norm"] > 0
    data = PreferenceData(tmp_path)
    terms = env.mdp.reward.config
    assert set(data.scores) == set(terms) and data.settings["reward"] == "OmniScore"
    total = sum(t.weight * (data.scores[name] - t.low) / (t.high - t.low) for name, t in terms.items())
    assert torch.allclose(data.reward, total / sum(t.weight for t in terms.values()), atol=1e-4)
    assert data.settings["reward_settings"]["HPS"] == {"weight": 1.0, "low": 0.21, "high": 0.63}


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("updates", [1, 3, 4])
def test_a_run_killed_after_its_checkpoint_is_redone_with_its_costs(updates, tmp_path):
    """The folder is then ahead of the checkpoint."""
    env = gaussian_env()
    policy = env.make_policy(lora_rank=2)
    dpo = dpo_on(env, policy, tmp_path / "data")
    for _ in range(updates):
        dpo.update()
    save_checkpoint(tmp_path / "checkpoint", {"algorithm": dpo.state_dict()}, policy)
    spent = replace(env.mdp.counters)
    expected = [dpo.update() for _ in range(4)]

    def counts(counters):
        names = ("videos_sampled", "reward_queries", "denoiser_forwards", "denoiser_backwards")
        return {name: getattr(counters, name) for name in names}

    shards = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    other = gaussian_env()
    other_policy = other.make_policy(lora_rank=2, seed=5)
    restored = dpo_on(other, other_policy, tmp_path / "data")
    assert restored.learner.ready and restored.learner.data_cost["reward_queries"] == 80  # five batches of sixteen
    other_policy.load(tmp_path / "checkpoint" / "policy")
    restored.load_state_dict(load_checkpoint(tmp_path / "checkpoint")["algorithm"])
    for name in ("videos_sampled", "reward_queries", "denoiser_forwards", "denoiser_backwards"):
        setattr(other.mdp.counters, name, getattr(spent, name))
    assert [restored.update() for _ in range(4)] == expected
    assert counts(other.mdp.counters) == counts(env.mdp.counters)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == shards


def test_a_folder_that_lost_groups_is_not_gone_on_with(tmp_path):
    env = gaussian_env()
    dpo = dpo_on(env, full_policy(env), tmp_path / "data")
    dpo.update()
    restored = dpo_on(env, full_policy(env), tmp_path / "other")
    with pytest.raises(ValueError, match="when 5 groups were built, but .* holds 0; put the folder back"):
        restored.load_state_dict(dpo.state_dict())


@pytest.mark.parametrize("updates", [0, 2, 3, 5])
def test_a_run_continues_bit_for_bit_from_a_checkpoint(updates, tmp_path):
    """Interrupted while sampling, between sampling and learning, and while learning."""
    env = gaussian_env()
    policy = env.make_policy(lora_rank=2)
    dpo = dpo_on(env, policy, tmp_path / "data", warmup_steps=5)
    for _ in range(updates):
        dpo.update()
    if updates >= 5:
        policy.refresh_reference()
    (tmp_path / "later").mkdir()
    for path in (tmp_path / "data").glob("*"):
        (tmp_path / "later" / path.name).write_bytes(path.read_bytes())

    def another():
        env = gaussian_env()
        policy = env.make_policy(lora_rank=2, seed=5)
        restored = dpo_on(env, policy, tmp_path / "later", warmup_steps=5)
        restored.learner.generator.manual_seed(99)
        return restored, policy

    _, state = goes_on_bit_for_bit(dpo, policy, another, tmp_path, 5)
    policy.reset_reference()
    if updates >= 3:
        with pytest.raises(ValueError, match="saved while learning from other pairs"):
            dpo_on(env, policy, tmp_path / "data", weight_exponent=0.0).load_state_dict(state)


def test_the_same_seed_gives_the_same_run_and_another_one_another(tmp_path):
    def run(seed, name):
        env = gaussian_env()
        dpo = dpo_on(env, full_policy(env), tmp_path / name, seed=seed, pairs="random")
        return [dpo.update() for _ in range(5)]

    assert run(0, "a") == run(0, "b") != run(1, "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 1}, "candidates is 1.*2 or more"),
        ({"candidates": 5}, "whole groups of them.*videos_per_update=65"),
        ({"probability": "p"}, "probability is 'p', expected one of difference, product"),
        ({"weight_exponent": -1.0}, "weight_exponent is -1"),
        ({"weight_base": 0.0}, "weight_base is 0"),
        ({"prompts": 0}, "prompts is 0"),
        ({"bins": 0}, "bins is 0"),
        ({"beta": math.nan}, "beta is nan"),
    ],
)
def test_the_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        VideoDPOConfig(**options)


def test_defaults_are_the_papers():
    config = VideoDPOConfig()
    assert (config.candidates, config.pairs, config.learning_rate) == (4, "best_vs_worst", 6e-6)
    assert (config.weight_base, config.weight_exponent, config.beta) == (0.72, 1.0, 5000.0)
    assert VideoDPOConfig.preset("MovingShapes").candidates == 4
    with pytest.raises(ValueError, match="only for MovingShapes"):
        VideoDPOConfig.preset("Sora")
