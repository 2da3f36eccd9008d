"""Every loss against numbers worked out by hand or printed by the published functions."""

from __future__ import annotations

import math

import pytest
import torch

from algos.losses import clipped_surrogate, hinge, kl_penalty, negative_mean, one_minus, reward_loss, target_l1

VECTOR_LOSSES = [one_minus, negative_mean, lambda r: target_l1(r, 1.0), lambda r: kl_penalty(r, 1.0)]


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def surrogate_of_ratio(ratio, advantage, clip_range):
    return clipped_surrogate(ratio.log(), torch.zeros_like(ratio), advantage, clip_range)


def test_clipped_surrogate_has_the_published_value():
    ratio = vector(1.0003, 0.9998, 1.00005, 1.00002)
    loss, _ = surrogate_of_ratio(ratio, vector(1, -1, 2, -0.5), 1e-4)
    assert float(loss) == pytest.approx(-0.3750724793, abs=3e-8)  # printed in float32
    loss, _ = surrogate_of_ratio(vector(1.0), vector(-1.0), 1e-4)
    assert float(loss) == 1.0


def test_clipped_surrogate_metrics():
    ratio = vector(0.8, 1.0, 1.3, 1.5)
    _, metrics = surrogate_of_ratio(ratio, vector(1, 1, 1, 1), 0.2 + 1e-9)
    assert float(metrics["ratio_mean"]) == pytest.approx(1.15)
    assert float(metrics["ratio_std"]) == pytest.approx(math.sqrt(0.0725))
    assert float(metrics["clip_fraction_low"]) == 0.0
    assert float(metrics["clip_fraction_high"]) == 0.5
    logs = [math.log(r) for r in (0.8, 1.0, 1.3, 1.5)]
    assert float(metrics["approx_kl"]) == pytest.approx(sum(x * x for x in logs) / 8)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [
        (1.0, 2.0, -2.0),  # inside: -A r
        (1.5, 2.0, 0.0),  # already far enough up
        (0.5, -2.0, 0.0),  # already far enough down
        (0.5, 2.0, -1.0),  # went the wrong way: pulled back with full force
        (1.5, -2.0, 3.0),
    ],
)
def test_clipping_stops_the_gradient_only_where_the_policy_went_far_enough(ratio, advantage, gradient):
    log_prob = vector(math.log(ratio)).requires_grad_()
    old = vector(0.0).requires_grad_()
    weight = vector(advantage).requires_grad_()
    loss, _ = clipped_surrogate(log_prob, old, weight, 0.2)
    loss.backward()
    assert float(log_prob.grad) == pytest.approx(gradient)
    assert old.grad is None and weight.grad is None


def test_reward_losses():
    reward = vector(0.2, 0.6).requires_grad_()
    assert one_minus(reward).item() == pytest.approx(0.6)
    assert negative_mean(reward).item() == pytest.approx(-0.4)
    assert float(target_l1(vector(4.0, 12.0), target=10, scale=0.1)) == pytest.approx(0.4)
    # VADER writes |1 - s / 100| for PickScore
    assert float(target_l1(vector(20.0, 24.0), target=100, scale=0.01)) == pytest.approx(0.78)
    for loss, slope in ((one_minus, -0.5), (negative_mean, -0.5), (lambda r: target_l1(r, 0.5, 2.0), None)):
        (gradient,) = torch.autograd.grad(loss(reward), reward)
        assert gradient.tolist() == pytest.approx([slope, slope] if slope else [-1.0, 1.0])


def test_kl_penalty():
    kl = vector(0.5, 1.5).requires_grad_()
    penalty = kl_penalty(kl, 0.1)
    assert penalty.item() == pytest.approx(0.1)
    (gradient,) = torch.autograd.grad(penalty, kl)
    assert gradient.tolist() == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize("loss", VECTOR_LOSSES)
def test_wrong_arguments_are_named(loss):
    with pytest.raises(ValueError, match=r"shape \(2, 1\), expected \[B\]"):
        loss(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="one number per video"):
        loss(torch.zeros(0))
    with pytest.raises(TypeError, match="torch.int64, expected a floating-point"):
        loss(torch.zeros(2, dtype=torch.int64))


def test_vectors_of_two_lengths_do_not_broadcast():
    with pytest.raises(ValueError, match="advantage has shape"):
        clipped_surrogate(torch.zeros(2), torch.zeros(2), torch.zeros(1), 0.1)
    with pytest.raises(ValueError, match="clip_range is 0"):
        clipped_surrogate(torch.zeros(2), torch.zeros(2), torch.zeros(2), 0)
    with pytest.raises(ValueError, match="scale is 0"):
        target_l1(torch.zeros(2), 1.0, 0.0)
    with pytest.raises(ValueError, match="coefficient is nan"):
        kl_penalty(torch.zeros(2), math.nan)


def test_the_names_of_reward_losses_are_the_losses():
    reward = torch.tensor([0.25, 3.0])
    given = {"target": 2.0, "scale": 0.5}
    named = [float(reward_loss(reward, kind, **given)) for kind in ("one_minus", "negative", "target_l1", "hinge")]
    losses = one_minus(reward), negative_mean(reward), target_l1(reward, 2.0, 0.5), hinge(reward, 2.0)
    assert named == [float(loss) for loss in losses] == [-0.625, -1.625, 0.6875, 0.875]
    with pytest.raises(ValueError, match="kind is 'plus', expected one_minus"):
        reward_loss(reward, "plus")
