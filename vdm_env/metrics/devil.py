"""DEVIL: how much happens in videos, how well that follows the prompts, and quality at equal dynamics.

Source: DEVIL (Liao et al. 2024, arXiv:2407.01094), MingXiangL/DEVIL. This file is arithmetic on features and scores;
`devil_measure` gets the parts of a dynamics score from videos. The weights of the regressions to that score are not
part of the published code and are arguments: without them the absolute score cannot be had, its parts can. The default
mends what the published code gets wrong; `mode="devil"` does as it does, for numbers to be put beside published ones.

Legend: F frames, D features, V videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_env.rewards.tensors import at_least_float32

Mode = Literal["corrected", "devil"]
LEVELS: Mapping[str, tuple[str, ...]] = {
    "inter_frame": ("flow", "ssim", "phash"),
    "inter_segment": ("dino_segment", "viclip_segment"),
    "video": ("dino_variation", "temporal_entropy"),
}
"""what the three regressions to the dynamics score take, in this order"""
GRADES = ("static", "low", "medium", "high", "very_high")
"""how dynamic a prompt asks a video to be: 0 to 4"""


def check_mode(mode: str) -> None:
    """Raises ValueError unless it is a mode."""
    if mode not in ("corrected", "devil"):
        raise ValueError(f"mode={mode!r} is unknown; expected 'corrected' or 'devil'")


def _unit(features: Tensor, rows: int) -> Tensor:
    if features.ndim < 2 or features.shape[-2] < rows:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected [...,F,D] with F >= {rows}")
    return F.normalize(at_least_float32(features), dim=-1)


def dino_variation(features: Tensor) -> Tensor:
    """Mean distance 1 - cos of the frames to their mean: DINO ViT-S/16 features [...,F,D] -> [...], >= 0."""
    unit = _unit(features, 1)
    return (1 - F.cosine_similarity(unit, unit.mean(-2, keepdim=True), dim=-1)).mean(-1)


def dino_segment_distance(features: Tensor) -> Tensor:
    """Mean over lags k = F // 8, ..., F - 1 of |1 - mean_t f_t . f_{t+k}|: DINOv2 features [...,F,D] -> [...].

    Lags begin at 1 for videos of fewer than 8 frames, where the published code takes lag 0 and fails.

    Raises:
        ValueError: fewer than two frames.
    """
    unit = _unit(features, 2)
    frames = unit.shape[-2]
    lags = range(max(1, frames // 8), frames)
    parts = [(1 - (unit[..., :-k, :] * unit[..., k:, :]).sum(-1).mean(-1)).abs() for k in lags]
    return torch.stack(parts).mean(0)


def segment_indices(num_frames: int, ratio: float, *, length: int = 8) -> Tensor:
    """Which frames enter each segment: int64 [S,length], for S segments of int(F * ratio) frames.

    A last segment that is shorter repeats its frames in place up to that; then segments are thinned out evenly to
    `length` frames or repeat their last one.

    Raises:
        ValueError: a segment would have no frame.
    """
    size = int(num_frames * ratio)
    if size < 1 or length < 1:
        raise ValueError(
            f"segments of {ratio} of {num_frames} frames have {size}, and {length} are wanted of each; expected at "
            "least one: give a larger ratio"
        )
    segments = []
    for start in range(0, num_frames, size):
        own = torch.arange(start, min(start + size, num_frames))
        if len(own) < size:
            own = own.repeat_interleave(size // len(own) + 1)[:size]
        pick = torch.linspace(0, size - 1, length).long() if size > length else torch.arange(length).clamp(max=size - 1)
        segments.append(own[pick])
    return torch.stack(segments)


def segment_distance(features: Tensor, *, mode: Mode = "corrected") -> Tensor:
    """Mean distance 1 - cos over the pairs of segments: ViCLIP features [...,S,D] -> [...]; 0 for one segment.

    "devil" counts each segment's likeness to itself as a pair too, which shrinks the distance by (S - 1) / (S + 1).
    """
    check_mode(mode)
    unit = _unit(features, 1)
    first = 0 if mode == "devil" else 1
    row, column = torch.triu_indices(unit.shape[-2], unit.shape[-2], offset=first, device=unit.device)
    if len(row) == 0:
        return unit.new_zeros(unit.shape[:-2])
    return 1 - (unit[..., row, :] * unit[..., column, :]).sum(-1).mean(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Regression:
    """A linear regression of one level: clip(weights . values + intercept, 0, 1)."""

    weights: tuple[float, ...]
    intercept: float = 0.0

    def __call__(self, values: Tensor) -> Tensor:
        """[V,K] -> [V] in [0,1]."""
        if values.ndim != 2 or values.shape[1] != len(self.weights):
            raise ValueError(f"values have shape {tuple(values.shape)}, expected [V,{len(self.weights)}]")
        return (values @ values.new_tensor(self.weights) + self.intercept).clamp(0, 1)


def dynamics_score(parts: Mapping[str, Tensor], regressions: Mapping[str, Regression]) -> Tensor:
    """Mean of the three levels' regressions: [V] in [0,1].

    Args:
        parts: {name: [V]}, every name in `LEVELS`.
        regressions: one for each level of `LEVELS`, its weights in the order given there.

    Raises:
        ValueError: a part or a level is missing.
    """
    names = [name for level in LEVELS.values() for name in level]
    missing = sorted((set(names) - set(parts)) | (set(LEVELS) - set(regressions)))
    if missing:
        raise ValueError(
            f"missing {missing}; a dynamics score needs the parts {names} and a regression for each of {list(LEVELS)}"
        )
    levels = [regressions[level](torch.stack([parts[name] for name in own], 1)) for level, own in LEVELS.items()]
    return torch.stack(levels).mean(0)


def dynamics_range(scores: Tensor) -> Tensor:
    """99th minus 1st percentile of dynamics scores [V], linear between values: []."""
    levels = torch.tensor([0.01, 0.99], dtype=scores.dtype, device=scores.device)
    low, high = torch.quantile(scores, levels)
    return high - low


def controllability(scores: Tensor, grades: Tensor) -> Tensor:
    """How often the video whose prompt asks for more dynamics has more: [] in [0,1]; 1/2 by chance.

    The mean over videos of the share of concordant pairs with the videos of other grades; a tie is not concordant.

    Args:
        scores: dynamics [V].
        grades: of the prompts, [V], larger for more; see `GRADES`.

    Raises:
        ValueError: lengths that differ, or fewer than two different grades.
    """
    if scores.ndim != 1 or scores.shape != grades.shape or len(grades.unique()) < 2:
        raise ValueError(
            f"{tuple(scores.shape)} scores with {tuple(grades.shape)} grades; expected as many, of at least two grades"
        )
    other = grades[:, None] != grades[None]
    order = (scores[:, None] - scores[None]).sign() * (grades[:, None] - grades[None]).sign()
    return ((order > 0).sum(1) / other.sum(1).to(scores.dtype)).mean()


def quality_by_dynamics(
    scores: Tensor, quality: Tensor, *, bins: int = 12, mode: Mode = "corrected"
) -> tuple[Tensor, Tensor]:
    """Quality at equal dynamics: its mean in each of `bins` equal spans of [0,1], [bins], and the mean of these, [].

    A model that makes only still videos gets no advantage from their being easy.

    Args:
        scores: dynamics in [0,1], [V].
        quality: [V].
        bins: at least 1.
        mode: by default an empty bin is NaN and left out of the mean, and a score of 1 is in the last bin. "devil"
            counts empty bins 0, so that a narrow range lowers the quality, and drops videos with a score of exactly 1.

    Raises:
        ValueError: lengths that differ, a score outside [0,1], or no bin.
    """
    check_mode(mode)
    if scores.ndim != 1 or scores.shape != quality.shape or not len(scores) or bins < 1:
        raise ValueError(f"{tuple(scores.shape)} scores, {tuple(quality.shape)} qualities, {bins} bins; expected equal")
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        raise ValueError("dynamics scores must be in [0,1]; those of `dynamics_score` are")
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=scores.device)
    place = torch.bucketize(scores.double(), edges, right=True) - 1
    if mode == "corrected":
        place = place.clamp(max=bins - 1)
    inside = place < bins
    values, place = quality.double()[inside], place[inside]
    count = torch.bincount(place, minlength=bins)
    means = torch.zeros(bins, dtype=torch.float64, device=scores.device).index_add(0, place, values) / count
    means = means.nan_to_num(nan=0.0) if mode == "devil" else means
    return means, means.nanmean()


def thirds(bin_means: Sequence[float] | Tensor) -> tuple[float, float, float]:
    """Mean quality at low, middle and high dynamics: a third of the bins each; empty ones (NaN) are left out.

    Raises:
        ValueError: a number of bins that 3 does not divide.
    """
    values = torch.as_tensor(bin_means, dtype=torch.float64)
    if len(values) == 0 or len(values) % 3:
        raise ValueError(f"{len(values)} bins; expected a multiple of 3 (DEVIL: 12)")
    low, middle, high = values.view(3, -1).nanmean(1).tolist()
    return low, middle, high
