"""Frechet video distance between two sets of features, and the frames-to-input steps of its two usual networks.

Source: FVD (Unterthiner et al., 2018) and content-debiased FVD (Ge et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Covariance = Literal["unbiased", "biased"]


def _moments(features: Tensor, covariance: str) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected [N,D] with N >= 2, one row a video")
    x = features.detach().double()
    centred = x - x.mean(0)
    divisor = x.shape[0] - (covariance == "unbiased")
    return x.mean(0), centred.T @ centred / divisor


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(real: Tensor, fake: Tensor, *, covariance: Covariance = "unbiased") -> Tensor:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two feature sets [N,D] and [M,D]; a float64 scalar >= 0.

    "unbiased" divides covariances by N - 1, as the first FVD code did; "biased" by N, as the content-debiased package
    does. The two differ visibly for few videos: compare only numbers of one convention.

    Raises:
        ValueError: shapes do not fit, or the convention has another name.
    """
    if covariance not in ("unbiased", "biased"):
        raise ValueError(f"unknown covariance convention {covariance!r}; expected 'unbiased' or 'biased'")
    (mean1, cov1), (mean2, cov2) = _moments(real, covariance), _moments(fake, covariance)
    if mean1.shape != mean2.shape:
        raise ValueError(f"feature widths {len(mean1)} and {len(mean2)} differ; use one network for both sets")
    # tr (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2), also where a covariance is singular.
    cross = torch.linalg.svdvals(_root(cov1) @ _root(cov2)).sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).clamp(min=0)


def _squash(videos: Tensor, side: int) -> Tensor:
    if videos.ndim != 5 or videos.shape[2] != 3 or not videos.is_floating_point():
        raise ValueError(f"videos are {videos.dtype} {tuple(videos.shape)}; expected floats in [0,1], [B,F,3,H,W]")
    small = F.interpolate(videos.flatten(0, 1), size=(side, side), mode="bilinear", align_corners=False)
    return small.unflatten(0, videos.shape[:2]).transpose(1, 2)


def i3d_input(videos: Tensor, side: int = 224) -> Tensor:
    """Videos [B,F,3,H,W] in [0,1] -> [B,3,F,side,side] in [-1,1]; bilinear without anti-aliasing, aspect lost."""
    return 2 * _squash(videos, side) - 1


def videomae_input(videos: Tensor, side: int = 224) -> Tensor:
    """Videos [B,F,3,H,W] in [0,1] -> [B,3,F,side,side] in [0,1]; no mean and std, as content-debiased FVD does it."""
    return _squash(videos, side)


def video_features(
    videos: Tensor, network: Callable[[Tensor], Tensor], prepare: Callable[[Tensor], Tensor], *, chunk_size: int = 8
) -> Tensor:
    """Features [N,D] of videos [N,F,3,H,W] in [0,1], for `frechet_distance` or `diversity.diversity`.

    Args:
        videos: as many frames as the network takes.
        network: prepared videos [n,3,F,side,side] -> [n,D], or tokens [n,P,D], which are averaged.
        prepare: `i3d_input` or `videomae_input`.
        chunk_size: videos at a time.

    Raises:
        ValueError: features of another shape.
    """
    with torch.no_grad():
        features = torch.cat([network(prepare(part)) for part in videos.split(chunk_size)])
    features = features.mean(1) if features.ndim == 3 else features
    if features.ndim != 2 or len(features) != len(videos):
        raise ValueError(f"the network returned {tuple(features.shape)} for {len(videos)} videos; expected [N,D]")
    return features
