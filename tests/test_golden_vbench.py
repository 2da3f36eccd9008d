"""VBench's arithmetic and pre-processing against recorded numbers; sizes and cases are read from the files."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import golden_json, golden_tensors
from tests.golden_numbers import stride
from vdm_env.metrics import vbench
from vdm_env.metrics.flow import top_speed
from vdm_env.metrics.temporal import average, frame_consistency, motion_smoothness, temporal_flicker
from vdm_env.metrics.vbench_scores import (
    IMAGE_TO_VIDEO,
    IMAGE_TO_VIDEO_QUALITY,
    QUALITY,
    QUALITY_WEIGHT,
    SEMANTIC,
    SEMANTIC_WEIGHT,
    normalise,
    quality_score,
    semantic_score,
    total_score,
)

pytestmark = pytest.mark.golden
SET = "rewards_vbench"
ABS = 1e-6


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return golden_json(SET, "values.json")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return golden_tensors(SET, "fixture.safetensors")


def named(found: Any, pattern: str) -> list[tuple[re.Match[str], str]]:
    """Names that fit, with what they say about sizes; at least one."""
    hits = [(match, name) for name in found if (match := re.fullmatch(pattern, name))]
    assert hits, f"nothing is called {pattern}"
    return hits


def video_of(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["video_uint8_thwc"].permute(0, 3, 1, 2)[None].double() / 255


def test_ranges_and_weights(values: dict[str, Any]) -> None:
    for ours, listed, ranges, weights in (
        (QUALITY, "quality_list", "normalize", "dim_weight"),
        (SEMANTIC, "semantic_list", "normalize", "dim_weight"),
        (IMAGE_TO_VIDEO, "i2v_list", "i2v_normalize", "i2v_dim_weight"),
        (IMAGE_TO_VIDEO_QUALITY, "i2v_quality_list", "i2v_normalize", "i2v_dim_weight"),
    ):
        assert set(ours) == set(values[listed])
        for name, scale in ours.items():
            limits = values[ranges][name]
            assert (scale.low, scale.high, scale.weight) == (limits["Min"], limits["Max"], values[weights][name])
    assert (QUALITY_WEIGHT, SEMANTIC_WEIGHT) == (values["quality_weight"], values["semantic_weight"])
    assert values["i2v_weight"] == values["i2v_quality_weight"]


def test_example(values: dict[str, Any]) -> None:
    raw = values["example_raw"]
    scales = {**QUALITY, **SEMANTIC}
    weighted = {name: value * scales[name].weight for name, value in normalise(raw, scales).items()}
    assert weighted == pytest.approx(values["example_normalised_times_weight"], abs=ABS)
    quality, semantic = quality_score(raw), semantic_score(raw)
    assert quality == pytest.approx(values["example_quality"], abs=ABS)
    assert semantic == pytest.approx(values["example_semantic"], abs=ABS)
    assert total_score(quality, semantic) == pytest.approx(values["example_total"], abs=ABS)


def test_flicker(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    video = video_of(tensors)
    assert temporal_flicker(video).item() == pytest.approx(values["temporal_flickering"], abs=ABS)
    pairs = [255 * (1 - temporal_flicker(video[:, i : i + 2])) for i in range(video.shape[1] - 1)]
    torch.testing.assert_close(torch.cat(pairs).float(), tensors["flicker_mae_per_pair"], rtol=0, atol=1e-5)


def test_consistency(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    score = frame_consistency(tensors["frame_features"][None]).item()
    for name in ("subject_consistency_from_features", "background_consistency_from_features"):
        assert score == pytest.approx(values[name], abs=ABS)
    # The same through the functions that take videos, the network looking the features up.
    video = torch.rand(1, len(tensors["frame_features"]), 3, 30, 40, generator=torch.Generator().manual_seed(0))
    for measure in (vbench.subject_consistency, vbench.background_consistency):
        assert measure(video, lambda frames: tensors["frame_features"]).item() == pytest.approx(score, abs=ABS)


def test_smoothness_with_truncation(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    expected = values["motion_smoothness_with_average_interpolator"]
    for video in (video_of(tensors), video_of(tensors).float()):
        assert motion_smoothness(video, average, truncate=True).item() == pytest.approx(expected, abs=ABS)


def test_dynamic_degree(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    flow = tensors["flow"]
    fast = top_speed(flow)
    torch.testing.assert_close(fast, torch.tensor(values["dynamic_degree_top5pct_mean_radius"]), rtol=0, atol=1e-5)
    for match, name in named(values, r"dynamic_params_h(\d+)_w(\d+)_n(\d+)"):
        pixels, pairs = vbench.motion_limits(*map(int, match.groups()), at_least_one=False)
        assert pixels == pytest.approx(values[name]["thres"], abs=ABS)
        assert pairs == values[name]["count_num"]
    for _, name in named(values, r"dynamic_check_move_\w+"):  # of this flow
        video = torch.zeros(1, len(flow) + 1, 3, *flow.shape[2:])
        moves = vbench.dynamic_degree(video, lambda a, b: flow, at_least_one=False)
        assert bool(moves.item()) == values[name]


def test_middle_frames(values: dict[str, Any]) -> None:
    for name, frames in values["middle_frame_indices"].items():
        count, total = map(int, name.split("_of_"))
        assert vbench.middle_frames(count, total).tolist() == frames


@pytest.mark.parametrize(("prefix", "prepare"), [("clip", vbench.clip_input), ("dino", vbench.dino_input)])
def test_inputs(tensors: dict[str, Tensor], prefix: str, prepare: Any) -> None:
    frames = tensors["video_uint8_thwc"].permute(0, 3, 1, 2).float() / 255
    for _, name in named(tensors, prefix + r"_transform_\w+"):
        wanted = tensors[name]
        side = min(wanted.shape[-2:])
        torch.testing.assert_close(prepare(frames[: len(wanted)], side), wanted, rtol=0, atol=1e-5)


def test_imaging_input(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    frames = tensors["imaging_input"].float() / 255
    prepared = vbench.imaging_input(frames)
    for _, name in named(values, r"imaging_quality_longer_out_shape_\w+"):
        assert list(prepared.shape) == values[name]
    for _, name in named(tensors, r"imaging_longer_every_\w+"):
        step = stride(name, prepared.shape[-1], tensors[name].shape[-1])
        torch.testing.assert_close(prepared[..., ::step, ::step], tensors[name], rtol=0, atol=1e-5)
