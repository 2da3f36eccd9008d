"""How VBench turns the scores of its dimensions into quality, semantic and total scores. Plain numbers, no networks.

    n_d = (s_d - low_d) / (high_d - low_d),   group = sum_d w_d n_d / sum_d w_d,   total = (4 quality + semantic) / 5

n_d is not clipped. Source: VBench (Huang et al. 2024, arXiv:2311.17982); ranges and weights of the repository
Vchitect/VBench, for text-to-video and (VBench++, arXiv:2411.13503) image-to-video.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Missing = Literal["refuse", "zero", "leave_out"]


@dataclass(frozen=True, slots=True)
class Scale:
    """The range of a dimension's raw score that counts 0 to 1, and its weight in its group."""

    low: float
    high: float
    weight: float = 1.0


QUALITY: Mapping[str, Scale] = MappingProxyType(
    {
        "subject consistency": Scale(0.1462, 1.0),
        "background consistency": Scale(0.2615, 1.0),
        "temporal flickering": Scale(0.6293, 1.0),
        "motion smoothness": Scale(0.706, 0.9975),
        "aesthetic quality": Scale(0.0, 1.0),
        "imaging quality": Scale(0.0, 1.0),
        "dynamic degree": Scale(0.0, 1.0, 0.5),
    }
)
SEMANTIC: Mapping[str, Scale] = MappingProxyType(
    {
        "object class": Scale(0.0, 1.0),
        "multiple objects": Scale(0.0, 1.0),
        "human action": Scale(0.0, 1.0),
        "color": Scale(0.0, 1.0),
        "spatial relationship": Scale(0.0, 1.0),
        "scene": Scale(0.0, 0.8222),
        "appearance style": Scale(0.0009, 0.2855),
        "temporal style": Scale(0.0, 0.364),
        "overall consistency": Scale(0.0, 0.364),
    }
)
IMAGE_TO_VIDEO: Mapping[str, Scale] = MappingProxyType(
    {
        "Video-Text Camera Motion": Scale(0.0, 1.0, 0.1),
        "Video-Image Subject Consistency": Scale(0.1462, 1.0),
        "Video-Image Background Consistency": Scale(0.2615, 1.0),
    }
)
IMAGE_TO_VIDEO_QUALITY: Mapping[str, Scale] = MappingProxyType(
    {name.title(): scale for name, scale in QUALITY.items() if name != "temporal flickering"}
)
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0


def normalise(raw: Mapping[str, float], scales: Mapping[str, Scale]) -> dict[str, float]:
    """(score - low) / (high - low) for each dimension of `raw`; neither clipped nor weighted.

    Raises:
        ValueError: a dimension that `scales` does not have, or a score that is not finite.
    """
    unknown = sorted(set(raw) - set(scales))
    if unknown:
        raise ValueError(f"unknown dimensions {unknown}; expected some of {list(scales)}")
    bad = {name: value for name, value in raw.items() if not math.isfinite(value)}
    if bad:
        raise ValueError(f"scores that are not finite: {bad}; leave these dimensions out, or measure them again")
    return {name: (value - scales[name].low) / (scales[name].high - scales[name].low) for name, value in raw.items()}


def group_score(raw: Mapping[str, float], scales: Mapping[str, Scale], *, missing: Missing = "refuse") -> float:
    """Weighted mean of the normalised scores of one group.

    Args:
        raw: {dimension: score}, dimensions of `scales` only.
        scales: `QUALITY`, `SEMANTIC`, `IMAGE_TO_VIDEO` or `IMAGE_TO_VIDEO_QUALITY`.
        missing: what happens to dimensions that `raw` does not have: "refuse"; "leave_out" takes the mean over the
            others, which is comparable only with means over the same ones; "zero" counts a raw 0 as VBench's script
            does, which may be far below the worst video (a normalised -2.4 for motion smoothness).

    Raises:
        ValueError: see `normalise`; a missing dimension; no dimension at all; an unknown option.
    """
    if missing not in ("refuse", "zero", "leave_out"):
        raise ValueError(f"missing={missing!r} is unknown; expected 'refuse', 'zero' or 'leave_out'")
    absent = [name for name in scales if name not in raw]
    if absent and missing == "refuse":
        raise ValueError(
            f"there are no scores for {absent}: measure them, or choose missing='leave_out' (the mean over the others) "
            "or missing='zero' (as VBench's script counts them)"
        )
    values = normalise({name: 0.0 for name in absent if missing == "zero"} | dict(raw), scales)
    total = sum(scales[name].weight for name in values)
    if not values:
        raise ValueError(f"no dimension has a score; expected some of {list(scales)}")
    return sum(scales[name].weight * value for name, value in values.items()) / total


def quality_score(raw: Mapping[str, float], *, missing: Missing = "refuse") -> float:
    """VBench's quality score from those of `raw` that are quality dimensions; see `group_score`."""
    return group_score({name: value for name, value in raw.items() if name in QUALITY}, QUALITY, missing=missing)


def semantic_score(raw: Mapping[str, float], *, missing: Missing = "refuse") -> float:
    """VBench's semantic score from those of `raw` that are semantic dimensions; see `group_score`."""
    return group_score({name: value for name, value in raw.items() if name in SEMANTIC}, SEMANTIC, missing=missing)


def total_score(quality: float, semantic: float) -> float:
    """(4 quality + semantic) / 5."""
    return (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)


def image_to_video_total(agreement: float, quality: float) -> float:
    """The mean of the two group scores of VBench's image-to-video suite, which weigh the same."""
    return (agreement + quality) / 2


def mean_score(per_video: Sequence[float], counts: Sequence[int] | None = None) -> float:
    """One score of a dimension over videos.

    Without `counts` every video weighs the same, as on VBench's several-process path; its single-process path weighs
    the consistency of a video by its frames: give those compared in each (frames - 1) as `counts`. The two agree for
    videos of one length.

    Raises:
        ValueError: no video, lengths that differ, or a count below 1.
    """
    weights = [1] * len(per_video) if counts is None else list(counts)
    if not per_video or len(weights) != len(per_video) or min(weights) < 1:
        raise ValueError(f"{len(per_video)} scores and counts {weights[:8]}; expected as many counts >= 1 as scores")
    return sum(w * s for w, s in zip(weights, per_video, strict=True)) / sum(weights)
