"""EvalCrafter's temporal and motion metrics, and how it turns them into scores.

Source: EvalCrafter (Liu et al. 2024, arXiv:2310.11440), evalcrafter/EvalCrafter. Where the published code differs from
what its metrics are meant to be, the default here is the metric and `mode="evalcrafter"` the code: numbers to be put
beside published ones need the latter.

| metric | the published code | here by default |
|---|---|---|
| CLIP inputs | raw 0..255 pixels | in [0,1], CLIP's mean and deviation |
| flow of the warping error | of images in 0..1 given to a RAFT that expects 0..255 | of the images as they are |
| warping error | summed over channels | mean over channels |
| a pair without any visible pixel | counts 0 | is left out |

Networks are arguments, `flow.Flow` and callables to features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_env.metrics.flow import Flow, check_flow, mean_speed, warp
from vdm_env.metrics.temporal import check_video
from vdm_env.rewards.preprocess import CLIP_MEAN, CLIP_STD, normalise
from vdm_env.rewards.tensors import at_least_float32

Mode = Literal["corrected", "evalcrafter"]
FAST_PX = 5.0
"""mean flow above which a video's motion is called large"""


def _check_mode(mode: str) -> None:
    if mode not in ("corrected", "evalcrafter"):
        raise ValueError(f"mode={mode!r} is unknown; expected 'corrected' or 'evalcrafter'")


def _unit(features: Tensor, frames: int) -> Tensor:
    if features.ndim != 3 or features.shape[1] < frames:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected [B,F,D] with F >= {frames}")
    return F.normalize(at_least_float32(features), dim=-1)


def clip_input(frames: Tensor, side: int = 224, *, mode: Mode = "corrected") -> Tensor:
    """[N,3,H,W] in [0,1] -> [N,3,side,side] for CLIP ViT-B/32: bilinear without anti-aliasing straight to a square.

    "evalcrafter" gives the pixels in 0..255 and not normalised, as its scripts do.
    """
    _check_mode(mode)
    frames = F.interpolate(at_least_float32(frames), size=(side, side), mode="bilinear", align_corners=False)
    return 255 * frames if mode == "evalcrafter" else normalise(frames, CLIP_MEAN, CLIP_STD)


def clip_temp(features: Tensor) -> Tensor:
    """Mean cosine of neighbouring frames: CLIP features [B,F,D], F >= 2 -> [B] in [-1,1]."""
    unit = _unit(features, 2)
    return (unit[:, 1:] * unit[:, :-1]).sum(-1).mean(1)


def first_frame_consistency(features: Tensor) -> Tensor:
    """Mean cosine of frames 1, 2, ... and frame 0: CLIP features [B,F,D], F >= 2 -> [B] in [-1,1].

    EvalCrafter calls it face consistency; there is no face detector in it.
    """
    unit = _unit(features, 2)
    return (unit[:, 1:] * unit[:, :1]).sum(-1).mean(1)


def clip_score(features: Tensor, text: Tensor) -> Tensor:
    """Mean cosine of the frames and the prompt: [B,F,D] and [B,D] -> [B] in [-1,1]."""
    return (_unit(features, 1) * F.normalize(at_least_float32(text), dim=-1)[:, None]).sum(-1).mean(1)


def action_score(probabilities: Tensor, labels: Tensor, action: Tensor, *, top: int = 5) -> Tensor:
    """How close the recognised actions are to the one asked for, in [-1,1].

    The sum over the `top` most probable classes of probability * cos(label, action).

    Args:
        probabilities: [B,K] of a classifier of actions; not normalised again over the `top`.
        labels: [K,D], text features of the classes' names.
        action: [B,D], text features of the action that each prompt names.
        top: at most K.

    Raises:
        ValueError: shapes that do not fit.
    """
    if probabilities.ndim != 2 or len(labels) != probabilities.shape[1] or len(action) != len(probabilities):
        shapes = [tuple(t.shape) for t in (probabilities, labels, action)]
        raise ValueError(f"shapes {shapes}; expected probabilities [B,K], labels [K,D] and action [B,D]")
    best, index = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
    cosine = (F.normalize(labels, dim=-1)[index] * F.normalize(action, dim=-1)[:, None]).sum(-1)
    return (best * cosine).sum(1)


def motion_recognised(video: Tensor, flow: Flow, asked: Sequence[str]) -> Tensor:
    """Whether the size of the motion is the one asked for: [B,F,3,H,W] and B of "large", "slow" -> [B] of 1 or 0.

    Raises:
        ValueError: another word, or another number of them.
    """
    if len(asked) != len(video) or set(asked) - {"large", "slow"}:
        raise ValueError(f"asked is {list(asked)[:8]}; expected {len(video)} of 'large' and 'slow', one for each video")
    large = mean_speed(video, flow) > FAST_PX
    return (large == torch.tensor([word == "large" for word in asked], device=large.device)).to(video.dtype)


