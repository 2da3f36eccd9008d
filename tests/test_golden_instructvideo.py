"""InstructVideo's frame choice, coefficients, loss and pixel gradient against the released code's."""

from __future__ import annotations

import json

import pytest
import torch
from golden import comparable, golden, golden_tensors

from algos.instructvideo import choose_frames, score_frames
from algos.losses import attenuated_one_minus, temporal_attenuation
from vdm_env.rewards.clip import OpenClipBackbone, hps

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def fixture():
    return golden_tensors("rewards_instructvideo", "fixture.safetensors")


@pytest.fixture(scope="module")
def rate(fixture):
    """lambda of exp(-lambda |f - F//2|), from the recorded coefficient that lies furthest from the middle."""
    distance = (fixture["segment_frame_index"] - fixture["frames_bcfhw"].shape[2] // 2).abs().double()
    coefficient = fixture["tar_coefficient"].double()
    known = (distance > 0) & (coefficient > 1e-30)
    if not known.any():
        pytest.skip("every recorded frame is the middle one, or has lost its coefficient: nothing tells lambda")
    furthest = torch.where(known, distance, 0.0).argmax()
    return float(-coefficient.flatten()[furthest].log() / distance.flatten()[furthest])


@pytest.fixture(scope="module")
def reward(fixture):
    from open_clip.model import CLIP

    model = CLIP(**json.loads((golden("rewards_hpsv2") / "config.json").read_text()))
    stored = golden_tensors("rewards_hpsv2", "fixture.safetensors")
    prefix = "openclip."
    state = {k.removeprefix(prefix): v.float() for k, v in stored.items() if k.startswith(prefix)}
    model.load_state_dict(state, strict=True)
    tokens = fixture["tokens"]
    return hps(OpenClipBackbone(model.eval().requires_grad_(False), lambda texts: tokens[[int(t) for t in texts]]))


def pixels(decoded):
    """Decoder output [B,3,F,H,W] in about [-1,1] as video [B,F,3,H,W] in [0,1]."""
    return (decoded * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)


def test_coefficients(fixture, rate):
    frames, count = fixture["segment_frame_index"], fixture["frames_bcfhw"].shape[2]
    found = temporal_attenuation(frames, count, rate)
    torch.testing.assert_close(found, fixture["tar_coefficient"], rtol=1e-6, atol=0)


def test_the_recorded_frames_lie_where_ours_can(fixture):
    recorded, count = fixture["segment_frame_index"], fixture["frames_bcfhw"].shape[2]
    # So many draws that no frame of a segment is left out.
    ours = choose_frames(torch.arange(100 * count), count, recorded.shape[1])
    segments = [set(column.tolist()) for column in ours.T]
    for segment, column in zip(segments, recorded.T, strict=True):
        assert set(column.tolist()) <= segment
        assert segment == set(range(min(segment), max(segment) + 1))
    assert len(set.union(*segments)) == sum(map(len, segments)) <= count  # no frame is in two of them
    assert len(set(map(len, segments))) == 1


def test_scores_of_all_frames(fixture, reward):
    video = pixels(fixture["frames_bcfhw"].float())
    scores = score_frames(reward, video, [str(i) for i in range(len(video))])
    torch.testing.assert_close(scores, fixture["per_frame_hps_score"], rtol=1e-5, atol=1e-6)


def test_loss_and_gradient(fixture, reward, rate):
    decoded = fixture["frames_bcfhw"].float().requires_grad_(True)
    frames, count = fixture["segment_frame_index"], decoded.shape[2]
    video = pixels(decoded)[torch.arange(len(decoded))[:, None], frames]
    scores = score_frames(reward, video, [str(i) for i in range(len(video))])
    loss = attenuated_one_minus(scores, temporal_attenuation(frames, count, rate))
    torch.testing.assert_close(loss, fixture["loss"], rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, decoded)
    where = comparable(decoded)
    torch.testing.assert_close(gradient[where], fixture["grad"][where], rtol=1e-3, atol=1e-8)
