"""What an evaluation measures beside the reward that is optimised: held-out rewards, diversity, KL and motion.

They do not change what is sampled, and nothing of them reaches the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdm_env import noise
from vdm_env.host import on_host, take
from vdm_env.metrics.devil import segment_distance
from vdm_env.metrics.diversity import videomae_features
from vdm_env.metrics.temporal import dynamic_degree
from vdm_env.rewards.action import build_action
from vdm_env.rewards.base import FramePolicy, Reward, select_frames

HELDOUT = "heldout"
"""Rewards that are never optimised are "heldout/<name>" in `eval.jsonl`."""
KL, DIVERSITY, MOTION = "kl_ref_nats", "diversity", "motion"
"""Names of the other measures there."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """A frozen feature extractor with the name it has in the record."""

    name: str
    extract: Callable[[Tensor], Tensor]
    """video [B,F,3,H,W] in [0,1] to [B,D]"""

    def __call__(self, video: Tensor) -> Tensor:
        return self.extract(video)


def default_features(env: Any) -> Features | None:
    """The feature extractor for "diversity" that belongs to an environment's world; None where there is none.

    MovingShapes has its own small VideoMAE, the action classifier, whose last states are averaged over their tokens
    (`vdm_env.metrics.diversity.videomae_features`). Models without a world of their own need one of yours.

    Args:
        env: made by `vdm_env.make`, or derived from such a one.
    """
    if env.model.spec.world is None or env.config.context is None:
        return None
    classifier = build_action(env.config.context)
    return Features(
        name=f"VideoMAE of {env.config.context.world} (own small weights)",
        extract=lambda video: videomae_features(video, classifier),
    )


def heldout_rewards(env: Any, names: Iterable[str]) -> dict[str, Reward]:
    """Rewards by name, built as the environment would build its own: `heldout_rewards(env, ["Aesthetic"])`.

    Args:
        env: made by `vdm_env.make`, or derived from such a one.
        names: of `vdm_env.list_rewards()`.

    Raises:
        ValueError: an unknown name.
        MissingWeightsError: pretrained weights that are not on this machine.
    """
    # With its own frames: those that the env decodes for its reward need not be enough for this one.
    return {name: env.derive(reward=name, decode_frames=None).mdp.reward for name in names}


def frames_for(policy: FramePolicy, video: Tensor, video_seeds: Iterable[int]) -> Tensor:
    """The frames of whole videos [B,F,3,H,W] a reward wants, [B,n,3,H,W]; random ones are keyed by the video's seed.

    Raises:
        ValueError: the policy does not fit the videos, see `vdm_env.rewards.base.select_frames`.
    """
    if policy == "all":
        return video
    chosen = [
        select_frames(policy, video.shape[1], noise.generator_for(int(seed), noise.FRAMES)) for seed in video_seeds
    ]
    return torch.stack([one[index.to(one.device)] for one, index in zip(video, chosen, strict=True)])


def heldout_scores(
    rewards: Mapping[str, Reward], video: Tensor, prompts: list[str], seeds: list[int]
) -> dict[str, Tensor]:
    """{"heldout/<name>": [B]} of whole videos; values that are not finite stay as they are.

    Raises:
        ValueError: a reward does not return one score a video.
    """
    found = {}
    for name, reward in rewards.items():
        scores = reward(frames_for(reward.frames, video, seeds), prompts)
        if tuple(scores.shape) != (len(video),):
            raise ValueError(
                f"held-out reward {name!r} returned shape {tuple(scores.shape)}; expected ({len(video)},): one score a "
                "video"
            )
        found[f"{HELDOUT}/{name}"] = scores
    return found


def motion(video: Tensor) -> Tensor | None:
    """How much moves, [B] in [0,1], by `vdm_env.metrics.temporal.dynamic_degree`; None for single pictures."""
    return dynamic_degree(video) if video.shape[1] > 1 else None


def diversity(features: Tensor) -> float | None:
    """Mean pairwise 1 - cosine of the features [N,D] of N videos of one prompt; None for one video."""
    return float(segment_distance(features)) if len(features) > 1 else None


def step_kl(policy: Any, obs: Mapping[str, Tensor], rows: Tensor) -> Tensor | None:
    """KL(policy || reference) of one denoising step for some videos, in nats summed over elements: float64 [len(rows)].

    None where the step has no noise, or the policy has no `dist(obs)` with a `kl`, or no `reference()`. Random states
    are left as they were.

    Args:
        policy: that acts.
        obs: of the step, for all B videos.
        rows: int64, which videos.
    """
    if not hasattr(policy, "dist") or not hasattr(policy, "reference"):
        return None
    if not len(rows) or not bool(on_host(obs["stochastic"])[rows].any()):
        return None
    part = take(obs, rows)
    device = part["latents"].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        now = policy.dist(part)
        if not hasattr(now, "kl"):
            return None
        with policy.reference():
            return now.kl(policy.dist(part)).detach().double().cpu()
