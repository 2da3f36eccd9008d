"""EvalCrafter's temporal and motion arithmetic against recorded numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.golden import golden_tensors
from vdm_env.metrics import evalcrafter
from vdm_env.metrics.flow import mean_speed, warp

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return golden_tensors("rewards_evalcrafter", "fixture.safetensors")


def test_warp_and_occlusion(data: dict[str, Tensor]) -> None:
    torch.testing.assert_close(warp(data["img2"], data["flow_fw"]), data["warped_img2"], rtol=0, atol=1e-5)
    mask = evalcrafter.occlusion(data["flow_fw"], data["flow_bw"])
    assert torch.equal(mask[0], data["occlusion_mask"].bool())
    assert 0 < mask.sum() < mask.numel()


def test_pair_warping_error(data: dict[str, Tensor]) -> None:
    inputs = [data[name] for name in ("img1", "img2", "flow_fw", "flow_bw")]
    published = evalcrafter.pair_warping_error(*inputs, mode="evalcrafter")
    torch.testing.assert_close(published[0], data["pair_warping_error"], rtol=0, atol=1e-5)
    torch.testing.assert_close(evalcrafter.pair_warping_error(*inputs), published / 3)


def test_flow_score(data: dict[str, Tensor]) -> None:
    video = torch.stack([data["img1"][0], data["img2"][0]])[None]
    score = mean_speed(video, lambda a, b: data["flow_fw"])
    torch.testing.assert_close(score[0], data["mean_flow_magnitude"], rtol=0, atol=1e-5)


def test_clip_scores(data: dict[str, Tensor]) -> None:
    features = data["per_frame_clip_features"][None]
    torch.testing.assert_close(evalcrafter.clip_temp(features)[0], data["clip_temp_score"], rtol=0, atol=1e-5)
    first = evalcrafter.first_frame_consistency(features)[0]
    torch.testing.assert_close(first, data["face_consistency_score"], rtol=0, atol=1e-5)
