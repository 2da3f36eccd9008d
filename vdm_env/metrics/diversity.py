"""Diversity of the videos of one prompt, and agreement with human pairwise choices."""

from __future__ import annotations

import torch
from torch import Tensor


def diversity(features: Tensor, *, ddof: int = 1) -> Tensor:
    """Variance over N samples of one prompt, averaged over feature dims: [...,N,D] -> [...]; 0 for equal videos.

    Raises:
        ValueError: no more than `ddof` samples.
    """
    if features.ndim < 2 or features.shape[-2] <= ddof:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected [...,N,D] with N > ddof = {ddof}")
    return features.var(dim=-2, correction=ddof).mean(-1)


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
