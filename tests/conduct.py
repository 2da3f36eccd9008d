"""What every algorithm has to do, asserted by functions: repeat, go on from a checkpoint, refuse bad gradients."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import weight_of

from algos.checkpoint import load_checkpoint, save_checkpoint


def repeats(run):
    """The rows of `run(seed)` are the same for the same seed, and others for another one; returns those of seed 0."""
    first = run(0)
    assert first == run(0)
    assert [row["reward_mean"] for row in first] != [row["reward_mean"] for row in run(1)]
    return first


def goes_on_bit_for_bit(algorithm, policy, build, folder, updates):
    """Another algorithm that is given a checkpoint of this one does the same updates.

    `build()` makes the other algorithm and its policy, which may be of other seeds and have a history of their own.
    Returns the rows of the updates and the algorithm's state in the checkpoint.
    """
    save_checkpoint(folder / "checkpoint", {"algorithm": algorithm.state_dict()}, policy)
    expected = [algorithm.update() for _ in range(updates)]
    restored, restored_policy = build()
    restored_policy.load(folder / "checkpoint" / "policy")
    state = load_checkpoint(folder / "checkpoint")["algorithm"]
    restored.load_state_dict(state)
    assert [restored.update() for _ in range(updates)] == expected
    for a, b in zip(policy.trainable_parameters(), restored_policy.trainable_parameters(), strict=True):
        assert torch.equal(a, b)
    return expected, state


def refuses_a_gradient_that_is_not_finite(algorithm, policy):
    """The update raises, and the policy's one weight stays what it was."""
    weight = weight_of(policy)
    before = weight.detach().clone()
    handle = weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        algorithm.update()
    handle.remove()
    assert torch.equal(weight, before)
