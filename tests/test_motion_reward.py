"""The motion reward with flows worked out by hand, RAFT against torchvision's forward pass, and the released file."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.optical_flow import Raft_Large_Weights, raft

from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.rewards import REWARDS, RewardContext
from vdm_env.rewards.motion import MotionReward, RaftFlow, fit, tiny_raft, upsampled

PROMPTS = ["a", "b"]
FILE = Raft_Large_Weights.C_T_V2.url.rsplit("/", 1)[1]


def build(**changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        context = RewardContext(**({"weights": "random", "scale": "tiny", "seed": 5} | changes))
        return REWARDS["Motion"].build(context)


def videos(frames: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, frames, 3, 32, 48, generator=generator, dtype=torch.float64).to(dtype)


class BrightnessFlow:
    """Moves right by three and down by four pixels times the rise of the mean brightness; sides of multiples of 8."""

    multiple, least = 8, 64

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        rise = (second - first).mean((1, 2, 3)).view(-1, 1, 1, 1)
        return rise * torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(len(first), 2, *first.shape[-2:])


def test_score_of_a_known_flow() -> None:
    """32 x 48 becomes 64 x 96: displacements halve on the way back; 256 / 32 = 8 reference pixels to one."""
    level = torch.tensor([0.0, 0.2, 0.8]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 32, 48)
    expected = (5 * 0.2 + 5 * 0.6) / 2 / 2 * 8
    for measure in ("mean", "top"):
        score = MotionReward(BrightnessFlow(), measure=measure)(level, ["a"])
        torch.testing.assert_close(score, torch.tensor([expected]), rtol=1e-4, atol=1e-3)
    still = MotionReward(BrightnessFlow(), sign=-1)
    assert still.range == (-math.inf, 0.0) and float(still(level, ["a"])) == pytest.approx(-expected, abs=1e-3)
    pixels = torch.zeros(1, 2, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(MotionReward(BrightnessFlow())(pixels, ["a"]).sum(), pixels)
    assert bool(torch.isfinite(gradient).all()), "a still video has a gradient"


def test_top_is_the_fastest_twentieth() -> None:
    class Corner(BrightnessFlow):
        def __call__(self, first: Tensor, second: Tensor) -> Tensor:
            flow = torch.zeros(len(first), 2, *first.shape[-2:])
            flow[:, 0].flatten(1)[:, : first[0, 0].numel() // 20] = 7.0
            return flow

    video = torch.zeros(1, 2, 3, 64, 64)
    assert float(MotionReward(Corner(), measure="top")(video, ["a"])) == pytest.approx(7 * 4, rel=1e-4)
    assert float(MotionReward(Corner())(video, ["a"])) == pytest.approx(7 * 4 * 204 / 4096, abs=0.01)


def test_sizes() -> None:
    flow = BrightnessFlow()
    assert fit(64, 64, flow) == (64, 64) and fit(100, 130, flow) == (96, 128) and fit(20, 40, flow) == (64, 128)


@pytest.mark.parametrize("updates", [1, 3])
def test_raft_equals_torchvision(updates: int) -> None:
    torch.manual_seed(0)
    network = tiny_raft().eval()
    first, second = videos()[0, :2, None].unbind(0)
    with torch.no_grad():
        expected = network(first * 2 - 1, second * 2 - 1, num_flow_updates=updates)[-1]
        found = RaftFlow(network, num_updates=updates)(first, second)
    assert float(expected.abs().mean()) > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_upsampling_equals_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    flow, mask = torch.randn(2, 2, 4, 6, generator=generator), torch.randn(2, 576, 4, 6, generator=generator)
    from torchvision.models.optical_flow._utils import upsample_flow

    for weights in (mask, None):
        torch.testing.assert_close(upsampled(flow, weights), upsample_flow(flow, weights), rtol=1e-5, atol=1e-5)


def test_gradient_goes_through_all_updates() -> None:
    """The derivative along a direction; with the cut that torchvision makes it would be another number."""
    reward = build(dtype=torch.float64)
    reward.flow.num_updates = 3
    video = videos(2, torch.float64).requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(video, PROMPTS).sum(), video)
    direction = torch.randn(video.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h = 1e-8
    with torch.no_grad():
        ends = [reward(video + s * h * direction, PROMPTS).sum() for s in (1, -1)]
    numeric = (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-5)


def test_chunks_prompts_and_single_frames() -> None:
    reward, chunked = build(), build()
    chunked.chunk_size = 1
    torch.testing.assert_close(chunked(videos(), PROMPTS), reward(videos(), PROMPTS), rtol=1e-4, atol=1e-4)
    assert torch.equal(reward(videos(), PROMPTS), reward(videos(), PROMPTS[::-1]))
    assert not reward.flow.network.corr_block.corr_pyramid, "the correlations are let go"
    with pytest.raises(ValueError, match="neighbouring frames, got a video of one"):
        reward(videos()[:, :1], PROMPTS)
    with pytest.raises(ValueError, match="measure='median'"):
        MotionReward(BrightnessFlow(), measure="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_updates=0"):
        RaftFlow(tiny_raft(), num_updates=0)


def test_released_file_loads_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked for in the folder, then where torchvision keeps it; names and shapes are torchvision's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no_cache"))
    monkeypatch.setattr("torchvision.models.optical_flow.raft_large", lambda weights: tiny_raft())
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(MissingWeightsError, match=rf"{FILE}.*pytorch/vision.*vdm-env download Motion"):
        REWARDS["Motion"].build(RewardContext())
    torch.manual_seed(3)
    state = tiny_raft().state_dict()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / FILE)
    assert all(
        torch.equal(a, state[k]) for k, a in REWARDS["Motion"].build(RewardContext()).flow.network.state_dict().items()
    )
    folder = tmp_path / "mine"
    folder.mkdir()
    name = next(iter(state))
    for change, message in (
        ({"extra": torch.zeros(1)}, "unexpected: extra"),
        ({name: torch.zeros(7)}, r"\[7\] instead of"),
    ):
        torch.save(state | change, folder / FILE)
        with pytest.raises(CorruptWeightsError, match=message):
            REWARDS["Motion"].build(RewardContext(folder=folder))
    torch.save({k: v for k, v in state.items() if k != name}, folder / FILE)
    with pytest.raises(CorruptWeightsError, match=f"missing: {name}"):
        REWARDS["Motion"].build(RewardContext(folder=folder))


def test_the_real_architecture_is_torchvisions() -> None:
    with torch.device("meta"):
        network = raft.raft_large(weights=None)
    assert RaftFlow(network).least == 128
