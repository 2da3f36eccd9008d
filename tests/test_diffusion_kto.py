"""Diffusion-KTO: utilities, reference point and labels by hand, learning from labels alone, resume, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from conduct import goes_on_bit_for_bit
from gaussian import START, Recorder, full_policy, gaussian_env, weight_of
from models import tiny_env

from algos.diffusion_kto import DiffusionKTO, DiffusionKTOConfig, desirability
from algos.losses import error_change, kto_loss, kto_offset
from vdm_env.worlds.gaussian import TargetReward

UTILITIES = {
    "kto": lambda z: 1 / (1 + math.exp(-z)),
    "loss_averse": lambda z: -math.log(1 + math.exp(-z)),
    "risk_seeking": lambda z: math.log(1 + math.exp(z)),
}
CHANGE = torch.tensor([-0.002, 0.001, 0.0005, -0.0015], dtype=torch.float64)
DESIRABLE = torch.tensor([True, True, False, False])


def kto_on(env, policy, **options):
    options = {"videos_per_update": 32, "learning_rate": 0.02, "warmup_steps": 0, "beta": 2.0, **options}
    return DiffusionKTO(env, policy, DiffusionKTOConfig(**options))


def tied(video, prompts):
    return torch.full((len(video),), 0.1)


# ------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("utility", UTILITIES)
def test_the_loss_by_hand(utility):
    change = CHANGE.clone().requires_grad_()
    options = {"beta": 1000.0, "utility": utility, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    loss, metrics = kto_loss(change, DESIRABLE, 0.0004, **options)
    z = [1.6, -1.4, 0.9, -1.1]  # +-1000 (-d - 0.0004)
    value = UTILITIES[utility]
    weights = [1.5, 1.5, 0.5, 0.5]
    assert loss.item() == pytest.approx(sum(w * (1 - value(v)) for w, v in zip(weights, z, strict=True)) / 4, rel=1e-12)
    assert float(metrics["implicit_accuracy"]) == 0.5
    assert float(metrics["desirable_change"]) == pytest.approx(-0.0005)
    assert float(metrics["undesirable_change"]) == pytest.approx(-0.0005)
    loss.backward()
    step = 1e-6
    slopes = [(value(v + step) - value(v - step)) / (2 * step) for v in z]
    signs = [1, 1, -1, -1]  # desirable videos are to be fitted better, the others worse
    expected = [s * w * slope * 1000 / 4 for s, w, slope in zip(signs, weights, slopes, strict=True)]
    torch.testing.assert_close(change.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)


def test_utilities_feel_losses_and_gains_as_named():
    def slopes(utility):
        change = torch.tensor([-0.003, 0.003], dtype=torch.float64, requires_grad=True)  # a gain and a loss
        kto_loss(change, torch.tensor([True, True]), utility=utility)[0].backward()
        return change.grad.tolist()

    gain, loss = slopes("kto")
    assert gain == pytest.approx(loss)
    gain, loss = slopes("loss_averse")
    assert loss > 10 * gain
    gain, loss = slopes("risk_seeking")
    assert gain > 10 * loss


def test_the_reference_point_by_hand():
    change, uneven = CHANGE - 0.001, torch.tensor([True, True, True, False])
    assert float(kto_offset(change, uneven, "batch")) == pytest.approx(0.0015)
    assert float(kto_offset(change, uneven, "labels")) == pytest.approx(0.5 * ((0.003 + 0 + 0.0005) / 3 + 0.0025))
    assert float(kto_offset(change, uneven, "none")) == 0.0
    assert float(kto_offset(-change, uneven, "batch")) == float(kto_offset(-change, uneven, "labels")) == 0.0
    one_label = torch.ones(4, dtype=torch.bool)
    assert float(kto_offset(change, one_label, "labels")) == float(kto_offset(change, one_label, "batch"))
    graph = change.clone().requires_grad_()
    assert not kto_offset(graph, uneven).requires_grad


def test_error_change_by_hand_is_one_number_a_video():
    generator = torch.Generator().manual_seed(0)
    prediction, reference, target = torch.randn(3, 2, 4, 3, 5, 6, generator=generator, dtype=torch.float64)
    found = error_change(prediction, reference, target)
    for i in range(2):
        own, other = ((x[i] - target[i]).square().sum() / (4 * 3 * 5 * 6) for x in (prediction, reference))
        assert float(found[i]) == pytest.approx(float(own - other), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((CHANGE, DESIRABLE.long()), {}, TypeError, "desirable is torch.int64"),
        ((CHANGE, DESIRABLE[:2]), {}, ValueError, "one label for each video"),
        ((CHANGE, DESIRABLE), {"beta": 0.0}, ValueError, "beta is 0.0"),
        ((CHANGE, DESIRABLE), {"utility": "sigmoid"}, ValueError, "expected .* one of kto, loss_averse"),
        ((CHANGE, DESIRABLE), {"desirable_weight": 0, "undesirable_weight": 0}, ValueError, "one of them > 0"),
    ],
)
def test_the_loss_refuses_what_does_not_fit(arguments, options, error, message):
    with pytest.raises(error, match=message):
        kto_loss(*arguments, **options)
    with pytest.raises(ValueError, match="kind is 'mean'"):
        kto_offset(CHANGE, DESIRABLE, "mean")


def test_labels_are_relative_to_what_they_are_compared_with():
    reward = torch.tensor([0.1, 0.3, 0.8, 0.6, 0.1, 0.1])
    desirable, labelled = desirability(reward, "group", group_size=2)
    assert desirable.tolist() == [False, True, True, False, False, False]
    assert labelled.tolist() == [True] * 4 + [False] * 2
    desirable, labelled = desirability(reward, "update", group_size=2)  # mean 1/3
    assert desirable.tolist() == [False, False, True, True, False, False] and bool(labelled.all())
    desirable, labelled = desirability(reward, "threshold", threshold=0.25)
    assert desirable.tolist() == [False, True, True, True, False, False] and bool(labelled.all())
    desirable, labelled = desirability(torch.full((7,), 0.1), "update")  # whose mean is not 0.1 to the last bit
    assert not bool(desirable.any()) and not bool(labelled.any())
    with pytest.raises(ValueError, match="needs a threshold"):
        desirability(reward, "threshold")
    for labels in ("group", "update", "threshold"):
        with pytest.raises(ValueError, match="1 of 6 numbers of reward are NaN"):
            desirability(reward.masked_fill(reward > 0.7, math.nan), labels, group_size=2, threshold=0.0)
    with pytest.raises(ValueError, match="group_size is 4 for 6 rewards, expected a divisor"):
        desirability(reward, "group", group_size=4)
    with pytest.raises(ValueError, match="labels is 'mean', expected one of group, update, threshold"):
        desirability(reward, "mean")


def test_no_step_is_left_with_a_few_videos():
    env = gaussian_env()
    algorithm = kto_on(env, full_policy(env), videos_per_step=31)
    sizes, step = [], algorithm._step
    algorithm._step = lambda clean, *rest: sizes.append(len(clean)) or step(clean, *rest)
    assert algorithm.update()["videos_labelled"] == 32 and sizes == [16, 16]


# ------------------------------------------------------------------------------------------------------ the algorithm


@pytest.mark.parametrize("utility", UTILITIES)
def test_the_first_step_starts_at_the_utility_of_nothing(utility):
    env = gaussian_env("flow")
    weights = {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    options = {"videos_per_step": 32, "micro_batch": 32, "beta": 1000.0}
    metrics = kto_on(env, full_policy(env), utility=utility, **weights, **options).update()
    mean_weight = 2.0 * metrics["desirable_fraction"] + 0.5 * (1 - metrics["desirable_fraction"])
    assert metrics["loss"] == pytest.approx(mean_weight * (1 - UTILITIES[utility](0.0)), rel=1e-6)
    assert metrics["offset"] == metrics["desirable_change"] == metrics["undesirable_change"] == 0.0
    assert metrics["grad_norm"] > 0 and metrics["videos_labelled"] == 32 and metrics["optimiser_steps"] == 1


@pytest.mark.parametrize("offset", ["batch", "labels"])
def test_the_parts_of_a_step_make_the_gradient_of_the_whole_with_one_reference_point(offset):
    found = []
    for micro_batch in (16, 6):
        env = gaussian_env()
        policy = full_policy(env)
        with torch.no_grad():
            weight_of(policy).mul_(0.5).add_(0.2)
        policy.refresh_reference()  # the step below takes the policy towards these videos, so that q > 0
        with torch.no_grad():
            weight_of(policy).add_(0.05)
        algorithm = kto_on(env, policy, videos_per_step=16, micro_batch=micro_batch, offset=offset)
        recorder = Recorder(algorithm)
        recorder.param_groups = []
        generator = torch.Generator().manual_seed(1)
        clean = 3 + torch.randn(16, 3, 2, 2, 2, generator=generator)
        before = env.mdp.counters.denoiser_forwards
        row = algorithm._step(clean, torch.arange(16) % 2, torch.arange(16) % 3 == 0)
        found.append((recorder.gradients[0][0], row, env.mdp.counters.denoiser_forwards - before))
    (whole, whole_row, whole_forwards), (parts, parts_row, parts_forwards) = found
    assert (whole_forwards, parts_forwards) == (32, 48)
    assert whole.abs().max() > 0 and torch.allclose(parts, whole, rtol=1e-4)
    assert whole_row["offset"] > 0 and parts_row == pytest.approx(whole_row, rel=1e-4)


@pytest.mark.parametrize("schedule", ["flow", "epsilon"])
@pytest.mark.parametrize(
    "options",
    [
        {"labels": "group"},
        {"labels": "update", "utility": "loss_averse"},
        {"labels": "threshold", "threshold": -1.0, "undesirable_weight": 0.2},
    ],
)
def test_it_moves_to_the_better_side_without_a_differentiable_reward(schedule, options):
    def blind(video, prompts):
        return TargetReward(1.0)(video, prompts).detach()

    blind.differentiable = False
    # One prompt unless videos are compared within it: else a hard prompt's are all bad, and say nothing of each other.
    means = START if options["labels"] == "group" else START[:1]
    env = gaussian_env(schedule, means=means, reward=blind, num_envs=32, group_size=8)
    algorithm = kto_on(env, full_policy(env), weight_decay=0.0, learning_rate=0.05, micro_batch=32, **options)
    rows = [algorithm.update() for _ in range(25)]
    # A threshold promises no more than videos above it: once nearly all are, it does not say which of them are better.
    goal = options.get("threshold", 0.6 * rows[0]["reward_mean"])
    assert rows[0]["reward_mean"] < goal < sum(row["reward_mean"] for row in rows[-5:]) / 5
    assert env.mdp.counters.reward_backward_queries == 0


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_only_the_adapter_moves_and_the_reference_stays(kind):
    env = tiny_env(kind, num_envs=4, group_size=2, guidance_scale=2.0)
    policy = env.make_policy(lora_rank=2)
    obs, _ = env.reset(seed=3)
    with torch.no_grad(), policy.reference():
        before = policy.mean(obs)
    algorithm = kto_on(env, policy, videos_per_update=4, beta=500.0)
    first = env.mdp.counters.denoiser_forwards
    metrics = algorithm.update()
    # 4 videos with guidance, then one step: each video once by the policy and once by the reference
    assert env.mdp.counters.denoiser_forwards - first == 4 * 2 * env.num_steps + 2 * 4
    assert metrics["desirable_fraction"] == 0.5
    assert all(type(v) is float and math.isfinite(v) for v in metrics.values()) and metrics["grad_norm"] > 0
    with torch.no_grad():
        assert not torch.equal(policy.mean(obs), before)
        with policy.reference():
            assert torch.equal(policy.mean(obs), before)


def test_tied_rewards_change_nothing():
    env = gaussian_env(reward=tied)
    policy = full_policy(env)
    before = weight_of(policy).detach().clone()
    for labels in ("group", "update"):
        metrics = kto_on(env, policy, labels=labels).update()
        assert metrics["optimiser_steps"] == metrics["videos_labelled"] == metrics["desirable_fraction"] == 0.0
    assert torch.equal(weight_of(policy), before)


@pytest.mark.parametrize("refreshed", [False, True])
def test_a_run_continues_bit_for_bit_from_a_checkpoint(refreshed, tmp_path):
    options = {"warmup_steps": 9, "num_inner_epochs": 2, "videos_per_step": 12, "micro_batch": 8}
    env = gaussian_env()
    policy = env.make_policy(lora_rank=2)
    algorithm = kto_on(env, policy, **options)
    algorithm.update()
    if refreshed:
        policy.refresh_reference()

    def another():
        env = gaussian_env()
        policy = env.make_policy(lora_rank=2, seed=5)
        return kto_on(env, policy, seed=99, **options), policy

    goes_on_bit_for_bit(algorithm, policy, another, tmp_path, 2)


def test_the_learning_rate_warms_up():
    env = gaussian_env()
    algorithm = kto_on(env, full_policy(env), warmup_steps=4, learning_rate=0.4, videos_per_step=16)
    assert [algorithm.update()["learning_rate"] for _ in range(3)] == pytest.approx([0.2, 0.4, 0.4])


def test_refusals_name_the_way_out():
    env = gaussian_env(group_size=1)
    with pytest.raises(ValueError, match="group_size=1.*group_size=8.*labels='update' or 'threshold'"):
        kto_on(env, full_policy(env))
    assert kto_on(env, full_policy(env), labels="update").update()["optimiser_steps"] == 1
    env = gaussian_env(num_envs=1, group_size=1)
    with pytest.raises(ValueError, match="sample at least 2"):
        kto_on(env, full_policy(env), labels="update", videos_per_update=1)
    env = gaussian_env()
    with pytest.raises(ValueError, match="videos_per_update is 24.*num_envs=16"):
        kto_on(env, full_policy(env), videos_per_update=24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta is 0"),
        ({"utility": "sigmoid"}, "utility is 'sigmoid', expected one of kto, loss_averse, risk_seeking"),
        ({"offset": "original"}, "offset is 'original', expected one of batch, labels, none"),
        ({"labels": "threshold"}, "labels is 'threshold' and threshold None"),
        ({"threshold": 0.5}, "labels is 'group' and threshold 0.5"),
        ({"labels": "threshold", "threshold": math.nan}, "threshold nan"),
        ({"desirable_weight": 0, "undesirable_weight": 0}, "are both 0"),
        ({"undesirable_weight": -1}, "undesirable_weight is -1"),
    ],
)
def test_the_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionKTOConfig(**options)


def test_published_settings_and_preset():
    published = DiffusionKTOConfig()
    assert (published.beta, published.learning_rate, published.warmup_steps) == (1000.0, 1e-7, 200)
    assert (published.weight_decay, published.desirable_weight, published.undesirable_weight) == (1e-2, 1.0, 1.0)
    assert (published.utility, published.offset) == ("kto", "batch")
    assert DiffusionKTOConfig.preset("MovingShapes").warmup_steps == 0
    with pytest.raises(ValueError, match="only for MovingShapes"):
        DiffusionKTOConfig.preset("Sora")
