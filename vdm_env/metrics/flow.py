"""Optical flow for the motion metrics: warping, the middle frame between two, and RAFT through torchvision.

A `Flow` is any callable that says where pixels go: images a, b [N,3,H,W] in [0,1] -> [N,2,H,W] in pixels, channel 0 to
the right and 1 downwards, so that a(x, y) is seen again at b(x + u, y + v).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_env.metrics.temporal import check_video
from vdm_env.rewards.loading import RewardContext, frozen, load_strictly, read_tensors, seeded, warn_random
from vdm_env.rewards.motion import find_raft

Flow = Callable[[Tensor, Tensor], Tensor]
RAFT_MIN_SIDE_PX = 128
"""the smallest image that torchvision's RAFT takes"""


def check_flow(flow: Tensor) -> None:
    """Raises ValueError unless `flow` is a float tensor [N,2,H,W]."""
    if flow.ndim != 4 or flow.shape[1] != 2 or not flow.is_floating_point():
        raise ValueError(f"flow is {flow.dtype} {tuple(flow.shape)}; expected floats [N,2,H,W] in pixels")


def speed(flow: Tensor) -> Tensor:
    """Length of the flow at each pixel: [N,2,H,W] -> [N,H,W]."""
    check_flow(flow)
    return flow.square().sum(1).sqrt()


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Images [N,C,H,W] looked up at (x + u, y + v): bilinear, the border repeated.

    The second image looked up along the flow from the first to it is the first again, where nothing is hidden.

    Pixel indices and not normalised coordinates, whose rounding grows with the image.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_flow(flow)
    if images.ndim != 4 or images.shape[0] != flow.shape[0] or images.shape[2:] != flow.shape[2:]:
        raise ValueError(f"images {tuple(images.shape)} and flow {tuple(flow.shape)}: expected [N,C,H,W] and [N,2,H,W]")
    height, width = images.shape[2:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[:, 0]
    y = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    left, top = x.floor(), y.floor()
    part_x, part_y = (x - left)[:, None], (y - top)[:, None]

    def at(row: Tensor, column: Tensor) -> Tensor:
        index = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
        wanted = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)
        return images.flatten(2).gather(2, wanted).view_as(images)

    above = (1 - part_x) * at(top, left) + part_x * at(top, left + 1)
    below = (1 - part_x) * at(top + 1, left) + part_x * at(top + 1, left + 1)
    return (1 - part_y) * above + part_y * below


def pair_flows(video: Tensor, flow: Flow, chunk_size: int | None = None) -> Tensor:
    """Flow from each frame to the next: [B,F,3,H,W] -> [B,F-1,2,H,W]; `chunk_size` pairs at a time.

    Raises:
        ValueError: another shape, fewer than two frames, or a `flow` that returns another shape.
    """
    check_video(video, 2)
    before, after = video[:, :-1].flatten(0, 1), video[:, 1:].flatten(0, 1)
    size = chunk_size or len(before)
    flows = torch.cat([flow(a, b) for a, b in zip(before.split(size), after.split(size), strict=True)])
    if flows.shape != (len(before), 2, *video.shape[3:]):
        raise ValueError(
            f"flow returned {tuple(flows.shape)} for {len(before)} pairs of frames of {tuple(video.shape[3:])} pixels; "
            f"expected {(len(before), 2, *video.shape[3:])}"
        )
    return flows.unflatten(0, (len(video), video.shape[1] - 1))


class MidpointWarp:
    """The frame halfway between two, by moving both along half their flow and averaging.

    Source: Super SloMo (Jiang et al. 2018, arXiv:1712.00080), equation 4 at t = 1/2, without its refining networks.
    Stands in for AMT-S in VBench's motion smoothness, which no library carries: scores are not VBench's.
    """

    surrogate = "middle frames warped along RAFT's flow, instead of AMT-S"

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """[N,3,H,W] and [N,3,H,W] in [0,1] -> [N,3,H,W]."""
        forward, backward = self.flow(first, second), self.flow(second, first)
        towards_first = 0.25 * (backward - forward)
        return 0.5 * (warp(first, towards_first) + warp(second, -towards_first))


class RaftFlow:
    """torchvision's RAFT as a `Flow`.

    Deviation: VBench, EvalCrafter and DEVIL use the release `raft-things`; torchvision's weights are the same
    architecture trained anew on the same data (Chairs and Things), so numbers differ slightly.

    Args:
        model: `torchvision.models.optical_flow` RAFT, [-1,1] images to a list of flows.
        updates: refinements of the flow (all three benchmarks use 20).
    """

    def __init__(self, model: Any, *, updates: int = 20) -> None:
        if updates < 1:
            raise ValueError(f"updates is {updates}, expected at least 1 (the benchmarks use 20)")
        self.model, self.updates = model, updates

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """[N,3,H,W] in [0,1] -> [N,2,H,W]; padded to multiples of 8 by repeating the border.

        Raises:
            ValueError: a side below 128 pixels.
        """
        height, width = first.shape[-2:]
        if min(height, width) < RAFT_MIN_SIDE_PX:
            raise ValueError(
                f"RAFT needs images of at least {RAFT_MIN_SIDE_PX} x {RAFT_MIN_SIDE_PX} pixels, got {height} x {width}:"
                " enlarge the videos first, or measure them with `metrics.temporal`, which needs no network"
            )
        pad_y, pad_x = -height % 8, -width % 8
        pad = (pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2)
        weight = next(self.model.parameters())
        inputs = [F.pad(2 * image.to(weight) - 1, pad, mode="replicate") for image in (first, second)]
        flow = self.model(*inputs, num_flow_updates=self.updates)[-1]
        return flow[..., pad[2] : pad[2] + height, pad[0] : pad[0] + width].float()


def load_raft(context: RewardContext, *, small: bool = False, updates: int = 20) -> RaftFlow:
    """RAFT with torchvision's weights C_T_V2, from the places of `rewards.motion.find_raft`; never downloads.

    `vdm-env download Motion` fetches the large one.

    Raises:
        MissingWeightsError: the file is in none of them.
        CorruptWeightsError: the file cannot be used.
    """
    from torchvision.models import optical_flow

    build = optical_flow.raft_small if small else optical_flow.raft_large
    weights = optical_flow.Raft_Small_Weights.C_T_V2 if small else optical_flow.Raft_Large_Weights.C_T_V2
    with seeded(context.seed):
        model = build(weights=None, progress=False)
    if context.weights == "random":
        warn_random("RAFT")
    else:
        path = find_raft(context, weights.url)
        load_strictly(model, read_tensors(path), path)
    return RaftFlow(frozen(model, context), updates=updates)


def mean_speed(video: Tensor, flow: Flow, chunk_size: int | None = None) -> Tensor:
    """Mean length of the flow over pixels and pairs of frames, in pixels: [B,F,3,H,W] -> [B].

    EvalCrafter's flow score and DEVIL's flow strength.
    """
    flows = pair_flows(video, flow, chunk_size)
    return speed(flows.flatten(0, 1)).unflatten(0, flows.shape[:2]).mean((1, 2, 3))


def top_speed(flow: Tensor, fraction: float = 0.05) -> Tensor:
    """Mean length over the fastest `fraction` of the pixels (rounded down, at least one): [N,2,H,W] -> [N].

    Raises:
        ValueError: another shape, or a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, expected one in (0, 1] (VBench: 0.05)")
    lengths = speed(flow).flatten(1)
    return lengths.topk(max(1, math.floor(fraction * lengths.shape[1])), dim=1).values.mean(1)
