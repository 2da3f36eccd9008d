"""Reward models: videos and prompts in, one score a video out.

`REWARDS` names the built-in ones; `RewardContext` says what they are built from; `as_reward` makes one of any callable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vdm_env.rewards.action import build_action
from vdm_env.rewards.aesthetic import build_aesthetic, build_aesthetic_v1
from vdm_env.rewards.analytic import build_brightness, build_jpeg
from vdm_env.rewards.base import (
    FramePolicy,
    Reward,
    as_reward,
    check_frames,
    score_parts,
    select_frames,
    validate_scores,
)
from vdm_env.rewards.chunked import Chunked
from vdm_env.rewards.clip_loading import build_clip_score, build_hps, build_hpsv2, build_hpsv21, build_pick_score
from vdm_env.rewards.combine import Part, WeightedSum, calibrate
from vdm_env.rewards.grounding_dino import build_object_removal_dino
from vdm_env.rewards.image_reward import build_image_reward
from vdm_env.rewards.jpeg_surrogate import build_jpeg_surrogate
from vdm_env.rewards.loading import RewardContext
from vdm_env.rewards.motion import build_motion
from vdm_env.rewards.object_removal import build_object_removal
from vdm_env.rewards.omniscore import build_omniscore
from vdm_env.rewards.remote import RemoteReward
from vdm_env.rewards.vader_heads import build_compression, build_rainy, build_snowy
from vdm_env.rewards.viclip import build_viclip
from vdm_env.rewards.videoalign import DIMENSIONS as VIDEOALIGN_DIMENSIONS
from vdm_env.rewards.videoalign import build_videoalign
from vdm_env.rewards.videoscore import DIMENSIONS as VIDEOSCORE_DIMENSIONS
from vdm_env.rewards.videoscore import build_videoscore
from vdm_env.rewards.vjepa import build_vjepa
from vdm_env.rewards.vjepa2 import build_vjepa2
from vdm_env.rewards.vlm_judge import VLMJudge


class RewardEntry(NamedTuple):
    """A built-in reward: how to build it, one line about it, whether gradients reach the pixels."""

    build: Callable[[RewardContext], Reward]
    summary: str
    differentiable: bool
    published: bool = False
    """the name is that of one published network, which an embedded world does not have"""
    dimensions: tuple[str, ...] = ()
    """scores of its own that can be asked for by name, as in "VideoScore:temporal\""""


REWARDS: dict[str, RewardEntry] = {
    "HPS": RewardEntry(build_hps, "Human Preference Score v2.1: frame against prompt, cosine in [-1, 1]", True),
    "HPSv2": RewardEntry(build_hpsv2, "Human Preference Score v2.0, by its published name", True, published=True),
    "HPSv2.1": RewardEntry(build_hpsv21, "Human Preference Score v2.1, by its published name", True, published=True),
    "PickScore": RewardEntry(
        build_pick_score, "PickScore v1: frame against prompt, cosine times its temperature", True
    ),
    "CLIP": RewardEntry(build_clip_score, "CLIPScore: 100 times the cosine of frame and prompt", True),
    "Aesthetic": RewardEntry(build_aesthetic, "LAION aesthetic predictor V2: about 1 to 10, whatever the prompt", True),
    "AestheticV1": RewardEntry(
        build_aesthetic_v1,
        "LAION aesthetic predictor V1, VBench's: about 1 to 10, whatever the prompt",
        True,
        published=True,
    ),
    "Action": RewardEntry(build_action, "probability of the action the prompt names, by a VideoMAE classifier", True),
    "OmniScore": RewardEntry(build_omniscore, "frames, motion and prompt in one number, after VideoDPO", True),
    "Compression": RewardEntry(
        build_compression, "minus the JPEG size that a head on CLIP predicts, kB", True, published=True
    ),
    "Rainy": RewardEntry(build_rainy, "probability that frames show rain, by a head on CLIP", True, published=True),
    "Snowy": RewardEntry(build_snowy, "probability that frames show snow, by a head on CLIP", True, published=True),
    "ObjectRemoval": RewardEntry(build_object_removal, "absence of an object (a book), by YOLOS", True, published=True),
    "ObjectRemovalDINO": RewardEntry(
        build_object_removal_dino, "absence of an object (a book), by Grounding DINO", True, published=True
    ),
    "VJEPA": RewardEntry(build_vjepa, "minus the error of V-JEPA's masked prediction", True, published=True),
    "VJEPA2": RewardEntry(
        build_vjepa2, "minus the error of V-JEPA 2's masked prediction, without leak", True, published=True
    ),
    "ViCLIP": RewardEntry(build_viclip, "whole video against prompt, cosine in [-1, 1]", True, published=True),
    "ImageReward": RewardEntry(
        build_image_reward, "ImageReward v1.0: frame against prompt, about -2 to 2", True, published=True
    ),
    "VideoScore": RewardEntry(
        build_videoscore,
        "VideoScore: five qualities of a video, each about 1 to 4, or their mean",
        True,
        published=True,
        dimensions=VIDEOSCORE_DIMENSIONS,
    ),
    "VideoAlign": RewardEntry(
        build_videoalign,
        "VideoReward: visual and motion quality and text alignment, normalised, or their sum",
        True,
        published=True,
        dimensions=VIDEOALIGN_DIMENSIONS,
    ),
    "Motion": RewardEntry(
        build_motion, "mean optical flow by RAFT, in pixels a frame of a 256-pixel video", True, published=True
    ),
    "Brightness": RewardEntry(build_brightness, "mean of the pixels; for tests and first steps", True),
    "JPEGCompressibility": RewardEntry(build_jpeg, "minus the size of the frames as JPEG, in kB", False),
    "JPEGSurrogate": RewardEntry(
        build_jpeg_surrogate, "minus an estimate of the size of the frames as JPEG, in kB, with gradients", True
    ),
}

__all__ = [
    "REWARDS",
    "Chunked",
    "FramePolicy",
    "Part",
    "RemoteReward",
    "Reward",
    "RewardContext",
    "RewardEntry",
    "VLMJudge",
    "WeightedSum",
    "as_reward",
    "calibrate",
    "check_frames",
    "score_parts",
    "select_frames",
    "validate_scores",
]
