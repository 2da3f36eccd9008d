"""OmniScore and the measures of motion it is made of, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

import vdm_env
from vdm_env import check_reward
from vdm_env.metrics import vbench_scores
from vdm_env.metrics.temporal import dynamic_degree, frame_consistency, motion_smoothness, temporal_flicker
from vdm_env.rewards import RewardContext
from vdm_env.rewards.base import as_reward, score_parts
from vdm_env.rewards.omniscore import GENERAL, MOVING_SHAPES, VBENCH, OmniScore, SubScore, build_omniscore
from vdm_env.worlds.moving_shapes.render import parse_caption, render, sample_scenes


def levels(*values: float, side: int = 4) -> torch.Tensor:
    """One video whose frames are plain grey of these levels."""
    return torch.tensor(values).view(1, -1, 1, 1, 1).expand(1, len(values), 3, side, side).clone()


# ------------------------------------------------------------------ motion


def test_flicker_of_plain_frames():
    assert temporal_flicker(levels(0.1, 0.5, 0.3)).item() == pytest.approx(1 - (0.4 + 0.2) / 2)
    assert temporal_flicker(levels(0.7, 0.7, 0.7)).item() == 1.0
    assert temporal_flicker(levels(0.0, 1.0, 0.0)).item() == 0.0


def test_smoothness_rewards_steady_change_and_not_stillness():
    assert motion_smoothness(levels(0.1, 0.3, 0.5, 0.7, 0.9)).item() == pytest.approx(1.0)
    assert motion_smoothness(levels(0.0, 0.5, 0.2)).item() == pytest.approx(1 - 0.4)
    # frames 1 and 3 are predicted: errors |0.2 - 0.3| and |0.4 - 0.7|
    assert motion_smoothness(levels(0.0, 0.2, 0.6, 0.4, 0.8)).item() == pytest.approx(1 - (0.1 + 0.3) / 2)
    with_last = motion_smoothness(levels(0.0, 0.2, 0.6, 0.4, 0.8, 0.0)).item()
    assert with_last == pytest.approx(1 - 0.2)  # an even number: the last frame has no right neighbour


def test_dynamic_degree_takes_the_pixels_that_change_most():
    video = levels(0.0, 0.0, 0.0, side=10)
    video[0, 1, :, 0, :5] = 0.8  # 5 of 100 pixels come, and go again
    assert dynamic_degree(video).item() == pytest.approx(0.8)
    assert dynamic_degree(video, top=0.1).item() == pytest.approx(0.4)
    assert dynamic_degree(video, top=1.0).item() == pytest.approx(0.8 * 5 / 100)
    assert dynamic_degree(video, top=0.001).item() == pytest.approx(0.8)  # at least one pixel
    video[0, 1, 1:, 0, :5] = 0.0  # in one channel only
    assert dynamic_degree(video).item() == pytest.approx(0.8 / 3)


def test_frame_consistency_looks_at_the_frame_before_and_the_first():
    angle = math.radians(60)
    turn = torch.tensor([[math.cos(i * angle), math.sin(i * angle)] for i in range(3)])
    expected = (0.5 * (0.5 + 0.5) + 0.5 * (0.5 + 0.0)) / 2  # the third frame is 120 degrees from the first: counts 0
    features = torch.stack([turn, 7 * turn, turn[:1].expand(3, 2)])
    assert frame_consistency(features).tolist() == pytest.approx([expected, expected, 1.0])


@pytest.mark.parametrize("measure", [temporal_flicker, motion_smoothness, dynamic_degree])
def test_videos_are_measured_one_by_one_and_with_gradients(measure):
    video = torch.rand(3, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = measure(video)
    assert scores.shape == (3,)
    assert torch.allclose(scores[1:2], measure(video[1:2]))
    scores[0].backward()
    assert video.grad[0].abs().max() > 0 and not video.grad[1:].any()


def test_measures_refuse():
    for measure, frames in ((temporal_flicker, 1), (motion_smoothness, 2), (dynamic_degree, 1)):
        with pytest.raises(ValueError, match=f"F >= {frames + 1}"):
            measure(torch.zeros(1, frames, 3, 4, 4))
        with pytest.raises(ValueError, match="expected floats"):
            measure(torch.zeros(1, 5, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="top is 0"):
        dynamic_degree(levels(0.0, 1.0), top=0)
    with pytest.raises(ValueError, match="F >= 2"):
        frame_consistency(torch.ones(2, 1, 3))


# ------------------------------------------------------------------ the sum


def brightness(video, prompts):
    return video.mean((1, 2, 3, 4))


def length(video, prompts):
    return torch.tensor([float(len(text)) for text in prompts])


def test_the_score_is_the_weighted_mean_of_normalised_sub_scores():
    terms = {"Bright": SubScore(weight=3.0, low=0.2, high=0.7), "Long": SubScore(weight=1.0, low=2.0, high=6.0)}
    omni = OmniScore({"Bright": brightness, "Long": length}, terms)
    total, parts = score_parts(omni, torch.cat([levels(0.45), levels(1.0)]), ["abcd", "ab"])
    assert parts["Bright"].tolist() == pytest.approx([0.45, 1.0]) and parts["Long"].tolist() == [4.0, 2.0]
    # (3 * 0.5 + 1 * 0.5) / 4, and without clipping (3 * 1.6 + 0) / 4
    assert total.tolist() == pytest.approx([0.5, 1.2])
    assert omni.config == terms and omni.name == "OmniScore"
    double = {name: SubScore(weight=2 * t.weight, low=t.low, high=t.high) for name, t in terms.items()}
    again = OmniScore({"Bright": brightness, "Long": length}, double)(levels(0.45), ["abcd"])
    assert again.tolist() == pytest.approx([0.5])


def test_what_it_can_do_follows_from_its_parts():
    bounded = as_reward(brightness, range=(0.0, 1.0), frames="first")
    blind = as_reward(length, differentiable=False, range=(0.0, 10.0))
    terms = {"A": SubScore(), "B": SubScore(high=5.0)}
    omni = OmniScore({"A": bounded, "B": blind}, terms)
    assert not omni.differentiable and omni.frames == "all"
    assert omni.range == pytest.approx((0.0, 0.5 * 1 + 0.5 * 2))
    # A's own frames are the first only, though the sum is handed all
    total = omni(levels(0.2, 1.0, 1.0), ["abcde"])
    assert total.tolist() == pytest.approx([0.5 * 0.2 + 0.5 * 1.0])
    assert OmniScore({"A": bounded}, {"A": SubScore()}).differentiable


def test_refusals():
    with pytest.raises(ValueError, match="sub-scores are \\['A'\\].*\\['B'\\]"):
        OmniScore({"A": brightness}, {"B": SubScore()})
    with pytest.raises(ValueError, match="no sub-score has a weight"):
        OmniScore({"A": brightness}, {"A": SubScore(weight=0.0)})
    for options in ({"weight": -1.0}, {"low": 1.0}, {"high": math.inf}, {"low": math.nan}):
        with pytest.raises(ValueError, match="expected a finite weight"):
            SubScore(**options)


def test_vbench_ranges():
    """The published table: minimum, maximum, weight."""
    assert VBENCH["SubjectConsistency"] == SubScore(weight=1.0, low=0.1462, high=1.0)
    assert VBENCH["MotionSmoothness"] == SubScore(weight=1.0, low=0.706, high=0.9975)
    assert VBENCH["DynamicDegree"].weight == 0.5 and VBENCH["CLIP"].high == 36.4
    assert len(VBENCH) == 8 and set(GENERAL) < set(VBENCH)
    scales = {**vbench_scores.QUALITY, **vbench_scores.SEMANTIC}
    for name, dimension, unit in (
        ("SubjectConsistency", "subject consistency", 1),
        ("BackgroundConsistency", "background consistency", 1),
        ("TemporalFlicker", "temporal flickering", 1),
        ("MotionSmoothness", "motion smoothness", 1),
        ("DynamicDegree", "dynamic degree", 1),
        ("Aesthetic", "aesthetic quality", 10),
        ("Imaging", "imaging quality", 1),
        ("CLIP", "overall consistency", 100),
    ):
        term, scale = VBENCH[name], scales[dimension]
        assert (term.low, term.high, term.weight) == pytest.approx((unit * scale.low, unit * scale.high, scale.weight))
    with pytest.raises(TypeError):
        VBENCH["Aesthetic"] = SubScore()


# ------------------------------------------------------------------ the built-in sets


@pytest.fixture(scope="module")
def env():
    return vdm_env.make("MovingShapes-OmniScore", num_envs=2, num_steps=2, guidance_scale=1.0)


def test_moving_shapes_by_name(env):
    reward = env.mdp.reward
    assert set(reward.config) == set(MOVING_SHAPES)
    video = env.mdp.decode(torch.zeros(2, *env.mdp.latent_shape))
    total, parts = score_parts(reward, video, ["a red circle moving left", "a blue square moving right"])
    weights = sum(term.weight for term in MOVING_SHAPES.values())
    expected = sum(
        term.weight * (parts[name] - term.low) / (term.high - term.low) for name, term in MOVING_SHAPES.items()
    )
    assert torch.allclose(total, expected / weights, atol=1e-5)
    assert torch.allclose(parts["DynamicDegree"], dynamic_degree(video))


def test_it_keeps_the_contract_of_a_reward(env):
    prompts = ["a red circle moving left", "a blue square moving right"]
    check_reward(env.mdp.reward, prompts=prompts)


def test_right_videos_score_above_wrong_ones(env):
    """The world's own rendering against another caption's, and against noise."""
    texts = ["a red circle moving left", "a blue square moving right"]
    scenes = sample_scenes([parse_caption(text) for text in texts], torch.Generator().manual_seed(0))
    right = render(scenes)
    noise = torch.rand(right.shape, generator=torch.Generator().manual_seed(1))
    scores = [env.mdp.reward(video, texts) for video in (right, right.flip(0), noise)]
    assert bool((scores[0] > scores[1]).all()) and bool((scores[0] > scores[2]).all())


def test_models_without_a_world_get_vbench_terms():
    context = RewardContext(weights="random", scale="tiny", num_frames=4)
    with pytest.warns(UserWarning, match="random weights"):
        omni = build_omniscore(context)
    assert set(omni.config) == set(GENERAL) and omni.config["Aesthetic"] == VBENCH["Aesthetic"]
    video = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    total, parts = score_parts(omni, video, ["a dog", "a cat"])
    assert set(parts) == set(GENERAL) and 0 <= float(parts["BackgroundConsistency"].detach().min()) <= 1
    total.sum().backward()
    assert video.grad.abs().max() > 0
