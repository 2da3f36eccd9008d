"""How much a video moves: optical flow between neighbouring frames by RAFT, exact gradients included.

    score = mean over pairs of frames of  mean over pixels |flow|          (EvalCrafter's flow score)
                                     or   mean of the largest 5 % |flow|   (the radius of VBench's dynamic degree)

in pixels a frame of a video whose short side has 256 pixels, so that sizes can be compared. It grows without bound and
says nothing of quality: combine it with a reward that does, or the policy learns to shake the camera.

Source: Teed and Deng 2020, arXiv:2003.12039, by torchvision's networks and weights.
Deviation: torchvision cuts the gradient between the updates of the flow, which is right for training RAFT; here the
gradient goes through all of them, because it is the score's own derivative that is wanted.
Deviation: |flow| is smooth at 0, sqrt(u^2 + v^2 + 1e-6), so that a still video has a gradient.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm_env.errors import MissingWeightsError
from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.loading import (
    RewardContext,
    find_files,
    frozen,
    load_strictly,
    published,
    read_tensors,
    seeded,
    warn_random,
)
from vdm_env.rewards.preprocess import resize
from vdm_env.rewards.tensors import at_least_float32, in_chunks

NAME = "Motion"
REFERENCE_SIDE = 256
"""short side of the video in whose pixels the score counts"""
_REPOSITORY = "pytorch/vision"
_LEAST = 1e-6


class Flow(Protocol):
    """An optical flow network. `multiple` and `least`: sides of its frames are multiples of it, and at least that."""

    multiple: int
    least: int

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Displacements [N,2,H,W], right and down, in pixels, of frames [N,3,H,W] in [0,1]."""
        ...


class RaftFlow(nn.Module):
    """A `torchvision.models.optical_flow.RAFT`, differentiable through all updates and at home in any float type.

    The correlations and the flow itself are float32 or better: half precision has too few digits for coordinates.

    Args:
        network: the network.
        num_updates: refinements of the flow, at least 1.

    Raises:
        ValueError: num_updates is below 1.
    """

    multiple = 8

    def __init__(self, network: Any, *, num_updates: int = 12) -> None:
        super().__init__()
        if num_updates < 1:
            raise ValueError(f"num_updates={num_updates}: expected at least 1")
        self.network: Any = network
        self.num_updates = num_updates
        self.least = 8 * 2**network.corr_block.num_levels

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        net = self.network
        dtype = next(net.parameters()).dtype
        images = (torch.cat([first, second]) * 2 - 1).to(dtype)
        ahead, behind = at_least_float32(net.feature_encoder(images)).chunk(2)
        correlation = net.corr_block
        correlation.build_pyramid(ahead, behind)
        size = net.update_block.hidden_state_size
        context = net.context_encoder(images[: len(first)])
        hidden, context = torch.tanh(context[:, :size]), F.relu(context[:, size:])
        rows, columns = (torch.arange(n, dtype=ahead.dtype, device=ahead.device) for n in ahead.shape[-2:])
        start = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))[None].expand(len(first), -1, -1, -1)
        flow = torch.zeros_like(start)
        for _ in range(self.num_updates):
            seen = correlation.index_pyramid(centroids_coords=start + flow)
            hidden, change = net.update_block(hidden, context, seen.to(dtype), flow.to(dtype))
            flow = flow + change.to(flow.dtype)
        correlation.corr_pyramid = []  # it is large, and holds the graph
        mask = None if net.mask_predictor is None else at_least_float32(net.mask_predictor(hidden))
        return upsampled(flow, mask)


def upsampled(flow: Tensor, mask: Tensor | None) -> Tensor:
    """Flow [N,2,h,w] in cells of 8 pixels to [N,2,8h,8w] in pixels.

    `mask` [N,8*8*9,h,w] weighs the 3 x 3 cells around each pixel, by its softmax; bilinear without it.
    """
    if mask is None:
        return 8 * F.interpolate(flow, scale_factor=8, mode="bilinear", align_corners=True)
    batch, _, height, width = flow.shape
    weights = mask.view(batch, 1, 9, 8, 8, height, width).softmax(2)
    around = F.unfold(8 * flow, kernel_size=3, padding=1).view(batch, 2, 9, 1, 1, height, width)
    return (weights * around).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, 8 * height, 8 * width)


