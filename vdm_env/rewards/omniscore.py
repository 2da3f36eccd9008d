"""OmniScore: one number for a video out of scores of its frames, its motion and its agreement with the prompt.

    OmniScore = sum_i w_i n_i / sum_i w_i,   n_i = (s_i - low_i) / (high_i - low_i)

n_i is not clipped. Sub-scores are any rewards; a `SubScore` says how one counts, and a set of them is fixed when the
reward is made, so that scores of different runs can be compared.

Source: VideoDPO (Liu et al. 2024, arXiv:2412.14167) combines aesthetic quality, imaging quality, subject consistency,
background consistency, motion smoothness, dynamic degree, temporal flickering and text-video consistency.
Deviation: how it combines them is not public. The form, and the ranges and weights of `VBENCH`, are those of VBench's
dimensions (Huang et al. 2024, arXiv:2311.17982), from which the names come; its 4 : 1 of quality and semantic scores
(`metrics.vbench_scores`) is left out. Scores are not comparable with published OmniScores.
Deviation: the built-in sets leave out imaging quality, because MUSIQ needs a package of its own. To load one network
fewer for each of them they also leave out subject consistency (by DINO, `metrics.vbench_networks`), and measure motion
in pixels (`metrics.temporal`) and not by optical flow (RAFT, `metrics.flow`), and agreement with the prompt by CLIP and
not by ViCLIP (`rewards.viclip`); give your own sub-scores for more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from vdm_env.metrics.temporal import dynamic_degree, frame_consistency, motion_smoothness, temporal_flicker
from vdm_env.rewards.action import build_action
from vdm_env.rewards.aesthetic import build_aesthetic
from vdm_env.rewards.base import FramePolicy, Reward, ScoreFunction, as_reward, check_inputs
from vdm_env.rewards.clip import ClipReward, frame_features
from vdm_env.rewards.clip_loading import build_clip_score, build_hps
from vdm_env.rewards.combine import Part, WeightedSum
from vdm_env.rewards.loading import RewardContext


@dataclass(frozen=True, kw_only=True, slots=True)
class SubScore:
    """How one sub-score counts: weight * (score - low) / (high - low)."""

    weight: float = 1.0
    """>= 0, relative to the others"""
    low: float = 0.0
    """the score that counts 0"""
    high: float = 1.0
    """the score that counts 1, > low"""

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and math.isfinite(self.weight) and -math.inf < self.low < self.high < math.inf):
            raise ValueError(f"{self}: expected a finite weight >= 0 and finite low < high")


Terms = Mapping[str, SubScore]

VBENCH: Terms = MappingProxyType(
    {
        "SubjectConsistency": SubScore(low=0.1462),
        "BackgroundConsistency": SubScore(low=0.2615),
        "TemporalFlicker": SubScore(low=0.6293),
        "MotionSmoothness": SubScore(low=0.706, high=0.9975),
        "DynamicDegree": SubScore(weight=0.5),
        "Aesthetic": SubScore(high=10.0),
        "Imaging": SubScore(),
        "CLIP": SubScore(high=36.4),
    }
)
"""VBench's ranges and weights; its aesthetic score is the predictor's / 10, its overall consistency a cosine up to
0.364 (of ViCLIP; here 100 times CLIP's)"""
GENERAL = ("BackgroundConsistency", "TemporalFlicker", "MotionSmoothness", "DynamicDegree", "Aesthetic", "CLIP")
"""those of VBENCH that `build_omniscore` makes for models without a world of their own"""
MOVING_SHAPES: Terms = MappingProxyType(
    {
        "HPS": SubScore(low=0.21, high=0.63),
        "Aesthetic": SubScore(low=7.75, high=9.36),
        "Action": SubScore(low=0.0, high=0.95),
        "TemporalFlicker": SubScore(weight=0.5, low=0.970, high=0.988),
        "MotionSmoothness": SubScore(weight=0.5, low=0.975, high=0.991),
        "DynamicDegree": SubScore(weight=0.5, low=0.08, high=0.38),
    }
)
"""of the embedded world: 0 and 1 are about the 5th and 95th percentile of 160 videos of the untrained MovingShapes (5
steps, no guidance, training prompts, stream seed 0); the two steadiness scores count half, because measured in pixels
they also punish the motion that the prompt asks for"""


class OmniScore:
    """Weighted mean of normalised sub-scores; differentiable where all of them are.

    Args:
        rewards: {name: reward or function of (video, prompts)}, the sub-scores.
        terms: {name: SubScore}, how each counts; the same names. `VBENCH` has VBench's, take of it what you have.
        name: as it is called in logs.

    Raises:
        ValueError: names that differ, or no weight above 0.
    """

    def __init__(self, rewards: Mapping[str, Reward | ScoreFunction], terms: Terms, *, name: str = "OmniScore") -> None:
        if set(rewards) != set(terms):
            raise ValueError(
                f"the sub-scores are {sorted(rewards)}, but terms say how {sorted(terms)} count; give the same names, "
                f"such as terms={{name: VBENCH[name] for name in rewards}}"
            )
        total = sum(term.weight for term in terms.values())
        if not total > 0:
            raise ValueError("no sub-score has a weight above 0, and so nothing would count; raise one")
        self.name = name
        self.config: dict[str, SubScore] = dict(terms)
        self._sum = WeightedSum(
            [
                Part(
                    reward=as_reward(rewards[key], name=key),
                    weight=term.weight / total,
                    mean=term.low,
                    std=term.high - term.low,
                )
                for key, term in terms.items()
            ]
        )
        self.differentiable = self._sum.differentiable
        self.frames: FramePolicy = self._sum.frames
        self.range = self._sum.range

    def check_num_frames(self, count: int) -> None:
        """Raises ValueError where a sub-score cannot score a video of that many frames."""
        self._sum.check_num_frames(count)

    def score_parts(self, video: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The score [B] and every sub-score as its reward gave it, {name: [B]}."""
        return self._sum.score_parts(video, prompts)

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        return self.score_parts(video, prompts)[0]


def motion_scores() -> dict[str, Reward]:
    """The sub-scores that need no network: TemporalFlicker, MotionSmoothness, DynamicDegree, each in [0, 1]."""
    measures = {
        "TemporalFlicker": temporal_flicker,
        "MotionSmoothness": motion_smoothness,
        "DynamicDegree": dynamic_degree,
    }
    least = {"TemporalFlicker": 2, "MotionSmoothness": 3, "DynamicDegree": 2}

    def reward(name: str) -> Reward:
        def score(video: Tensor, prompts: list[str]) -> Tensor:
            check_inputs(video, prompts, name)
            return measures[name](video if video.dtype.itemsize > 2 else video.float())

        return as_reward(score, name=name, range=(0.0, 1.0), least_frames=least[name])

    return {name: reward(name) for name in measures}


def background_consistency(clip: ClipReward) -> Reward:
    """Likeness of the frames to the one before and the first, in [0, 1], by a CLIP reward's image tower."""

    def score(video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, "BackgroundConsistency")
        return frame_consistency(frame_features(clip.backbone, video, clip.preprocess, clip.chunk_size))

    return as_reward(score, name="BackgroundConsistency", range=(0.0, 1.0), least_frames=2)


def build_omniscore(context: RewardContext) -> OmniScore:
    """MovingShapes' own set, or GENERAL of VBENCH by CLIP, the aesthetic predictor and `metrics.temporal`."""
    rewards: dict[str, Reward | ScoreFunction] = {**motion_scores(), "Aesthetic": build_aesthetic(context)}
    if context.world is not None:
        return OmniScore(rewards | {"HPS": build_hps(context), "Action": build_action(context)}, MOVING_SHAPES)
    clip = build_clip_score(context)
    rewards |= {"BackgroundConsistency": background_consistency(clip), "CLIP": clip}
    return OmniScore(rewards, {name: VBENCH[name] for name in GENERAL})
