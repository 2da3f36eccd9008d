"""Sums of rewards: weighted, each normalised against a mean and deviation measured beforehand.

Rewards live on scales of their own (a cosine, a probability, kB), so a plain sum follows the part that varies most.
`calibrate` measures every part's mean and deviation on a set of videos once; `WeightedSum.config` holds the numbers,
in a form that JSON takes and `vdm_env.make(reward=...)` reads, so that a run can be repeated with the very same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

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

    @property
    def config(self) -> dict[str, dict[str, float]]:
        """{part: {"weight": ..., "mean": ..., "std": ...}}, for a file or for `vdm_env.make(reward=...)`."""
        return {p.reward.name: {"weight": p.weight, "mean": p.mean, "std": p.std} for p in self.terms}

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        return self.score_parts(video, prompts)[0]

    def check_num_frames(self, count: int) -> None:
        """Raises ValueError where a part cannot score its frames of that many; repeated ones do not count."""
        for part in self.terms:
            if hasattr(part.reward, "check_num_frames"):
                chosen = self._own_frames(part.reward, count)
                part.reward.check_num_frames(count if chosen is None else len(chosen.unique()))

    def _own_frames(self, reward: Reward, count: int) -> Tensor | None:
        """Which of `count` frames a part sees; None: all."""
        if self._shared or reward.frames == "all" or is_random(reward.frames):
            return None
        return select_frames(reward.frames, count)

    def _score(self, reward: Reward, video: Tensor, prompts: list[str]) -> Tensor:
        chosen = self._own_frames(reward, video.shape[1])
        if chosen is not None:
            video = video[:, chosen.to(video.device)]
        return validate_scores(reward(video, prompts), len(video), reward.name)


def _ends(part: Part) -> tuple[float, float]:
    """Bounds of one term."""
    if part.weight == 0:
        return 0.0, 0.0  # also where the reward is unbounded
    low, high = sorted(part.weight * (bound - part.mean) / part.std for bound in part.reward.range)
    return low, high


@torch.no_grad()
def calibrate(
    reward: Reward | Sequence[Part], videos: Iterable[tuple[Tensor, list[str]]], *, least: float = 1e-6
) -> WeightedSum:
    """The same sum, every part normalised against its own mean and deviation over a calibration set.

    Weights stay; means and deviations that the parts had are replaced. Videos of the untrained model are the usual set:
    scores of the sum then start around 0, and a weight says how many deviations of one part are worth one of another.

    Args:
        reward: a `WeightedSum`, one reward, or parts.
        videos: batches (video [B,F,3,H,W] in [0,1], B prompts), all frames, two videos or more in all.
        least: the smallest deviation that is worth dividing by, relative to the size of the mean.

    Raises:
        ValueError: fewer than two videos, scores that are not finite, or a part that gave all of them the same score.
    """
    if isinstance(reward, WeightedSum):
        parts: Sequence[Part] = reward.terms
    else:
        parts = reward if isinstance(reward, Sequence) else [Part(reward=reward)]
    total = WeightedSum([replace(part, mean=0.0, std=1.0) for part in parts])
    batches = [total.score_parts(video, prompts)[1] for video, prompts in videos]
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    if count < 2:
        raise ValueError(f"a deviation needs at least two videos, got {count}; give a larger calibration set")
    measured = []
    for part in parts:
        scores = torch.cat([batch[part.reward.name].double().cpu() for batch in batches])
        mean, std = float(scores.mean()), float(scores.std())
        if not std > least * max(1e-12, abs(mean)):
            raise ValueError(
                f"part {part.reward.name!r} gave all {count} videos of the calibration set the score {mean:g} "
                f"(deviation {std:g}), so there is nothing to normalise by; give more different videos, "
                "or leave the part out"
            )
        measured.append(replace(part, mean=mean, std=std))
    return WeightedSum(measured)
