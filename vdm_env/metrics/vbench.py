"""VBench's seven quality dimensions and its overall consistency, one score a video, larger is better.

Networks are arguments: callables from prepared frames to features or scores (`vbench_networks` loads the published
ones). Temporal flickering, motion smoothness and the formula of both consistencies are in `temporal`; how dimensions
become one number is in `vbench_scores`. Source: VBench (Huang et al. 2024, arXiv:2311.17982), Vchitect/VBench.

Legend: B videos, F frames, N = B*F images, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_env.metrics.flow import Flow, pair_flows, top_speed
from vdm_env.metrics.temporal import check_video, frame_consistency, motion_smoothness, temporal_flicker
from vdm_env.rewards.base import Reward
from vdm_env.rewards.chunked import Chunked
from vdm_env.rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, normalise
from vdm_env.rewards.tensors import at_least_float32, in_chunks
from vdm_env.rewards.viclip import short_side_crop

FrameNetwork = Callable[[Tensor], Tensor]
SIDE_PX = 224
LONGEST_PX = 512
VICLIP_FRAMES = 8


def middle_frames(count: int, num_frames: int) -> Tensor:
    """Indices [count] of the frames that VBench's video networks see: the (earlier) middle of each of `count` spans.

    A video with fewer frames is repeated at its end.

    Raises:
        ValueError: a number below 1.
    """
    if count < 1 or num_frames < 1:
        raise ValueError(f"{count} of {num_frames} frames: both must be at least 1")
    spans = min(count, num_frames)
    edges = [num_frames * i // spans for i in range(spans + 1)]
    middles = [(start + end - 1) // 2 for start, end in zip(edges, edges[1:], strict=False)]
    return torch.tensor(middles + [num_frames - 1] * (count - spans))


def clip_input(frames: Tensor, side: int = SIDE_PX) -> Tensor:
    """[N,3,H,W] in [0,1] -> [N,3,side,side]: short side bicubic without anti-aliasing, centre crop, CLIP's mean."""
    return normalise(short_side_crop(frames, side), CLIP_MEAN, CLIP_STD)


def dino_input(frames: Tensor, side: int = SIDE_PX) -> Tensor:
    """[N,3,H,W] in [0,1] -> [N,3,h,w] with min(h,w) = side: bilinear, not anti-aliased, no crop, ImageNet's mean."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    size = (height * side // short, width * side // short)
    frames = F.interpolate(at_least_float32(frames), size=size, mode="bilinear", align_corners=False)
    return normalise(frames, IMAGENET_MEAN, IMAGENET_STD)


def imaging_input(frames: Tensor, longest: int = LONGEST_PX) -> Tensor:
    """[N,3,H,W] in [0,1], made smaller (bilinear, not anti-aliased) until the longest side has `longest` pixels."""
    height, width = frames.shape[-2:]
    if max(height, width) <= longest:
        return frames
    scale = longest / max(height, width)
    size = (int(scale * height), int(scale * width))
    return F.interpolate(at_least_float32(frames), size=size, mode="bilinear", align_corners=False)


def _each_frame(video: Tensor, network: FrameNetwork, prepare: FrameNetwork, chunk_size: int | None) -> Tensor:
    result = in_chunks(lambda frames: network(prepare(frames)), video.flatten(0, 1), size=chunk_size)
    if result.ndim not in (1, 2) or len(result) != video.shape[0] * video.shape[1]:
        raise ValueError(f"the network returned {tuple(result.shape)} for {video.shape[0] * video.shape[1]} frames")
    return at_least_float32(result).unflatten(0, video.shape[:2])


def subject_consistency(video: Tensor, dino: FrameNetwork, *, chunk_size: int | None = None) -> Tensor:
    """Likeness of each frame to the one before and the first, by DINO: [B,F,3,H,W] in [0,1] -> [B] in [0,1].

    Args:
        video: F >= 2.
        dino: `dino_input` -> [N,D].
        chunk_size: frames the network sees at a time; None: all. So in all functions here.

    Raises:
        ValueError: another shape.
    """
    check_video(video, 2)
    return frame_consistency(_each_frame(video, dino, dino_input, chunk_size))


def background_consistency(video: Tensor, clip: FrameNetwork, *, chunk_size: int | None = None) -> Tensor:
    """The same by CLIP ViT-B/32, `clip_input` -> [N,D]: [B,F,3,H,W] in [0,1] -> [B] in [0,1]."""
    check_video(video, 2)
    return frame_consistency(_each_frame(video, clip, clip_input, chunk_size))


def aesthetic_quality(video: Tensor, predictor: FrameNetwork, *, chunk_size: int | None = None) -> Tensor:
    """Mean over frames of the predictor's score / 10: [B,F,3,H,W] in [0,1] -> [B]; `clip_input` -> [N], 0 to 10."""
    check_video(video, 1)
    return _each_frame(video, predictor, clip_input, chunk_size).mean(1) / 10