class MotionReward:
    """Mean motion of a video, in pixels a frame of a 256-pixel video. The prompt does not matter.

    Args:
        flow: the network; any `Flow`.
        measure: "mean" over all pixels, or "top" for the fastest 5 %.
        sign: 1 rewards motion, -1 stillness.
        frames: frame policy; neighbours among the frames that it leaves are compared.
        chunk_size: pairs of frames the network sees at a time; None: all.

    Raises:
        ValueError: an unknown measure or sign.
    """

    differentiable = True
    name = NAME

    def __init__(
        self,
        flow: Flow,
        *,
        measure: Literal["mean", "top"] = "mean",
        sign: int = 1,
        frames: FramePolicy = "all",
        chunk_size: int | None = None,
    ) -> None:
        if measure not in ("mean", "top") or sign not in (-1, 1):
            raise ValueError(f"measure={measure!r}, sign={sign}: expected 'mean' or 'top', and 1 or -1")
        self.flow, self.measure, self.sign = flow, measure, sign
        self.frames, self.chunk_size = frames, chunk_size
        self.range = (0.0, math.inf) if sign > 0 else (-math.inf, 0.0)

    def _speed(self, first: Tensor, second: Tensor) -> Tensor:
        """Of pairs [N,3,H,W], [N]."""
        height, width = first.shape[-2:]
        rows, columns = fit(height, width, self.flow)
        flow = self.flow(resize(first, rows, columns, "bilinear"), resize(second, rows, columns, "bilinear"))
        scale = torch.tensor([width / columns, height / rows], dtype=flow.dtype, device=flow.device).view(1, 2, 1, 1)
        radius = ((flow * scale).square().sum(1) + _LEAST).sqrt().flatten(1) * (REFERENCE_SIDE / min(height, width))
        if self.measure == "top":
            radius = radius.topk(max(1, radius.shape[1] // 20), dim=1).values
        return radius.mean(1)

    def check_num_frames(self, count: int) -> None:
        """Raises ValueError for a single frame."""
        if count < 2:
            raise ValueError(
                f"reward {self.name!r} compares neighbouring frames, got a video of one; decode at least two "
                "(decode_frames='all')"
            )

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        self.check_num_frames(video.shape[1])
        pixels = at_least_float32(video)
        pairs = pixels[:, :-1].flatten(0, 1), pixels[:, 1:].flatten(0, 1)
        speeds = in_chunks(self._speed, *pairs, size=self.chunk_size).unflatten(0, (len(video), -1))
        return self.sign * at_least_float32(speeds).mean(1)


def fit(height: int, width: int, flow: Flow) -> tuple[int, int]:
    """Size of the frames for the flow network: as they are, or larger with about the same aspect."""
    scale = max(1.0, flow.least / min(height, width))
    rows, columns = (max(flow.least, round(side * scale / flow.multiple) * flow.multiple) for side in (height, width))
    return rows, columns


def tiny_raft() -> Any:
    """A RAFT of a few thousand weights, of torchvision's parts, for frames of at least 32 pixels."""
    from torchvision.models.optical_flow import raft

    corr = raft.CorrBlock(num_levels=2, radius=1)
    motion = raft.MotionEncoder(
        in_channels_corr=corr.out_channels, corr_layers=(16,), flow_layers=(16, 8), out_channels=16
    )
    recurrent = raft.RecurrentBlock(input_size=16 + 8, hidden_size=8, kernel_size=(3,), padding=(1,))
    update = raft.UpdateBlock(
        motion_encoder=motion, recurrent_block=recurrent, flow_head=raft.FlowHead(in_channels=8, hidden_size=16)
    )
    layers = (8, 8, 8, 16, 16)
    encoders = [
        raft.FeatureEncoder(block=raft.ResidualBlock, layers=layers, norm_layer=nn.InstanceNorm2d) for _ in range(2)
    ]
    return raft.RAFT(feature_encoder=encoders[0], context_encoder=encoders[1], corr_block=corr, update_block=update)


def find_raft(context: RewardContext, address: str) -> Path:
    """The file of that address: in the places of `find_files`, and where torchvision itself keeps its files.

    Raises:
        MissingWeightsError: it is in none of them.
    """
    file = address.rsplit("/", 1)[1]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    try:
        (path,) = find_files(
            context, NAME, _REPOSITORY, [file], f"`curl -L -O {address}`, into {cached.parent} or a folder"
        )
    except MissingWeightsError:
        if not cached.is_file():
            raise
        return cached
    return path


def build_motion(context: RewardContext) -> MotionReward:
    """The large RAFT of torchvision, trained on Chairs and Things (C_T_V2), VBench's and EvalCrafter's kind.

    The file is looked for in the folder, and where torchvision itself keeps its files.
    """
    from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

    context = published(context)
    if context.weights == "random":
        warn_random(NAME)
        tiny = context.scale == "tiny"
        with seeded(context.seed):
            network = tiny_raft() if tiny else raft_large(weights=None)
        return MotionReward(RaftFlow(frozen(network, context), num_updates=2 if tiny else 12))
    path = find_raft(context, Raft_Large_Weights.C_T_V2.url)
    network = raft_large(weights=None)
    load_strictly(network, read_tensors(path), path)
    return MotionReward(RaftFlow(frozen(network, context)))
