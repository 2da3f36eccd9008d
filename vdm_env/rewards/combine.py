"""Sums of rewards: weighted, each normalised against a mean and deviation measured beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_env.rewards.base import FramePolicy, Reward, is_random, select_frames, validate_scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One term: weight * (score - mean) / std."""

    reward: Reward
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) for v in (self.weight, self.mean, self.std)) or self.std <= 0:
            raise ValueError(
                f"part {self.reward.name!r}: weight, mean and std must be finite and std > 0, "
                f"got weight={self.weight}, mean={self.mean}, std={self.std}"
            )


class WeightedSum:
    """sum_i w_i (r_i - mean_i) / std_i; differentiable where all parts are.

    Where the parts want different frames it asks for all and hands each part its own; a part with a random policy then
    sees all of them, whose mean is what the random frame estimates.

    Raises:
        ValueError: no parts, or two of the same name.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        names = [part.reward.name for part in parts]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a sum of rewards needs parts with different names, got {names}")
        self.terms = tuple(parts)
        self.name = "+".join(n if p.weight == 1.0 else f"{p.weight:g}*{n}" for n, p in zip(names, parts, strict=True))
        self.differentiable = all(part.reward.differentiable for part in parts)
        policies = [part.reward.frames for part in parts]
        self._shared = all(policy == policies[0] for policy in policies)
        self.frames: FramePolicy = policies[0] if self._shared else "all"
        ends = [_ends(part) for part in parts]
        self.range = (sum(low for low, _ in ends), sum(high for _, high in ends))

    def score_parts(self, video: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum [B] and every part's own score, before weight and normalisation, {name: [B]}."""
        scores = {p.reward.name: self._score(p.reward, video, prompts) for p in self.terms}
        terms = [part.weight * (scores[part.reward.name] - part.mean) / part.std for part in self.terms]
        return torch.stack(terms).sum(0), scores

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        return self.score_parts(video, prompts)[0]

    def _score(self, reward: Reward, video: Tensor, prompts: list[str]) -> Tensor:
        if not self._shared and reward.frames != "all" and not is_random(reward.frames):
            video = video[:, select_frames(reward.frames, video.shape[1]).to(video.device)]
        return validate_scores(reward(video, prompts), len(video), reward.name)


def _ends(part: Part) -> tuple[float, float]:
    """Bounds of one term."""
    if part.weight == 0:
        return 0.0, 0.0  # also where the reward is unbounded
    low, high = sorted(part.weight * (bound - part.mean) / part.std for bound in part.reward.range)
    return low, high
