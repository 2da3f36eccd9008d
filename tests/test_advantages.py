"""Advantages against numbers worked out by hand or printed by the published functions."""

from __future__ import annotations

import json

import pytest
import torch

from algos.advantages import (
    PerPromptTracker,
    batch_advantages,
    clip_advantages,
    group_advantages,
    zero_std_fraction,
)

PROMPTS = ["a", "b", "a", "a", "b", "c"]
FIRST = [-1.33630514, -0.87830955, 0.26726103, 1.06904411, 0.87830955, 1.46384925]
SECOND = [-0.999999, -0.33333311, -0.999999, 0.999999, -0.99999933, -1.51096496]


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_tracker_has_the_published_values():
    tracker = PerPromptTracker(buffer_size=4, min_count=3)
    assert tracker.update(PROMPTS, vector(1, 2, 3, 4, 5, 6)).tolist() == pytest.approx(FIRST, abs=1e-8)
    assert tracker.update(PROMPTS, vector(2, 2, 2, 4, 1, 0)).tolist() == pytest.approx(SECOND, abs=1e-8)


def test_tracker_continues_from_its_state_even_through_json():
    tracker = PerPromptTracker(buffer_size=4, min_count=3)
    tracker.update(PROMPTS, vector(1, 2, 3, 4, 5, 6))
    restored = PerPromptTracker(buffer_size=4, min_count=3)
    restored.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    assert restored.update(PROMPTS, vector(2, 2, 2, 4, 1, 0)).tolist() == pytest.approx(SECOND, abs=1e-8)
    with pytest.raises(ValueError, match="buffer_size=2"):
        PerPromptTracker(buffer_size=2, min_count=2).load_state_dict(tracker.state_dict())


def test_tracker_forgets_the_oldest_rewards():
    tracker = PerPromptTracker(buffer_size=2, min_count=1)
    tracker.update([7, 7, 7], vector(100, 1, 3))
    assert tracker.state_dict() == {"prompts": [7], "rewards": [[1.0, 3.0]]}


def test_tracker_keeps_its_buffers_when_a_batch_is_refused():
    tracker = PerPromptTracker(buffer_size=4, min_count=1)
    for bad, message in ((vector(1, float("nan")), "1 of 2 rewards are NaN"), (vector(1), "2 prompts for 1 rewards")):
        with pytest.raises(ValueError, match=message):
            tracker.update([0, 1], bad)
    assert tracker.state_dict()["prompts"] == []
    with pytest.raises(ValueError, match="min_count 5"):
        PerPromptTracker(buffer_size=4, min_count=5)


def test_group_advantages_in_every_published_form():
    reward = vector(1, 3, 0, 2)
    assert group_advantages(reward, 2, std="none").tolist() == [-1, 1, -1, 1]
    # DanceGRPO: unbiased std sqrt(2); Flow-GRPO: std of the whole batch, population sqrt(1.25)
    dance = group_advantages(reward, 2, std="unbiased", eps=1e-8)
    assert dance.tolist() == pytest.approx([-(2**-0.5), 2**-0.5] * 2)
    flow = group_advantages(reward, 2, global_std=True, eps=1e-4)
    assert flow.tolist() == pytest.approx([-1 / (1.25**0.5 + 1e-4), 1 / (1.25**0.5 + 1e-4)] * 2)
    assert group_advantages(vector(1, 3, 0, 6), 2, eps=0).tolist() == pytest.approx([-1, 1, -1, 1])


def test_a_group_of_equal_rewards_has_no_advantage():
    reward = vector(5, 5, 0, 2)
    assert group_advantages(reward, 2).tolist()[:2] == [0, 0]
    assert batch_advantages(vector(3, 3, 3)).tolist() == [0, 0, 0]
    assert zero_std_fraction(reward, 2) == 0.5
    assert zero_std_fraction(reward, 4) == 0.0


@pytest.mark.parametrize("value", [0.1, 0.3, 1e6 / 3])
def test_equal_rewards_have_exactly_no_advantage_in_single_precision(value):
    """Their mean is not that number to the last bit, which a small eps would make large."""
    reward = torch.full((16,), value)
    assert any(torch.full((n,), value).mean() != torch.tensor(value) for n in range(3, 17))
    zero = [0.0] * 16
    assert batch_advantages(reward).tolist() == zero
    for std in ("population", "unbiased", "none"):
        for size in (3, 5, 15):
            assert group_advantages(reward[:15], size, std=std, eps=1e-8).tolist() == zero[:15]
        assert group_advantages(reward, 16, std=std, eps=1e-8).tolist() == zero
    mixed = torch.cat([reward, torch.arange(16.0)])
    for global_std in (False, True):
        found = group_advantages(mixed, 16, global_std=global_std, eps=1e-8)
        assert found[:16].tolist() == zero and bool((found[16:] != 0).all())
    assert PerPromptTracker(16, 1).update([0] * 16, reward).tolist() == zero


def test_batch_advantages_and_clipping():
    advantage = batch_advantages(vector(1, 2, 3, 6))
    assert advantage.tolist() == pytest.approx([(r - 3) / 3.5**0.5 for r in (1, 2, 3, 6)])
    assert clip_advantages(vector(-9, 0.5, 6), 5).tolist() == [-5, 0.5, 5]
    with pytest.raises(ValueError, match="clip_max is -1"):
        clip_advantages(advantage, -1)


@pytest.mark.parametrize("group_size", [1, 3, 0])
def test_groups_must_fit(group_size):
    with pytest.raises(ValueError, match=f"group_size is {group_size} for 4 rewards"):
        group_advantages(torch.zeros(4), group_size)


def test_rewards_must_be_a_finite_vector():
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        batch_advantages(torch.zeros(2, 2))
    with pytest.raises(TypeError, match="torch.int64"):
        batch_advantages(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="repair the reward"):
        group_advantages(vector(1, float("inf")), 2)
    with pytest.raises(ValueError, match="std is 'robust'"):
        group_advantages(vector(1, 2), 2, std="robust")


def test_advantages_are_constants_in_the_rewards_type():
    reward = torch.tensor([1.0, 2.0], requires_grad=True)
    for advantage in (batch_advantages(reward), group_advantages(reward, 2), PerPromptTracker().update([0, 0], reward)):
        assert not advantage.requires_grad and advantage.dtype == torch.float32
