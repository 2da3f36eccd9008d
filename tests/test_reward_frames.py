"""Frame policies: each of them for every registered reward, or an early refusal that says why not."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from vdm_env import make
from vdm_env.rewards import REWARDS, Chunked, Part, RewardContext, WeightedSum, as_reward, check_frames, select_frames
from vdm_env.rewards.base import FramePolicy

PROMPTS = ["playing piano in the rain", "riding scooter past a book"]
FRAMES = 4
POLICIES: tuple[FramePolicy, ...] = ("all", "alternate", "random1", "random4", "tsn2", "tsn4", "middle2", "middle4")
POLICIES += (4, "first", "last", [0, 2, 3, 1])
# Frames a reward cannot do without, built for videos of FRAMES frames; ViCLIP takes a single frame as a still.
LEAST = {"Action": 4, "VJEPA": 4, "VJEPA2": 4, "ViCLIP": 4, "Motion": 2, "OmniScore": 3}


@functools.cache
def built(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return REWARDS[name].build(RewardContext(weights="random", scale="tiny", seed=5, num_frames=FRAMES))


def videos(count: int = FRAMES) -> Tensor:
    return 0.1 + 0.8 * torch.rand(2, count, 3, 20, 28, generator=torch.Generator().manual_seed(2))


def fits(name: str, count: int) -> bool:
    return count >= LEAST.get(name, 1) or (name == "ViCLIP" and count == 1)


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_every_policy_applies_or_is_refused_before_anything_is_scored(name: str) -> None:
    reward, video = built(name), videos()
    for policy in POLICIES:
        chosen = select_frames(policy, FRAMES, 7)
        if not fits(name, len(chosen)):
            # Known from the policy alone, or as soon as the length of the videos is.
            with pytest.raises(ValueError, match=f"frame policy {policy!r} does not fit: reward '.*' .*decode"):
                check_frames(as_reward(reward, frames=policy), policy, FRAMES)
            with pytest.raises(ValueError, match="does not fit"):
                check_frames(reward, policy, FRAMES)
            continue
        framed = as_reward(reward, frames=policy)
        check_frames(framed, policy, FRAMES)
        assert (framed.frames, framed.name, framed.range) == (policy, reward.name, reward.range)
        assert framed.differentiable == reward.differentiable
        with torch.no_grad():
            scores = framed(video[:, chosen], PROMPTS)
        assert scores.shape == (2,) and bool(torch.isfinite(scores).all())
        if len(chosen) == 1:  # a single frame counts, and no other
            with torch.no_grad():
                other = framed(video[:, (chosen + 1) % FRAMES], PROMPTS)
            assert not torch.equal(scores, other)
    assert sum(fits(name, len(select_frames(p, FRAMES, 7))) for p in POLICIES) >= 5


@pytest.mark.parametrize("name", sorted(LEAST))
def test_the_reward_itself_refuses_too_few_frames_with_the_same_words(name: str) -> None:
    reward = built(name)
    count = LEAST[name] - 1
    with pytest.raises(ValueError, match="decode|expected"):
        reward(videos(count), PROMPTS)
    with pytest.raises(ValueError, match="decode"):
        reward.check_num_frames(count)
    reward.check_num_frames(LEAST[name])


def test_a_sum_asks_its_parts() -> None:
    total = WeightedSum([Part(reward=built("Brightness")), Part(reward=built("VJEPA"))])
    check_frames(total, "alternate", 2 * FRAMES)
    for policy, frames in (("random1", 8), ("alternate", FRAMES), ("middle2", 8)):
        with pytest.raises(ValueError, match=f"'{policy}' does not fit: reward 'VJEPA' looks at 4 frames, got"):
            check_frames(total, policy, frames)
    with pytest.raises(ValueError, match="'random1' does not fit"):
        as_reward(total, frames="random1")
    with pytest.raises(ValueError, match="'tsn2' does not fit"):
        as_reward(Chunked(total, 1), frames="tsn2")
    check_frames(total, total.frames, 2)  # its own wish is not questioned: short videos repeat frames
    assert bool(torch.isfinite(total(videos(2), PROMPTS)).all())


def test_another_name_or_policy_keeps_the_parts() -> None:
    total = WeightedSum([Part(reward=built("Brightness"), weight=2.0), Part(reward=built("JPEGSurrogate"))])
    for reward in (total, Chunked(total, 1)):
        changed = as_reward(as_reward(reward, name="mine"), frames="random1")
        assert (changed.name, changed.frames) == ("mine", "random1")
        scores, parts = changed.score_parts(videos(1), PROMPTS)  # type: ignore[attr-defined]
        assert list(parts) == ["Brightness", "JPEGSurrogate"]
        torch.testing.assert_close(scores, 2 * parts["Brightness"] + parts["JPEGSurrogate"])
    assert not hasattr(as_reward(built("Brightness"), name="b"), "score_parts")


def test_plain_functions_say_how_many_frames_they_need() -> None:
    def change(video: Tensor, prompts: list[str]) -> Tensor:
        return (video[:, 1:] - video[:, :-1]).mean((1, 2, 3, 4))

    reward = as_reward(change, least_frames=2)
    with pytest.raises(ValueError, match="'first' does not fit: reward 'change' needs at least 2 frames, got 1"):
        as_reward(reward, frames="first")
    with pytest.raises(ValueError, match="unknown frame policy 'alt'"):
        check_frames(as_reward(change, frames="alt"), "alt", 4)
    with pytest.raises(ValueError, match="do not fit a video of 4 frames"):
        check_frames(reward, [0, 4], 4)
    assert as_reward(reward, frames="random2").least_frames == 2  # type: ignore[attr-defined]


def test_make_refuses_frames_the_reward_cannot_score_before_anything_is_spent():
    with pytest.raises(ValueError, match="does not fit"):
        make("MovingShapes-VJEPA", weights="random", scale="tiny", decode_frames="random1")
    env = make("ModelScope-Action", weights="random", scale="tiny", decode_frames="alternate")  # VADER's setting
    assert env.mdp.decode_frames == "alternate"
