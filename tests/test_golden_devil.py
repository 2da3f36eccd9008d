"""DEVIL's dynamics arithmetic against recorded numbers; sizes are read from the files."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tests.golden import golden_tensors
from vdm_env.metrics import devil

pytestmark = pytest.mark.golden
TOLERANCE = {"rtol": 0.0, "atol": 1e-6}


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return golden_tensors("rewards_devil", "fixture.safetensors")


def test_feature_distances(data: dict[str, Tensor]) -> None:
    torch.testing.assert_close(devil.dino_variation(data["frame_features"]), data["info_dino"], **TOLERANCE)
    torch.testing.assert_close(devil.dino_segment_distance(data["frame_features"]), data["dino_segm_dist"], **TOLERANCE)
    published = devil.segment_distance(data["segment_features"], mode="devil")
    torch.testing.assert_close(published, data["viclip_segm_dist"], **TOLERANCE)
    # Without the S pairs of a segment with itself, each of distance 0, among S (S + 1) / 2.
    segments = len(data["segment_features"])
    corrected = devil.segment_distance(data["segment_features"])
    torch.testing.assert_close(corrected, published * (segments + 1) / (segments - 1), **TOLERANCE)


def test_segments(data: dict[str, Tensor]) -> None:
    names = [m for m in (re.fullmatch(r"segment_indices_(\d+)_frames_ratio_([\d.]+)", n) for n in data) if m]
    assert names
    for match in names:
        wanted = data[match[0]]
        indices = devil.segment_indices(int(match[1]), float(match[2]), length=wanted.shape[1])
        assert torch.equal(indices, wanted.long())


def test_quality_by_dynamics(data: dict[str, Tensor]) -> None:
    names = [m for m in (re.fullmatch(r"quality_bin_means_(\d+)", n) for n in data) if m]
    assert names
    for match in names:
        means, quality = devil.quality_by_dynamics(
            data["dynamic_score"], data["quality"], bins=int(match[1]), mode="devil"
        )
        torch.testing.assert_close(means, data[match[0]], **TOLERANCE)
        torch.testing.assert_close(quality, data["dynamics_based_quality"], **TOLERANCE)


def test_range_and_controllability(data: dict[str, Tensor]) -> None:
    scores = data["dynamic_score"]
    torch.testing.assert_close(devil.dynamics_range(scores), data["dynamics_range_p99_p1"], **TOLERANCE)
    torch.testing.assert_close(
        devil.controllability(scores, data["prompt_grade"]), data["controllability"], **TOLERANCE
    )
