"""The Gaussian over actions, with the log-probability that DDPO and the GRPO family mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class MeanNormal(torch.distributions.Distribution):
    """Diagonal Gaussian over a batch of latents whose `log_prob` is the mean over a video's elements.

    The mean, not the sum, is what DDPO and Flow-GRPO call log-probability and what gives clip ranges of 1e-4 their
    meaning; it is also what TorchRL's `ClipPPOLoss` calls. `log_prob_sum` is the true one, in nats.

    Args:
        loc: [B, ...] mean.
        scale: [B] standard deviation of each video's step, or broadcastable to loc; 0 where there is no noise: a sample
            is the mean there. `log_prob` of a video without any noise is 0; where only some elements have none (frames
            that are held), means are over the others.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc = loc
        self.scale = scale.reshape(scale.shape + (1,) * (loc.ndim - scale.ndim)) if scale.ndim < loc.ndim else scale
        super().__init__(loc.shape[:1], loc.shape[1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def deterministic_sample(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        return self.scale.expand_as(self.loc)

    def rsample(self, sample_shape: Sequence[int] | torch.Size = (), *, noise: Tensor | None = None) -> Tensor:
        """Loc + scale * noise; standard normal noise from torch's generator unless given."""
        if noise is None:
            noise = torch.randn(*sample_shape, *self.loc.shape, device=self.loc.device, dtype=self.loc.dtype)
        return self.loc + self.scale * noise

    def _log_density(self, value: Tensor) -> Tensor:
        noisy = self.scale > 0
        scale = torch.where(noisy, self.scale, torch.ones_like(self.scale))
        z = (value - self.loc) / scale
        return torch.where(noisy, -0.5 * z.square() - scale.log() - 0.5 * math.log(2 * math.pi), torch.zeros_like(z))

    def log_prob(self, value: Tensor) -> Tensor:
        """[B], mean over all non-batch elements."""
        return self._mean(self._log_density(value))

    def log_prob_sum(self, value: Tensor) -> Tensor:
        """[B] float64, nats."""
        return self._log_density(value).flatten(1).double().sum(1)

    def kl(self, other: MeanNormal, reduction: str = "sum") -> Tensor:
        """KL(self || other) [B] for equal scales: nats ("sum", float64) or per element ("mean"); 0 without noise."""
        noisy = self.scale > 0
        scale = torch.where(noisy, self.scale, torch.ones_like(self.scale))
        per_element = torch.where(noisy, 0.5 * ((self.loc - other.loc) / scale).square(), torch.zeros_like(self.loc))
        return per_element.flatten(1).double().sum(1) if reduction == "sum" else self._mean(per_element)

    def entropy(self) -> Tensor:
        """[B], mean over elements; 0 without noise."""
        scale = self.scale.expand_as(self.loc)
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        per_element = torch.where(scale > 0, safe.log() + 0.5 * math.log(2 * math.pi * math.e), torch.zeros_like(scale))
        return self._mean(per_element)

    def _mean(self, per_element: Tensor) -> Tensor:
        """[B], over the elements with noise; others are 0 already."""
        flat = per_element.flatten(1)
        if self.scale.numel() == len(self.loc):
            return flat.mean(1)
        noisy = (self.scale > 0).expand_as(self.loc).flatten(1).sum(1)
        return flat.sum(1) / noisy.clamp_min(1)