def imaging_quality(video: Tensor, assessor: FrameNetwork, *, chunk_size: int | None = None) -> Tensor:
    """Mean over frames of the assessor's score / 100: [B,F,3,H,W] in [0,1] -> [B]; `imaging_input` -> [N], 0 to 100.

    VBench's assessor is MUSIQ trained on SPAQ.
    """
    check_video(video, 1)
    return _each_frame(video, assessor, imaging_input, chunk_size).mean(1) / 100


def overall_consistency(video: Tensor, prompts: list[str], viclip: Reward, *, chunk_size: int | None = None) -> Tensor:
    """Cosine of eight frames of each video and its prompt by ViCLIP: [B,F,3,H,W] in [0,1] -> [B]."""
    check_video(video, 1)
    videos = len(video) if chunk_size is None else max(1, chunk_size // VICLIP_FRAMES)
    return Chunked(viclip, videos)(video[:, middle_frames(VICLIP_FRAMES, video.shape[1]).to(video.device)], prompts)


def motion_limits(height: int, width: int, num_frames: int, *, at_least_one: bool = True) -> tuple[float, int]:
    """When a video counts as moving: (pixels, number of pairs of frames whose fastest pixels must exceed them).

    `num_frames` are those looked at. VBench asks for 0 pairs of videos with one or two frames, and so calls them
    moving whatever they show; `at_least_one=False` does so too.
    """
    return 6 * min(height, width) / 256, max(int(at_least_one), round(4 * num_frames / 16))


def dynamic_degree(
    video: Tensor, flow: Flow, *, fps: float = 8.0, at_least_one: bool = True, chunk_size: int | None = None
) -> Tensor:
    """Whether a video moves, 1 or 0: [B,F,3,H,W] in [0,1] -> [B]; VBench's score is the mean over videos.

    At 8 frames a second, enough pairs of frames must have a mean flow of their 5 % fastest pixels above a threshold.
    No gradient passes; `temporal.dynamic_degree` is a measure that has one and needs no network.

    Args:
        video: F >= 2 after thinning out to 8 frames a second.
        flow: see `flow.py`.
        fps: of the video; every round(fps / 8)-th frame is looked at.
        at_least_one: see `motion_limits`.
        chunk_size: pairs of frames at a time.

    Raises:
        ValueError: another shape, too few frames, or fps not above 0.
    """
    if not fps > 0:
        raise ValueError(f"fps is {fps}, expected a number above 0")
    video = video[:, :: max(1, round(fps / 8))]
    flows = pair_flows(video, flow, chunk_size)
    pixels, pairs = motion_limits(video.shape[3], video.shape[4], video.shape[1], at_least_one=at_least_one)
    fast = top_speed(flows.flatten(0, 1)).unflatten(0, flows.shape[:2]) > pixels
    return (fast.sum(1) >= pairs).to(video.dtype)


class SharpnessAndNoise:
    """Sharp edges without noise, 0 to 100: a stand-in for MUSIQ that needs no network. Scores are not VBench's.

    100 * edge * max(0, 1 - noise / 0.1): edge is the mean gradient of luminance over the 5 % steepest pixels, at most
    1; noise is the standard deviation that Immerkaer's operator (1996, doi:10.1006/cviu.1996.0060) estimates.
    """

    surrogate = "sharpness of edges and noise, instead of MUSIQ"

    def __call__(self, frames: Tensor) -> Tensor:
        """[N,3,H,W] in [0,1], H, W >= 3 -> [N]."""
        light = (frames * frames.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        across = (light[..., 1:, 1:] - light[..., 1:, :-1]).flatten(1)
        down = (light[..., 1:, 1:] - light[..., :-1, 1:]).flatten(1)
        steepness = torch.hypot(across, down)
        edge = steepness.topk(max(1, steepness.shape[1] // 20), dim=1).values.mean(1).clamp(max=1)
        operator = light.new_tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]).view(1, 1, 3, 3)
        noise = F.conv2d(light, operator).abs().mean((1, 2, 3)) * (torch.pi / 2) ** 0.5 / 6
        return 100 * edge * (1 - noise / 0.1).clamp(min=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class VBenchNetworks:
    """The networks of `measure`; a dimension whose network is None is not measured.

    One that stands in for the published network says so in an attribute `surrogate`, which comes with the scores.
    """

    dino: FrameNetwork | None = None
    """`dino_input` -> [N,D], for subject consistency"""
    clip: FrameNetwork | None = None
    """`clip_input` -> [N,D], for background consistency"""
    interpolate: Callable[[Tensor, Tensor], Tensor] | None = None
    """frames before and after -> between, for motion smoothness"""
    flow: Flow | None = None
    """for dynamic degree"""
    aesthetic: FrameNetwork | None = None
    """`clip_input` -> [N], 0 to 10"""
    imaging: FrameNetwork | None = None
    """`imaging_input` -> [N], 0 to 100"""
    viclip: Reward | None = None
    """for overall consistency"""


@dataclass(frozen=True, kw_only=True, slots=True)
class VBenchScores:
    """What `measure` found."""

    raw: Mapping[str, Tensor]
    """{dimension: [B]}, before normalisation"""
    surrogates: Mapping[str, str]
    """{dimension: what stood in for VBench's network}; a score over such dimensions is not VBench's"""

    def means(self) -> dict[str, float]:
        """Means over the videos, as `vbench_scores.quality_score` takes them."""
        return {name: float(values.double().mean()) for name, values in self.raw.items()}


@torch.no_grad()
def measure(
    video: Tensor,
    prompts: list[str],
    networks: VBenchNetworks,
    *,
    fps: float = 8.0,
    truncate: bool = False,
    chunk_size: int | None = None,
) -> VBenchScores:
    """The seven quality dimensions and overall consistency, as far as there are networks for them.

    Args:
        video: [B,F,3,H,W] in [0,1], F >= 3.
        prompts: B texts.
        networks: see `VBenchNetworks`.
        fps: frames a second of the videos.
        truncate: cuts interpolated frames to 8 bits as VBench does, see `temporal.motion_smoothness`.
        chunk_size: frames the networks see at a time; None: all.

    Raises:
        ValueError: another shape, or another number of prompts.
    """
    check_video(video, 3)
    if len(prompts) != len(video):
        raise ValueError(f"{len(prompts)} prompts for {len(video)} videos; give one for each")

    def smoothness(net: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return motion_smoothness(video, net, truncate=truncate, chunk_size=chunk_size)

    measures: dict[str, tuple[str, Callable[[Any], Tensor]]] = {
        "subject consistency": ("dino", lambda net: subject_consistency(video, net, chunk_size=chunk_size)),
        "background consistency": ("clip", lambda net: background_consistency(video, net, chunk_size=chunk_size)),
        "motion smoothness": ("interpolate", smoothness),
        "dynamic degree": ("flow", lambda net: dynamic_degree(video, net, fps=fps, chunk_size=chunk_size)),
        "aesthetic quality": ("aesthetic", lambda net: aesthetic_quality(video, net, chunk_size=chunk_size)),
        "imaging quality": ("imaging", lambda net: imaging_quality(video, net, chunk_size=chunk_size)),
        "overall consistency": (
            "viclip",
            lambda net: overall_consistency(video, prompts, net, chunk_size=chunk_size),
        ),
    }
    given = {field.name: getattr(networks, field.name) for field in fields(networks)}
    raw = {"temporal flickering": temporal_flicker(video)}
    surrogates = {}
    for dimension, (name, function) in measures.items():
        if given[name] is not None:
            raw[dimension] = function(given[name])
            if getattr(given[name], "surrogate", None):
                surrogates[dimension] = given[name].surrogate
    return VBenchScores(raw=raw, surrogates=surrogates)