def occlusion(forward: Tensor, backward: Tensor) -> Tensor:
    """Pixels of the first image that have no partner in the second, or lie on an edge of the motion: bool [N,H,W].

    |w + f|^2 > 0.01 (|w|^2 + |f|^2) + 0.5  or  |grad f|^2 > 0.01 |f|^2 + 0.002, where f is the flow to the second image
    and w the flow back, looked up where f points; forward differences, 0 at the last row and column.

    Source: Sundaram et al. 2010, doi:10.1007/978-3-642-15549-9_32; Ruder et al. 2016, arXiv:1604.08610.

    Args:
        forward: [N,2,H,W], first to second image.
        backward: [N,2,H,W], second to first.
    """
    check_flow(forward)
    back = warp(backward, forward)
    size = forward.square().sum(1)
    lost = (back + forward).square().sum(1) > 0.01 * (back.square().sum(1) + size) + 0.5
    across = F.pad(forward[..., :-1] - forward[..., 1:], (0, 1))
    down = F.pad(forward[..., :-1, :] - forward[..., 1:, :], (0, 0, 0, 1))
    edge = across.square().sum(1) + down.square().sum(1) > 0.01 * size + 0.002
    return lost | edge


def pair_warping_error(
    first: Tensor, second: Tensor, forward: Tensor, backward: Tensor, *, mode: Mode = "corrected"
) -> Tensor:
    """Mean squared difference of an image and the next one warped back to it, where not occluded: [N], >= 0.

    Args:
        first, second: [N,3,H,W] in [0,1].
        forward, backward: flows [N,2,H,W], see `occlusion`.
        mode: "evalcrafter" sums over the channels (three times the mean) and gives 0 where nothing is visible; the
            default gives NaN there.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_mode(mode)
    visible = ~occlusion(forward, backward)
    difference = (warp(second, forward) - first).square() * visible[:, None]
    count = visible.sum((1, 2)).to(first.dtype)
    if mode == "evalcrafter":
        return difference.sum((1, 2, 3)) / count.clamp(min=1)
    return difference.sum((1, 2, 3)) / (count * first.shape[1])  # 0 / 0 is NaN


def warping_error(video: Tensor, flow: Flow, *, mode: Mode = "corrected") -> Tensor:
    """Mean of `pair_warping_error` over neighbouring frames at half size: [B,F,3,H,W] in [0,1], F >= 2 -> [B].

    "evalcrafter" lets the flow see the images divided by 255, which is what a network made for 0..255 sees of images in
    0..1. The default leaves out pairs without a visible pixel; NaN if no pair has one.

    Raises:
        ValueError: another shape.
    """
    _check_mode(mode)
    check_video(video, 2)
    half = F.interpolate(video.flatten(0, 1), scale_factor=0.5, mode="bilinear", align_corners=False)
    frames = half.unflatten(0, video.shape[:2])
    first, second = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)
    seen = [image / 255 if mode == "evalcrafter" else image for image in (first, second)]
    errors = pair_warping_error(first, second, flow(seen[0], seen[1]), flow(seen[1], seen[0]), mode=mode)
    return errors.unflatten(0, (len(video), -1)).nanmean(1)


def frame_features(
    video: Tensor, clip: Callable[[Tensor], Tensor], *, side: int = 224, mode: Mode = "corrected"
) -> Tensor:
    """Features of all frames for `clip_temp` and its kin: [B,F,3,H,W] in [0,1] -> [B,F,D]; `clip`: [N,3,S,S] -> [N,D].

    Raises:
        ValueError: another shape.
    """
    check_video(video, 1)
    return clip(clip_input(video.flatten(0, 1), side, mode=mode)).unflatten(0, video.shape[:2])


def temporal_consistency_score(clip_temp: float, warping_error: float, first_frame: float) -> float:
    """EvalCrafter's temporal consistency from means over videos, about 0 to 100.

    Its weights were fitted to people's ratings with `mode="evalcrafter"` metrics; give it those.
    """
    linear = 2.92492244 * clip_temp + 0.45475678 * (1 - warping_error) + 0.17561504 * first_frame - 3.42274050899774
    return 100 * 5 * linear


def motion_quality_score(action: float, motion_recognised: float, flow_px: float) -> float:
    """EvalCrafter's motion quality from means over videos, about 0 to 100; `flow_px` is `flow.mean_speed`'s.

    The fitted weights are negative: less motion and less recognisable action score higher.
    """
    linear = -0.01641512 * action - 0.01340959 * motion_recognised - 0.10517075 * flow_px / 100 + 0.1297562020899355
    return 100 * 5 * linear


def visual_quality_score(vqa_aesthetic: float, vqa_technical: float, inception: float) -> float:
    """EvalCrafter's visual quality from DOVER's two scores (0 to 100) and the Inception score, about 0 to 100."""
    linear = 0.03004555 * vqa_aesthetic + 0.02887537 * vqa_technical - 0.01382558 * inception
    return 100 * 5 * (linear / 100 + 0.08707462696457707)
