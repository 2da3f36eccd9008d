"""How a video behaves in time, from its pixels or from features of its frames: cheap, differentiable, no networks.

All take videos [B,F,3,H,W] in [0,1] (or features) and give [B]; where a better motion estimate would need a network of
its own, the docstring says what stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def check_video(video: Tensor, frames: int) -> None:
    """Raises ValueError unless `video` is a float tensor [B,F,3,H,W] with at least `frames` frames."""
    if video.ndim != 5 or video.shape[2] != 3 or video.shape[1] < frames or not video.is_floating_point():
        raise ValueError(
            f"video is {video.dtype} {tuple(video.shape)}; expected floats in [0,1], [B,F,3,H,W] with F >= {frames}"
        )


def temporal_flicker(video: Tensor) -> Tensor:
    """Steadiness: 1 - mean |f_i - f_{i+1}|, in [0, 1]; 1 for a still picture.

    Source: VBench (Huang et al. 2024, arXiv:2311.17982), "temporal flickering".

    Args:
        video: [B,F,3,H,W] in [0,1], F >= 2.

    Raises:
        ValueError: another shape.
    """
    check_video(video, 2)
    return 1 - (video[:, 1:] - video[:, :-1]).abs().mean((1, 2, 3, 4))


def average(first: Tensor, second: Tensor) -> Tensor:
    """The frame halfway between two, without any motion: their mean."""
    return 0.5 * (first + second)


def motion_smoothness(
    video: Tensor,
    interpolate: Callable[[Tensor, Tensor], Tensor] = average,
    *,
    truncate: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """How well frames 1, 3, 5, ... follow from their neighbours: 1 - mean |f_i - between(f_{i-1}, f_{i+1})|, in [0, 1].

    Source: VBench (arXiv:2311.17982), "motion smoothness". Deviation: by default frames are interpolated linearly and
    not by a network that estimates motion, so steady motion of a sharp edge costs a little too.

    Args:
        video: [B,F,3,H,W] in [0,1], F >= 3; with an even F the last frame is not used.
        interpolate: frames [N,3,H,W] in [0,1] before and after -> the frames between, such as `flow.MidpointWarp`.
        truncate: cuts the interpolated frames down to 8 bits, as VBench does; the score loses up to 1/255 by it, and
            the gradient. VBench's own scores have this.
        chunk_size: pairs of frames that `interpolate` sees at a time; None: all.

    Raises:
        ValueError: another shape, an `interpolate` that returns another shape, or a chunk_size below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for everything at once, got {chunk_size}")
    check_video(video, 3)
    even = video[:, ::2]
    between = video[:, 1::2][:, : even.shape[1] - 1].flatten(0, 1)
    before, after = even[:, :-1].flatten(0, 1), even[:, 1:].flatten(0, 1)
    size = chunk_size or len(before)
    guess = torch.cat([interpolate(a, b) for a, b in zip(before.split(size), after.split(size), strict=True)])
    if guess.shape != between.shape:
        raise ValueError(
            f"interpolate returned {tuple(guess.shape)}, expected {tuple(between.shape)}: one frame a pair"
        )
    if truncate:
        # 8-bit frames divided by 255 and averaged may fall short of a whole level by a rounding error of float32.
        guess = (255 * guess.clamp(0, 1) + 1e-4).floor() / 255
    return 1 - (between - guess).abs().unflatten(0, (len(video), -1)).mean((1, 2, 3, 4))


def dynamic_degree(video: Tensor, *, top: float = 0.05) -> Tensor:
    """How much moves: the mean change of the pixels that change most, in [0, 1]; 0 for a still picture.

    A pixel's change is the mean of its three channels' |f_i - f_{i+1}|; of each pair of frames the largest fraction
    `top` of them counts (at least one pixel).

    Source: VBench (arXiv:2311.17982), "dynamic degree", which takes the 5 % fastest pixels. Deviation: it measures
    optical flow with a network, and then only whether a threshold is exceeded.

    Args:
        video: [B,F,3,H,W] in [0,1], F >= 2.
        top: in (0, 1].

    Raises:
        ValueError: another shape, or top outside (0, 1].
    """
    check_video(video, 2)
    if not 0 < top <= 1:
        raise ValueError(f"top is {top}, expected a fraction in (0, 1] (VBench: 0.05)")
    change = (video[:, 1:] - video[:, :-1]).abs().mean(2).flatten(2)
    return change.topk(max(1, round(top * change.shape[2])), dim=2).values.mean((1, 2))


def frame_consistency(features: Tensor) -> Tensor:
    """Whether frames stay alike: mean over frames i >= 1 of (max(0, cos(f_i, f_{i-1})) + max(0, cos(f_i, f_0))) / 2.

    Source: VBench (arXiv:2311.17982), "subject consistency" (features of DINO) and "background consistency" (of CLIP).

    Args:
        features: [B,F,D], F >= 2, of any length > 0.

    Returns:
        [B] in [0, 1].

    Raises:
        ValueError: another shape.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected [B,F,D] with F >= 2")
    unit = F.normalize(features, dim=-1)
    before = (unit[:, 1:] * unit[:, :-1]).sum(-1).clamp(min=0)
    first = (unit[:, 1:] * unit[:, :1]).sum(-1).clamp(min=0)
    return (0.5 * (before + first)).mean(1)
