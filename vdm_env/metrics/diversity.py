"""Diversity of the videos of one prompt, and agreement with human pairwise choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vdm_env.rewards.action import ActionReward
from vdm_env.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalise
from vdm_env.rewards.tensors import at_least_float32, fit_frames, in_chunks


def diversity(features: Tensor, *, ddof: int = 1) -> Tensor:
    """Variance over N samples of one prompt, averaged over feature dims: [...,N,D] -> [...]; 0 for equal videos.

    Raises:
        ValueError: no more than `ddof` samples.
    """
    if features.ndim < 2 or features.shape[-2] <= ddof:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected [...,N,D] with N > ddof = {ddof}")
    return features.var(dim=-2, correction=ddof).mean(-1)


def prompt_diversity(features: Tensor, prompts: Sequence[str], *, ddof: int = 1) -> Tensor:
    """Mean of `diversity` over the different prompts: features [N,D] of N videos and their prompts -> [].

    VADER (Prabhudesai et al. 2024, arXiv:2407.08737) reports the variance of VideoMAE features so; its code is not
    public, and `videomae_features` with ddof 1 is the definition chosen here.

    Raises:
        ValueError: lengths that differ, or a prompt with no more than `ddof` videos.
    """
    if features.ndim != 2 or len(features) != len(prompts) or not len(prompts):
        raise ValueError(
            f"features have shape {tuple(features.shape)} for {len(prompts)} prompts; expected [N,D] for N"
        )
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    few = [prompt for prompt, rows in groups.items() if len(rows) <= ddof]
    if few:
        raise ValueError(f"diversity needs more than {ddof} videos of each prompt; there are too few of {few[:4]}")
    return torch.stack([diversity(features[rows], ddof=ddof) for rows in groups.values()]).mean()


@torch.no_grad()
def videomae_features(video: Tensor, classifier: ActionReward, *, chunk_size: int | None = None) -> Tensor:
    """Mean of the last states of a VideoMAE over its tokens: [B,F,3,H,W] in [0,1] -> [B,D].

    Args:
        video: at least as many frames as the network takes; more are thinned out evenly.
        classifier: holds the network and its pre-processing, see `rewards.action.build_action`.
        chunk_size: videos at a time; None: all.

    Raises:
        ValueError: too few frames.
    """
    network: Any = classifier.model
    video = fit_frames(video, classifier.num_frames, "VideoMAE features")

    def features(part: Tensor) -> Tensor:
        frames = normalise(classifier.preprocess(part.flatten(0, 1), classifier.side), IMAGENET_MEAN, IMAGENET_STD)
        pixels = frames.unflatten(0, part.shape[:2]).to(next(network.parameters()).dtype)
        return at_least_float32(network.videomae(pixel_values=pixels).last_hidden_state).mean(1)

    return in_chunks(features, video, size=chunk_size)


def two_afc(distance0: Tensor, distance1: Tensor, human: Tensor) -> Tensor:
    """Mean agreement [] with raters over pairs [N]; the smaller distance is the choice (negate rewards), a tie is 1/2.

    `human` [N] in [0,1] is the fraction of raters who chose item 1. Source: LPIPS (Zhang et al., 2018).

    Raises:
        ValueError: shapes differ or there is no pair.
    """
    if not distance0.shape == distance1.shape == human.shape or human.numel() == 0:
        shapes = [tuple(t.shape) for t in (distance0, distance1, human)]
        raise ValueError(f"shapes {shapes}; expected three equal, non-empty ones")
    choose1 = torch.where(distance0 == distance1, 0.5, (distance1 < distance0).to(human.dtype))
    return torch.where(distance0 == distance1, choose1, choose1 * human + (1 - choose1) * (1 - human)).mean()
