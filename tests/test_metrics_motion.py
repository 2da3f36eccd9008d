"""Flow, EvalCrafter's and DEVIL's metrics where the answer is known in closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.metrics import devil, evalcrafter
from vdm_env.metrics.diversity import prompt_diversity, videomae_features
from vdm_env.metrics.flow import RaftFlow, load_raft, mean_speed, top_speed, warp
from vdm_env.metrics.fvd import frechet_distance, i3d_input, video_features
from vdm_env.rewards.action import build_action
from vdm_env.rewards.loading import RewardContext


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(u: float, v: float, *size: int) -> Tensor:
    return torch.stack([torch.full(size, float(u)), torch.full(size, float(v))], dim=-3)


def test_warp_moves_by_whole_and_half_pixels() -> None:
    image = noise(1, 3, 5, 7)
    whole = warp(image, uniform(2, 1, 1, 5, 7))
    torch.testing.assert_close(whole[..., :4, :5], image[..., 1:, 2:])
    assert torch.equal(whole[..., 4, 6], image[..., 4, 6])  # outside, the border goes on
    half = warp(image, uniform(0.5, 0, 1, 5, 7))
    torch.testing.assert_close(half[..., :6], (image[..., :6] + image[..., 1:]) / 2)
    with pytest.raises(ValueError, match="expected"):
        warp(image, uniform(0, 0, 1, 5, 6))


def test_speeds() -> None:
    flow = torch.zeros(1, 2, 10, 10)
    flow[0, 0, 0, :5], flow[0, 1, 0, :5] = 3, 4
    assert top_speed(flow).item() == 5
    assert top_speed(flow, 0.1).item() == 2.5
    assert top_speed(flow[..., :1, :1]).item() == 5  # at least one pixel
    assert mean_speed(torch.zeros(1, 2, 3, 10, 10), lambda a, b: flow).item() == pytest.approx(0.25)
    with pytest.raises(ValueError, match="flow returned"):
        mean_speed(torch.zeros(1, 2, 3, 10, 12), lambda a, b: flow)


def test_occlusion_of_uniform_motion() -> None:
    forward, backward = uniform(1, 0, 1, 8, 8), uniform(-1, 0, 1, 8, 8)
    assert not evalcrafter.occlusion(forward, backward).any()
    assert evalcrafter.occlusion(forward, forward).all()  # |2|^2 = 4 > 0.52
    forward[..., 4:] = 0  # an edge of the motion between columns 3 and 4
    backward[..., 4:] = 0
    mask = evalcrafter.occlusion(forward, backward)
    assert mask[0, :, 3].all() and not mask[0, :, :3].any() and not mask[0, :, 4:].any()


def test_warping_error_of_a_moved_picture_is_zero() -> None:
    wide = noise(1, 3, 16, 48, seed=3)
    video = torch.stack([wide[..., 2 * f : 2 * f + 40] for f in range(3)], 1)  # half size: 1 px to the left

    def flow(first: Tensor, second: Tensor) -> Tensor:
        forward = torch.equal(first[0], seen[0])
        return uniform(-1.0 if forward else 1.0, 0, len(first), 8, 20)

    half = torch.nn.functional.interpolate(video[0], scale_factor=0.5, mode="bilinear")
    for mode, factor in (("corrected", 1), ("evalcrafter", 255)):
        seen = half / factor
        error = evalcrafter.warping_error(video, flow, mode=mode).item()
        border = (half[:2, ..., 0] - half[1:, ..., 0]).square().sum((1, 2)) / (8 * 20)  # column 0 comes from outside
        assert error == pytest.approx(border.mean().item() / (3 if mode == "corrected" else 1), rel=1e-4)


def test_pairs_without_visible_pixels() -> None:
    first, second = noise(1, 3, 4, 4), noise(1, 3, 4, 4, seed=1)
    lost = uniform(9, 0, 1, 4, 4)
    assert evalcrafter.pair_warping_error(first, second, lost, lost).isnan().item()
    assert evalcrafter.pair_warping_error(first, second, lost, lost, mode="evalcrafter").item() == 0
    with pytest.raises(ValueError, match="mode"):
        evalcrafter.pair_warping_error(first, second, lost, lost, mode="old")


def test_clip_metrics_by_hand() -> None:
    features = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]])
    assert evalcrafter.clip_temp(features).item() == pytest.approx(0)
    assert evalcrafter.first_frame_consistency(features).item() == pytest.approx(-0.5)
    assert evalcrafter.clip_score(features, torch.tensor([[0.0, 5.0]])).item() == pytest.approx(1 / 3)
    frames = noise(2, 3, 6, 6)
    raw = evalcrafter.clip_input(frames, 6, mode="evalcrafter")
    torch.testing.assert_close(raw, 255 * frames)
    assert evalcrafter.clip_input(frames, 6).abs().max() < 3
    assert evalcrafter.frame_features(frames[None], lambda x: x.flatten(1), side=4).shape == (1, 2, 48)


def test_action_score_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2]])
    labels, action = torch.eye(3), torch.tensor([[0.6, 0.0, 0.8]])
    assert evalcrafter.action_score(probabilities, labels, action).item() == pytest.approx(0.5 * 0.6 + 0.2 * 0.8)
    assert evalcrafter.action_score(probabilities, labels, action, top=2).item() == pytest.approx(0.3)


def test_motion_recognised() -> None:
    video = torch.zeros(2, 2, 3, 4, 4)

    def flow(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([uniform(6, 0, 1, 4, 4), uniform(4, 0, 1, 4, 4)])

    assert evalcrafter.motion_recognised(video, flow, ["large", "slow"]).tolist() == [1, 1]
    assert evalcrafter.motion_recognised(video, flow, ["slow", "slow"]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="large"):
        evalcrafter.motion_recognised(video, flow, ["fast", "slow"])


def test_score_sums() -> None:
    assert evalcrafter.temporal_consistency_score(1, 0, 1) == pytest.approx(500 * 0.13255375)
    assert evalcrafter.motion_quality_score(1, 0, 100) == pytest.approx(500 * (0.12975620 - 0.01641512 - 0.10517075))
    assert evalcrafter.visual_quality_score(100, 0, 0) == pytest.approx(500 * (0.03004555 + 0.08707463))


def test_raft_pads_and_refuses_small_images() -> None:
    class Recorder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, first: Tensor, second: Tensor, num_flow_updates: int) -> list[Tensor]:
            self.seen = first, num_flow_updates
            return [first[:, :2] * 0, first[:, :2]]

    model = Recorder()
    image = noise(1, 3, 130, 133)
    flow = RaftFlow(model, updates=7)(image, image)
    assert model.seen[0].shape == (1, 3, 136, 136) and model.seen[1] == 7
    torch.testing.assert_close(flow, 2 * image[:, :2] - 1)  # [-1,1], and the padding cut off where it was put
    with pytest.raises(ValueError, match="enlarge"):
        RaftFlow(model)(image[..., :100], image[..., :100])


def test_raft_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="random"):
        flow = load_raft(RewardContext(weights="random"), small=True, updates=1)
    image = noise(1, 3, 128, 128)
    assert flow(image, image.flip(-1)).shape == (1, 2, 128, 128)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "cache"))
    context = RewardContext(folder=tmp_path)
    with pytest.raises(MissingWeightsError, match="raft_small_C_T_V2.*curl"):
        load_raft(context, small=True)
    path = tmp_path / "raft_small_C_T_V2-01064c6d.pth"
    torch.save(flow.model.state_dict(), path)
    again = load_raft(context, small=True, updates=1)
    assert torch.equal(again(image, image.flip(-1)), flow(image, image.flip(-1)))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptWeightsError):
        load_raft(context, small=True)


def test_devil_distances() -> None:
    still = noise(1, 5).expand(16, 5)
    for measure in (devil.dino_variation, devil.dino_segment_distance, devil.segment_distance):
        assert measure(still).item() == pytest.approx(0, abs=1e-6)
    turns = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert devil.dino_variation(turns).item() == pytest.approx(1 - 0.5**0.5)
    assert devil.dino_segment_distance(turns).item() == pytest.approx((1 + 0 + 1) / 3)  # 4 frames: lags 1, 2, 3
    assert devil.segment_distance(turns).item() == pytest.approx(1 - 2 / 6)
    assert devil.segment_distance(turns, mode="devil").item() == pytest.approx(1 - 6 / 10)
    assert devil.segment_distance(turns[:1]).item() == 0
    with pytest.raises(ValueError, match="larger ratio"):
        devil.segment_indices(3, 0.25)
    assert devil.segment_indices(32, 0.5, length=4).tolist() == [[0, 5, 10, 15], [16, 21, 26, 31]]


def test_devil_scores() -> None:
    scores, grades = torch.tensor([0.1, 0.2, 0.9, 0.9]), torch.tensor([0, 1, 1, 4])
    # 0: all three pairs; 1: with 0 and 3; 2: with 0, tied with 3; 3: with 0 and 1, tied with 2.
    assert devil.controllability(scores, grades).item() == pytest.approx((1 + 1 + 1 / 2 + 2 / 3) / 4)
    with pytest.raises(ValueError, match="two grades"):
        devil.controllability(scores, torch.zeros(4))
    assert devil.dynamics_range(torch.linspace(0, 1, 101)).item() == pytest.approx(0.98)


def test_quality_by_dynamics() -> None:
    scores, quality = torch.tensor([0.1, 0.2, 0.4, 1.0]), torch.tensor([1.0, 0.5, 0.3, 0.9])
    means, mean = devil.quality_by_dynamics(scores, quality, bins=3)
    assert means[:2].tolist() == pytest.approx([0.75, 0.3]) and means[2].item() == pytest.approx(0.9)
    assert mean.item() == pytest.approx((0.75 + 0.3 + 0.9) / 3)
    published, lower = devil.quality_by_dynamics(scores, quality, bins=3, mode="devil")
    assert published.tolist() == pytest.approx([0.75, 0.3, 0.0]) and lower.item() == pytest.approx(0.35)
    some, average = devil.quality_by_dynamics(scores[:3], quality[:3], bins=3)
    assert some[2].isnan() and average.item() == pytest.approx(0.525)
    assert devil.thirds(means) == pytest.approx((0.75, 0.3, 0.9))
    with pytest.raises(ValueError, match="in \\[0,1\\]"):
        devil.quality_by_dynamics(scores + 1, quality)


def test_dynamics_score() -> None:
    parts = {name: torch.tensor([0.1, 2.0]) for level in devil.LEVELS.values() for name in level}
    regressions = {
        level: devil.Regression(weights=(1.0,) * len(names), intercept=0.1) for level, names in devil.LEVELS.items()
    }
    expected = [(0.4 + 0.3 + 0.3) / 3, 1.0]  # clipped to 1
    assert devil.dynamics_score(parts, regressions).tolist() == pytest.approx(expected)
    del parts["ssim"]
    with pytest.raises(ValueError, match="ssim"):
        devil.dynamics_score(parts, regressions)


def test_diversity_over_prompts() -> None:
    features = torch.tensor([[0.0], [2.0], [5.0], [5.0]])
    assert prompt_diversity(features, ["a", "a", "b", "b"]).item() == 1
    assert prompt_diversity(features[[0, 2, 1, 3]], ["a", "b", "a", "b"]).item() == 1
    with pytest.raises(ValueError, match="too few"):
        prompt_diversity(features, ["a", "a", "a", "b"])


def test_videomae_features() -> None:
    with pytest.warns(UserWarning, match="random"):
        action = build_action(RewardContext(weights="random", scale="tiny"))
    video = noise(3, 10, 3, 24, 24)
    features = videomae_features(video, action)
    assert features.shape == (3, 32) and not features.requires_grad
    torch.testing.assert_close(videomae_features(video, action, chunk_size=2), features)
    # The network's own classifier on the mean over tokens gives its logits, so these are the features it uses.
    network = action.model
    torch.testing.assert_close(network.classifier(network.fc_norm(features)), action.logits(video).detach())


def test_video_features_feed_the_frechet_distance() -> None:
    real, fake = noise(6, 4, 3, 8, 8), noise(6, 4, 3, 8, 8, seed=1) * 0.5

    def network(pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3, 4))

    sets = [video_features(videos, network, lambda v: i3d_input(v, 8), chunk_size=4) for videos in (real, fake)]
    torch.testing.assert_close(sets[0], 2 * real.mean((1, 3, 4)) - 1)
    assert frechet_distance(*sets).item() > 0.5 > frechet_distance(sets[0], sets[0]).item()
    with pytest.raises(ValueError, match="expected"):
        video_features(real, lambda x: x, lambda v: i3d_input(v, 8))
