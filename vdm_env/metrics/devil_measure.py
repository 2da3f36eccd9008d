"""DEVIL's parts of the dynamics of videos, from the videos: for `devil.dynamics_score`, or to be looked at one by one.

    parts = dynamics_parts(video, load_devil(RewardContext()))          # {"flow": [B], "ssim": [B], ...}
    scores = devil.dynamics_score(parts, regressions)                   # with regressions of one's own

Source: DEVIL (Liao et al. 2024, arXiv:2407.01094), MingXiangL/DEVIL, tools/evaluate_dynamic_ddp_metrics.py.
`mode="devil"` does as the published code: see `devil.segment_distance` and `devil_frames.frame_similarity`, and its
flow network, which expects pixels of 0..255, gets them with ImageNet's mean and deviation taken off.

Legend: B videos, F frames, N = B*F images, P patches, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdm_env.metrics import devil, devil_frames
from vdm_env.metrics.flow import Flow, load_raft, mean_speed
from vdm_env.metrics.temporal import check_video
from vdm_env.metrics.vbench_networks import load_dino
from vdm_env.rewards.loading import (
    RewardContext,
    find_transformers,
    frozen,
    load_transformers,
    seeded,
    warn_random,
)
from vdm_env.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalise, vader_squash
from vdm_env.rewards.tensors import in_chunks
from vdm_env.rewards.viclip import build_viclip, unit

Network = Callable[[Tensor], Tensor]
SIDE_PX = 224
RATIOS = (0.5, 0.25)
"""lengths of the segments, as parts of the video; their distances are averaged"""
_DINO, _DINOV2 = "facebook/dino-vits16", "facebook/dinov2-large"


@dataclass(frozen=True, kw_only=True, slots=True)
class DevilNetworks:
    """The networks of `dynamics_parts`; a part whose network is None is left out."""

    flow: Flow | None = None
    """for "flow" """
    dino: Network | None = None
    """images [N,3,224,224], ImageNet-normalised, to [N,D]: DINO ViT-S/16, for "dino_variation" """
    patches: Network | None = None
    """the same images to [N,P,D]: DINOv2 ViT-L/14, for "dino_segment" """
    viclip: Network | None = None
    """segments [S,8,3,224,224], ImageNet-normalised, to [S,D]: ViCLIP, for "viclip_segment" """


@torch.no_grad()
def dynamics_parts(
    video: Tensor,
    networks: DevilNetworks,
    *,
    fps: float = 8.0,
    mode: devil.Mode = "corrected",
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """The parts of `devil.LEVELS` there are networks for, {name: [B]}.

    "ssim", "phash" and "temporal_entropy" need none.

    Args:
        video: [B,F,3,H,W] in [0,1], F >= 4.
        networks: see `DevilNetworks`.
        fps: frames a second.
        mode: "devil" for numbers to be put beside published ones.
        chunk_size: images (pairs, segments) the networks see at a time; None: all.

    Raises:
        ValueError: another shape, fps not above 0, or an unknown mode.
    """
    devil.check_mode(mode)
    check_video(video, 4)
    parts: dict[str, Tensor] = {}
    if networks.flow is not None:
        parts["flow"] = mean_speed(_for_flow(video, mode), networks.flow, chunk_size)
    parts["ssim"] = devil_frames.frame_similarity(video, mode=mode)
    parts["phash"] = devil_frames.hash_distance(video)
    images = normalise(vader_squash(video.flatten(0, 1), SIDE_PX), IMAGENET_MEAN, IMAGENET_STD)
    if networks.patches is not None:
        # Products of the patches' unit features, averaged over them.
        patches = unit(in_chunks(networks.patches, images, size=chunk_size)).flatten(1)
        parts["dino_segment"] = devil.dino_segment_distance(patches.unflatten(0, video.shape[:2]))
    if networks.viclip is not None:
        shown = images.unflatten(0, video.shape[:2])
        parts["viclip_segment"] = torch.stack(
            [_segments(shown, networks.viclip, ratio, mode, chunk_size) for ratio in RATIOS]
        ).mean(0)
    if networks.dino is not None:
        features = in_chunks(networks.dino, images, size=chunk_size)
        parts["dino_variation"] = devil.dino_variation(features.unflatten(0, video.shape[:2]))
    parts["temporal_entropy"] = devil_frames.temporal_entropy(video, fps=fps)
    return parts


def _for_flow(video: Tensor, mode: devil.Mode) -> Tensor:
    """What the flow network sees: it maps [0,1] to [-1,1], and the published one 0..255."""
    return normalise(video, IMAGENET_MEAN, IMAGENET_STD) / 255 if mode == "devil" else video


def _segments(images: Tensor, viclip: Network, ratio: float, mode: devil.Mode, chunk_size: int | None) -> Tensor:
    """`devil.segment_distance` of videos [B,F,3,S,S] cut into segments of that part of their length: [B]."""
    index = devil.segment_indices(images.shape[1], ratio).to(images.device)
    segments = images[:, index]
    features = in_chunks(viclip, segments.flatten(0, 1), size=chunk_size)
    return devil.segment_distance(features.unflatten(0, segments.shape[:2]), mode=mode)


class PatchFeatures(nn.Module):
    """The patch tokens of a transformers `Dinov2Model`, normalised as its last layer does: [N,3,h,w] -> [N,P,D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels.to(next(self.model.parameters()).dtype)).last_hidden_state[:, 1:]


def load_patches(context: RewardContext) -> PatchFeatures:
    """DINOv2 ViT-L/14 (hub facebook/dinov2-large).

    Raises:
        MissingWeightsError, CorruptWeightsError: see `rewards.loading`; so in `load_devil`.
    """
    from transformers import Dinov2Config, Dinov2Model

    if context.weights == "pretrained":
        model = load_transformers(Dinov2Model, find_transformers(context, "DEVIL", _DINOV2))
        return PatchFeatures(frozen(model, context))
    warn_random("DINOv2")
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518}
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224}
    with seeded(context.seed):
        sizes: dict[str, Any] = tiny if context.scale == "tiny" else large
        model = Dinov2Model(Dinov2Config(**sizes, patch_size=14))
    return PatchFeatures(frozen(model, context))


def load_devil(context: RewardContext) -> DevilNetworks:
    """All networks of `dynamics_parts`: RAFT, DINO ViT-S/16, DINOv2 ViT-L/14 and ViCLIP; `vdm-env download DEVIL`."""
    viclip = build_viclip(context)

    def features(segments: Tensor) -> Tensor:
        side, frames = viclip.model.config.image_size, viclip.model.config.num_frames
        pixels = vader_squash(segments[:, :frames].flatten(0, 1), side).unflatten(0, (len(segments), -1))
        return unit(viclip.model.video_features(pixels))

    return DevilNetworks(
        flow=load_raft(context),
        dino=load_dino(context, _DINO, name="DEVIL"),
        patches=load_patches(context),
        viclip=features,
    )
