"""VBench's dimensions on videos whose scores are known, with networks that can be computed by hand."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdm_env.metrics import vbench
from vdm_env.metrics.flow import MidpointWarp
from vdm_env.metrics.temporal import motion_smoothness
from vdm_env.metrics.vbench_networks import (
    LinearAesthetic,
    load_aesthetic_v1,
    load_clip_b32,
    load_dino,
)
from vdm_env.metrics.vbench_scores import QUALITY, group_score, mean_score, quality_score
from vdm_env.rewards.aesthetic import LinearAestheticHead
from vdm_env.rewards.loading import RewardContext


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def turning(degrees: list[float]) -> Tensor:
    """Unit features [F,2] at these angles."""
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_missing_dimensions() -> None:
    raw = {name: scale.high for name, scale in QUALITY.items()}
    assert quality_score(raw) == pytest.approx(1)
    del raw["motion smoothness"]
    with pytest.raises(ValueError, match="motion smoothness.*leave_out"):
        quality_score(raw)
    assert quality_score(raw, missing="leave_out") == pytest.approx(1)
    zero = (5.5 + -0.706 / (0.9975 - 0.706)) / 6.5
    assert quality_score(raw, missing="zero") == pytest.approx(zero)
    assert zero < 0.5
    with pytest.raises(ValueError, match="unknown dimensions"):
        group_score({"beauty": 1.0}, QUALITY, missing="leave_out")
    with pytest.raises(ValueError, match="not finite"):
        quality_score({**raw, "motion smoothness": float("nan")})
    with pytest.raises(ValueError, match="no dimension"):
        quality_score({}, missing="leave_out")


def test_mean_score() -> None:
    assert mean_score([0.0, 1.0]) == 0.5
    assert mean_score([0.0, 1.0], [1, 3]) == 0.75
    with pytest.raises(ValueError, match="counts"):
        mean_score([0.0, 1.0], [1])


def test_consistency_by_hand() -> None:
    # 0, 60, 120 degrees: frame 1: (1/2 + 1/2) / 2; frame 2: cos 60 to the one before, cos 120 clipped to the first.
    features = turning([0, 60, 120])
    seen: list[Tensor] = []

    def network(frames: Tensor) -> Tensor:
        seen.append(frames)
        return features[: len(frames)] if len(frames) == 3 else features[len(seen) - 1][None]

    video = noise(1, 3, 3, 10, 20)
    assert vbench.subject_consistency(video, network).item() == pytest.approx((0.5 + 0.25) / 2)
    assert seen[0].shape == (3, 3, 224, 448)
    seen.clear()
    assert vbench.background_consistency(video, network, chunk_size=1).item() == pytest.approx((0.5 + 0.25) / 2)
    assert [tuple(frames.shape) for frames in seen] == [(1, 3, 224, 224)] * 3


@pytest.mark.parametrize(("moving_pairs", "moves"), [(0, 0.0), (1, 0.0), (2, 1.0)])
def test_dynamic_degree(moving_pairs: int, moves: float) -> None:
    """8 frames of 64 px: two pairs must have more than 1.5 px in their fastest 5 %."""
    video = torch.zeros(1, 8, 3, 64, 80)

    def flow(first: Tensor, second: Tensor) -> Tensor:
        field = torch.zeros(len(first), 2, 64, 80)
        field[:moving_pairs, 0, :4] = 1.6  # 4 of 64 rows: 6.25 % of the pixels
        return field

    assert vbench.motion_limits(64, 80, 8) == (1.5, 2)
    assert vbench.dynamic_degree(video, flow).item() == moves
    assert vbench.dynamic_degree(video.repeat_interleave(3, 1), flow, fps=24).item() == moves


def test_two_frames_must_move_to_count_as_moving() -> None:
    video = torch.zeros(1, 2, 3, 64, 64)

    def still(first: Tensor, second: Tensor) -> Tensor:
        return torch.zeros(len(first), 2, 64, 64)

    assert vbench.dynamic_degree(video, still).item() == 0
    assert vbench.dynamic_degree(video, still, at_least_one=False).item() == 1


def test_aesthetic_and_imaging_scales() -> None:
    video = noise(2, 3, 3, 8, 8)
    scores = torch.arange(6.0)
    assert vbench.aesthetic_quality(video, lambda x: scores).tolist() == pytest.approx([0.1, 0.4])
    assert vbench.imaging_quality(video, lambda x: 10 * scores).tolist() == pytest.approx([0.1, 0.4])
    head = LinearAestheticHead(2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 4.0]]))
        head.bias.fill_(1.0)
    predictor = LinearAesthetic(lambda x: torch.tensor([[6.0, 8.0]]), head)  # unit: 0.6, 0.8
    assert predictor(torch.zeros(1, 3, 4, 4)).item() == pytest.approx(6.0)


def test_imaging_stand_in_prefers_sharp_and_clean() -> None:
    edges = torch.zeros(1, 3, 32, 32)
    edges[..., 8:24, 8:24] = 1
    blurred = nn.functional.avg_pool2d(edges, 5, 1, 2)
    assessor = vbench.SharpnessAndNoise()
    sharp, soft = assessor(edges).item(), assessor(blurred).item()
    noisy = assessor(blurred + 0.05 * torch.randn(edges.shape, generator=torch.Generator().manual_seed(0))).item()
    assert 100 >= sharp > soft > noisy >= 0
    assert assessor(torch.full((1, 3, 8, 8), 0.5)).item() == pytest.approx(0)


def test_overall_consistency_picks_the_middle_frames() -> None:
    video = torch.arange(16.0).view(1, 16, 1, 1, 1).expand(2, 16, 3, 4, 4)
    seen = []

    def viclip(frames: Tensor, prompts: list[str]) -> Tensor:
        seen.append((frames[0, :, 0, 0, 0].tolist(), prompts))
        return torch.ones(len(frames))

    assert vbench.overall_consistency(video, ["a", "b"], viclip).tolist() == [1, 1]
    assert seen == [([0, 2, 4, 6, 8, 10, 12, 14], ["a", "b"])]


def test_smoothness_with_an_interpolator() -> None:
    """Of a picture that moves 2 px a frame, a mean of neighbours is wrong and motion compensation right."""
    wide = noise(1, 3, 6, 40, seed=1)
    video = torch.stack([wide[..., 10 - 2 * f : 30 - 2 * f] for f in range(3)], 1)

    def flow(first: Tensor, second: Tensor) -> Tensor:  # two frames apart: 4 px to the right, whichever comes first
        field = torch.zeros(len(first), 2, 6, 20)
        field[:, 0] = 4.0 if torch.equal(first, video[:, 0]) else -4.0
        return field

    plain = motion_smoothness(video).item()
    compensated = motion_smoothness(video, MidpointWarp(flow))
    assert plain < 0.8 < compensated.item() < 1  # only columns that come in at the border differ
    middle = MidpointWarp(flow)(video[:, 0], video[:, 2])
    torch.testing.assert_close(middle[..., 2:-2], video[:, 1][..., 2:-2])
    with pytest.raises(ValueError, match="one frame a pair"):
        motion_smoothness(video, lambda a, b: a[:0])


def test_truncation_cuts_down_to_a_level() -> None:
    levels = torch.tensor([0.0, 100.0, 101.0]) / 255  # the mean of 0 and 101 is 50.5, cut to 50
    video = levels.view(1, 3, 1, 1, 1).expand(1, 3, 3, 2, 2)
    assert 255 * (1 - motion_smoothness(video)).item() == pytest.approx(49.5, abs=1e-3)
    assert 255 * (1 - motion_smoothness(video, truncate=True)).item() == pytest.approx(50, abs=1e-3)


@pytest.fixture(scope="module")
def tiny() -> vbench.VBenchNetworks:
    context = RewardContext(weights="random", scale="tiny")
    with pytest.warns(UserWarning, match="random weights"):
        return vbench.VBenchNetworks(
            dino=load_dino(context),
            clip=load_clip_b32(context),
            aesthetic=load_aesthetic_v1(context),
            imaging=vbench.SharpnessAndNoise(),
            flow=lambda a, b: torch.zeros(len(a), 2, *a.shape[2:]),
            interpolate=MidpointWarp(lambda a, b: torch.zeros(len(a), 2, *a.shape[2:])),
            viclip=lambda video, prompts: torch.full((len(video),), 0.2),
        )


def test_measure_names_what_stands_in(tiny: vbench.VBenchNetworks) -> None:
    video = noise(2, 4, 3, 12, 16)
    scores = vbench.measure(video, ["a", "b"], tiny)
    assert set(scores.raw) == {*QUALITY, "overall consistency"}
    assert all(values.shape == (2,) and bool(values.isfinite().all()) for values in scores.raw.values())
    assert set(scores.surrogates) == {"motion smoothness", "imaging quality"}
    assert "MUSIQ" in scores.surrogates["imaging quality"] and "AMT" in scores.surrogates["motion smoothness"]
    assert isinstance(quality_score(scores.means()), float)
    # A video's scores do not depend on the others, nor on the size of the chunks.
    alone = vbench.measure(video[1:], ["b"], tiny, chunk_size=3)
    for name, values in alone.raw.items():
        torch.testing.assert_close(values[0], scores.raw[name][1], msg=name)
    fewer = vbench.measure(video, ["a", "b"], vbench.VBenchNetworks())
    assert set(fewer.raw) == {"temporal flickering"} and not fewer.surrogates
    with pytest.raises(ValueError, match="prompts"):
        vbench.measure(video, ["a"], tiny)


def test_still_video_is_perfectly_consistent(tiny: vbench.VBenchNetworks) -> None:
    still = noise(1, 1, 3, 12, 16).expand(1, 4, 3, 12, 16)
    means = vbench.measure(still, ["a"], tiny).means()
    for name in ("subject consistency", "background consistency", "temporal flickering", "motion smoothness"):
        assert means[name] == pytest.approx(1, abs=1e-5), name
    assert means["dynamic degree"] == 0


def test_chunks_reach_every_network(tiny: vbench.VBenchNetworks) -> None:
    """No network sees more frames (pairs, or an eighth as many videos) than were asked for."""
    seen: dict[str, list[int]] = {}

    def counted(name: str, network: Any) -> Any:
        def call(first: Tensor, *rest: Any) -> Any:
            seen.setdefault(name, []).append(len(first))
            return network(first, *rest)

        return call

    networks = vbench.VBenchNetworks(
        **{field.name: counted(field.name, getattr(tiny, field.name)) for field in fields(tiny)}
    )
    video = noise(2, 7, 3, 12, 16)
    few = vbench.measure(video, ["a", "b"], networks, chunk_size=2)
    assert set(seen) == {field.name for field in fields(tiny)} and all(max(sizes) <= 2 for sizes in seen.values())
    assert seen["interpolate"] == [2, 2, 2] and seen["viclip"] == [1, 1]
    for name, values in vbench.measure(video, ["a", "b"], networks).raw.items():
        torch.testing.assert_close(few.raw[name], values, msg=name)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        motion_smoothness(video, chunk_size=0)
