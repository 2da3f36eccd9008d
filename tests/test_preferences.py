"""Preference pairs, their weights, and the loss on them, against numbers worked out by hand and published ones."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from golden import golden_tensors

from algos.losses import dpo_loss, videodpo_column_loss
from algos.preferences import histogram_probabilities, pair_weights, preference_pairs

REWARD = torch.tensor([1.0, 3.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0, 0.0, -1.0, -1.0, -1.0])


def test_best_against_worst():
    assert preference_pairs(REWARD, 4).tolist() == [[1, 0], [8, 9]]


def test_all_pairs_leaves_out_ties():
    pairs = preference_pairs(REWARD, 4, "all_pairs").tolist()
    assert sorted(pairs) == [[1, 0], [1, 2], [2, 0], [3, 0], [3, 2], [8, 9], [8, 10], [8, 11]]


@pytest.mark.parametrize(
    ("strategy", "possible"),
    [
        ("best_vs_random", {(1, 0), (1, 2), (8, 9), (8, 10), (8, 11)}),
        ("random", {(1, 0), (1, 2), (2, 0), (3, 0), (3, 2), (8, 9), (8, 10), (8, 11)}),
    ],
)
def test_random_strategies_draw_every_candidate_and_nothing_else(strategy, possible):
    generator, seen = torch.Generator().manual_seed(0), Counter()
    for _ in range(600):
        pairs = preference_pairs(REWARD, 4, strategy, generator)
        assert len(pairs) == 2 and pairs[0, 0] < 4 and pairs[1, 0] == 8
        seen.update((w, loser) for w, loser in pairs.tolist())
    assert set(seen) == possible
    for first, chances in ((True, sum(w < 4 for w, _ in possible)), (False, 3)):
        for pair in (pair for pair in possible if (pair[0] < 4) == first):
            expected = 600 / chances
            assert abs(seen[pair] - expected) < 4 * math.sqrt(expected), pair


@pytest.mark.parametrize("strategy", ["best_vs_worst", "best_vs_random", "all_pairs", "random"])
def test_equal_rewards_make_no_pair(strategy):
    pairs = preference_pairs(torch.ones(8), 4, strategy, torch.Generator())
    assert pairs.shape == (0, 2) and pairs.dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((REWARD, 1), ValueError, "group_size is 1.*two videos"),
        ((REWARD, 5), ValueError, "group_size is 5 for 12"),
        ((REWARD, 4, "best"), ValueError, "strategy is 'best', expected one of best_vs_worst"),
        ((REWARD, 4, "random"), ValueError, "pass generator="),
        ((REWARD / 0, 4), ValueError, "NaN or infinite"),
        ((REWARD.long(), 4), TypeError, "floating-point"),
        ((REWARD[:, None], 4), ValueError, "shape"),
    ],
)
def test_pairs_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        preference_pairs(*arguments)


def test_histogram_probabilities():
    value = torch.tensor([0.0, 0.1, 0.2, 1.0])
    assert histogram_probabilities(value, 2).tolist() == [0.75, 0.75, 0.75, 0.25]
    assert histogram_probabilities(value, 1).tolist() == [1.0] * 4
    assert histogram_probabilities(torch.full((3,), 7.0)).tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="bins is 0"):
        histogram_probabilities(value, 0)


def test_pair_weights():
    weight = pair_weights(torch.tensor([0.72, 0.36, 1.0]), beta=2.0)
    assert torch.allclose(weight, torch.tensor([1.0, 4.0, 0.72**2]))
    assert pair_weights(torch.tensor([0.1, 0.9]), beta=0.0).tolist() == [1.0, 1.0]
    for probability in (0.0, 1.5):
        with pytest.raises(ValueError, match="expected 0 < p <= 1"):
            pair_weights(torch.tensor([probability]))
    with pytest.raises(ValueError, match="base is 0.*VideoDPO"):
        pair_weights(torch.tensor([0.5]), base=0)


def wave(shape, a, b):
    return (torch.arange(math.prod(shape), dtype=torch.float64) * a + b).sin().reshape(shape).float()


def published_case(*shape):
    target = wave(shape, 0.37, 0.1)
    reference = target + 0.05 * wave(shape, 0.53, 0.7)
    return reference + 0.001 * wave(shape, 0.91, 0.2), reference, target


def test_dpo_loss_has_the_published_numbers():
    for shape, inside, expected in (
        ((2, 4, 8, 8), -0.004734029, 0.6955170),
        ((2, 4, 3, 8, 8), -0.001424924, 0.6938599),
    ):
        loss, metrics = dpo_loss(*published_case(*shape), beta=5000)
        assert float(loss) == pytest.approx(expected, rel=1e-6)
        assert float(metrics["margin"]) == pytest.approx(inside, rel=2e-3)  # published: a difference of rounded means
        double = dpo_loss(*(x.double() for x in published_case(*shape)), beta=5000)[1]
        assert float(metrics["margin"]) == pytest.approx(float(double["margin"]), rel=1e-5)
        assert float(metrics["implicit_accuracy"]) == 0.0
    assert float(videodpo_column_loss(*published_case(2, 4, 3, 8, 8), beta=5000)) == pytest.approx(0.6938601, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_margins_are_not_lost_to_rounding(dtype):
    """As in the first thousands of steps at 1e-6: outputs that differ by a ten-thousandth."""
    shape = (2, 4, 8, 8, 8)
    target = wave(shape, 0.37, 0.1)
    reference = (0.01 * wave(shape, 0.53, 0.7)).to(dtype)
    prediction = (reference.float() + 1e-4 * wave(shape, 0.91, 0.2)).to(dtype)
    given = (prediction, reference, target.to(dtype))
    p, r, t = (x.double() for x in given)
    expected = ((p - t) ** 2 - (r - t) ** 2).flatten(1).mean(1)
    _, metrics = dpo_loss(*given, beta=5000)
    assert float(metrics["winner_error_change"]) == pytest.approx(float(expected[0]), rel=1e-4) != 0
    assert float(metrics["margin"]) == pytest.approx(-2500 * float(expected[0] - expected[1]), rel=1e-4)


def test_dpo_loss_by_hand():
    prediction = torch.tensor([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0], [2.0, 0.0]], requires_grad=True)  # w1 w2 l1 l2
    reference = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0], [1.0, 1.0]])
    target = torch.zeros(4, 2)
    # changes m - r: w 0 and 1, l -4 and 1, so h = -1/4 (0 + 4) = -1 and 0 with beta 0.5
    loss, metrics = dpo_loss(prediction, reference, target, beta=0.5, weight=torch.tensor([2.0, 1.0]))
    assert float(loss.detach()) == pytest.approx((2 * math.log1p(math.e) + math.log(2)) / 2)
    expected = {"implicit_accuracy": 0.0, "margin": -0.5, "winner_error_change": 0.5, "loser_error_change": -1.5}
    assert {name: pytest.approx(float(value)) for name, value in metrics.items()} == expected
    loss.backward()
    # d/d(w2) of the mean over 2 pairs: 1/2 * sigmoid(0) * beta/2 * 2 pred / 2 elements
    assert torch.allclose(prediction.grad[1], torch.tensor([0.0, 0.125]))


def test_one_margin_for_each_video_whatever_its_shape():
    prediction, reference, target = published_case(6, 4, 3, 5, 8)
    flat, _ = dpo_loss(*(x.flatten(1) for x in (prediction, reference, target)), beta=5000)
    assert torch.equal(dpo_loss(prediction, reference, target, beta=5000)[0], flat)
    one_by_one = [dpo_loss(*(x[[i, i + 3]] for x in (prediction, reference, target)), beta=5000)[0] for i in range(3)]
    assert torch.allclose(flat, torch.stack(one_by_one).mean())


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 4), {}, r"expected \[2P, ...\].*winners"),
        ((4, 4), {"beta": 0.0}, "beta is 0.0.*5000"),
        ((4, 4), {"weight": torch.ones(4)}, "weight has 4 numbers for 2 pairs"),
        ((4, 4), {"weight": torch.ones(2, 1)}, "weight has shape"),
    ],
)
def test_losses_refuse(shape, options, message):
    x = torch.zeros(shape)
    for loss in (dpo_loss, videodpo_column_loss):
        with pytest.raises(ValueError, match=message):
            loss(x, x, x, **{"beta": 1.0, **options})
    with pytest.raises(ValueError, match="pass equal shapes"):
        dpo_loss(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2, 3), 1.0)
    with pytest.raises(ValueError, match="or use dpo_loss"):
        videodpo_column_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), 1.0)


@pytest.mark.golden
def test_released_videodpo_numbers():
    tensors = golden_tensors("rewards_videodpo", "fixture.safetensors")
    pred, reference, target = tensors["pred"], tensors["ref_pred"], tensors["target"]
    for beta in (100, 500, 5000):
        for factor in (1, 0.8):
            loss = videodpo_column_loss(pred, reference, target, beta, torch.full((2,), float(factor)))
            torch.testing.assert_close(loss, tensors[f"loss_beta{beta}_f{factor}"].to(loss), rtol=1e-5, atol=0)
    leaf = pred.clone().requires_grad_()
    videodpo_column_loss(leaf, reference, target, 500).backward()
    torch.testing.assert_close(leaf.grad, tensors["grad_beta500_f1"], rtol=1e-5, atol=1e-7)
    for beta in (0.5, 1.0, 2.0):
        found = pair_weights(tensors["prob_score"], beta=beta)
        torch.testing.assert_close(found, tensors[f"dupfactor_dupbeta{beta}"].to(found), rtol=1e-5, atol=0)
