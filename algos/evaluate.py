"""Evaluation on fixed (prompt, noise seed) pairs, the same for every algorithm and at every moment of training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algos.measures import DIVERSITY, KL, MOTION, diversity, heldout_scores, motion, step_kl
from algos.meter import finite
from vdm_env.rewards.base import as_reward
from vdm_env.video import to_uint8

PROXY = "proxy"
"""Name, in `eval.jsonl`, of the reward that is optimised; its parts stand beside it as "proxy/<name>"."""
GOLD = "gold"
"""Name of the true preference, where the world has one; its parts are "gold/<part>"."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one evaluation found.

    rows: dicts with split, reward, prompt_id, noise_seed (None for a measure of all videos of a prompt), value (None
    where the score was not finite).
    videos: uint8 [n, F, H, W, 3], the first noise seed of the first n prompts; pairs: their (prompt_id, noise_seed).
    """

    rows: list[dict[str, Any]]
    videos: np.ndarray | None
    pairs: list[tuple[int, int]]
    prompts: list[str]

    @property
    def nan_values(self) -> int:
        return sum(row["value"] is None for row in self.rows)

    def mean(self, reward: str = PROXY) -> float:
        """Mean over the rows of this name; a score that was not finite does not enter it. NaN where there is none."""
        values = [row["value"] for row in self.rows if row["reward"] == reward and row["value"] is not None]
        return float(np.mean(values)) if values else float("nan")


class Evaluator:
    """Samples and scores the same videos again and again.

    Each prompt is sampled from every noise seed. The noise seed is the video seed, which keys the initial latents and
    the policy's exploration noise, so that two evaluations differ only by the policy. What is measured beside the
    reward changes nothing of what is sampled.

    Args:
        env: an environment on the networks of the training environment, from `env.derive(split=..., group_size=1)`.
        prompt_ids: indices into `env.prompts`, without repeats.
        noise_seeds: video seeds, without repeats.
        num_videos: how many prompts keep their video (0: none).
        heldout: rewards that are never optimised, by name: video [B,F,3,H,W] in [0,1] and B prompts to scores [B];
            each gets the frames its attribute `frames` asks for (all without one). `algos.heldout_rewards(env, names)`
            makes those of the package.
        features: frozen extractor for "diversity", video [B,F,3,H,W] in [0,1] to [B,D], with a `name`;
            `algos.default_features(env)` gives the one of an embedded world.
        kl: measure "kl_ref_nats": KL(policy || reference) in nats, summed over elements and denoising steps with
            noise, for the first noise seed of each prompt. It costs two forward passes of the policy per step more for
            these videos. No rows where no step has noise, or the policy has no `dist` or no `reference`.
        motion: measure "motion": how much moves, in [0,1] (`vdm_env.metrics.temporal.dynamic_degree`).

    Raises:
        ValueError: empty or repeated ids or seeds, an id outside `env.prompts`, or an env with groups.
        TypeError: a held-out reward or the features cannot be called.
    """

    def __init__(
        self,
        env: Any,
        prompt_ids: Sequence[int],
        noise_seeds: Sequence[int] = (0,),
        *,
        num_videos: int = 0,
        heldout: Mapping[str, Any] = MappingProxyType({}),
        features: Callable[[Tensor], Tensor] | None = None,
        kl: bool = True,
        motion: bool = True,
    ) -> None:
        if env.group_size != 1:
            raise ValueError(
                f"the environment has group_size={env.group_size}, but evaluation needs a prompt of its own in every "
                "slot: give env.derive(group_size=1)"
            )
        for name, values in (("prompt_ids", prompt_ids), ("noise_seeds", noise_seeds)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be a non-empty list without repeats, got {list(values)}")
        outside = [index for index in prompt_ids if not 0 <= index < len(env.prompts)]
        if outside:
            raise ValueError(f"prompt_ids {outside} are not in env.prompts, which has {len(env.prompts)} texts")
        if features is not None and not callable(features):
            raise TypeError(f"features must be a callable from videos to [B,D], got {type(features).__name__}")
        self.env = env
        self.prompt_ids = [int(index) for index in prompt_ids]
        self.noise_seeds = [int(seed) for seed in noise_seeds]
        self.num_videos = num_videos
        self.heldout = {name: as_reward(reward) for name, reward in heldout.items()}
        self.features, self.kl, self.motion = features, kl, motion

    @property
    def split(self) -> str:
        """Of the prompts, in every row."""
        return self.env.split

    def info(self) -> dict[str, Any]:
        """What `run.json` keeps about the evaluation; the hash tells runs on other prompts apart."""
        return {
            "prompts_test_sha256": self._prompts_sha256(),
            "eval_prompt_ids": self.prompt_ids,
            "eval_noise_seeds": self.noise_seeds,
            "eval_split": self.split,
            "heldout": sorted(self.heldout),
            "diversity_features": None if self.features is None else _name_of(self.features),
        }

    def split_info(self) -> dict[str, Any]:
        """What `run.json` keeps about each split that is evaluated."""
        return {
            "prompts_sha256": self._prompts_sha256(),
            "prompt_ids": self.prompt_ids,
            "noise_seeds": self.noise_seeds,
        }

    def _prompts_sha256(self) -> str:
        texts = "\n".join(self.env.prompts[index] for index in self.prompt_ids)
        return hashlib.sha256(texts.encode()).hexdigest()

    @torch.no_grad()
    def evaluate(self, policy: Any, split: str | None = None) -> Evaluation:
        """Samples every pair with `policy(obs)` and scores it with the proxy, the gold score of the world and the rest.

        Args:
            policy: callable from observations to actions.
            split: what the rows say; default `env.split`.
        """
        pairs = [(prompt, seed) for prompt in self.prompt_ids for seed in self.noise_seeds]
        shown = [(prompt, self.noise_seeds[0]) for prompt in self.prompt_ids[: self.num_videos]]
        found: list[tuple[str, int, int | None, float]] = []
        kept: dict[tuple[int, int], np.ndarray] = {}
        seen: dict[tuple[int, int], Tensor] = {}
        for start in range(0, len(pairs), self.env.num_envs):
            chunk = pairs[start : start + self.env.num_envs]
            scores, video, kl = self._sample(policy, chunk)
            if set(chunk) & set(shown):
                kept |= {pair: to_uint8(video[i]) for i, pair in enumerate(chunk) if pair in shown}
            if self.features is not None and len(self.noise_seeds) > 1:
                seen |= dict(zip(chunk, self.features(video[: len(chunk)]).float().cpu(), strict=True))
            for name, values in scores.items():
                found += [(name, *pair, value) for pair, value in zip(chunk, values.tolist(), strict=True)]
            found += [(KL, *pair, value) for pair, value in kl.items()]
        if seen:
            for prompt in self.prompt_ids:
                of_prompt = diversity(torch.stack([seen[prompt, seed] for seed in self.noise_seeds]))
                found += [] if of_prompt is None else [(DIVERSITY, prompt, None, of_prompt)]
        names = ("split", "reward", "prompt_id", "noise_seed", "value")
        rows = [dict(zip(names, (split or self.split, *row[:3], finite(row[3])), strict=True)) for row in found]
        videos = np.stack([kept[pair] for pair in shown]) if shown else None
        return Evaluation(rows, videos, shown, [self.env.prompts[prompt] for prompt, _ in shown])

    def _sample(
        self, policy: Any, chunk: list[tuple[int, int]]
    ) -> tuple[dict[str, Tensor], Tensor, dict[tuple[int, int], float]]:
        """Scores {name: [len(chunk)]}, the whole batch's video and the KL of the pairs it is measured of.

        A short chunk is filled up with its last pair.
        """
        env, count = self.env, len(chunk)
        padded = chunk + [chunk[-1]] * (env.num_envs - count)
        prompt_ids, seeds = [prompt for prompt, _ in padded], [seed for _, seed in padded]
        texts = [env.prompts[index] for index in prompt_ids]
        first = [row for row, (_, seed) in enumerate(chunk) if seed == self.noise_seeds[0]] if self.kl else []
        kl: Tensor | None = None
        obs, _ = env.reset(seed=seeds, options={"prompt_ids": prompt_ids})
        terminated = torch.zeros(env.num_envs, dtype=torch.bool)
        while not bool(terminated.all()):
            action = policy(obs)
            of_step = step_kl(policy, obs, torch.tensor(first)) if first else None
            if of_step is not None:
                kl = of_step if kl is None else kl + of_step
            obs, reward, terminated, _, info = env.step(action)
        video = info["video"]
        if env.mdp.decode_frames != "all":  # the reward saw only some frames; people and the gold score see them all
            video = env.mdp.decode(obs["latents"])
        scores = {PROXY: reward}
        scores |= {f"{PROXY}/{name}": part for name, part in info["reward_parts"].items()}
        gold = env.mdp.gold(video, texts)
        if gold is not None:
            scores[GOLD] = gold.total
            scores |= {f"{GOLD}/{part.name}": getattr(gold, part.name) for part in fields(gold)}
        scores |= heldout_scores(self.heldout, video, texts, seeds)
        moved = motion(video) if self.motion else None
        if moved is not None:
            scores[MOTION] = moved
        of_pairs = {} if kl is None else dict(zip([chunk[row] for row in first], kl.tolist(), strict=True))
        return {name: values.detach().float().cpu()[:count] for name, values in scores.items()}, video, of_pairs


def splits_info(evaluators: Sequence[Evaluator]) -> dict[str, Any]:
    """What `run.json` keeps about several evaluations, the first of which is the main one; empty for none.

    Raises:
        ValueError: two of one split, whose rows nobody could tell apart.
    """
    splits = [evaluator.split for evaluator in evaluators]
    if len(set(splits)) != len(splits):
        raise ValueError(f"the evaluators are of the splits {splits}; expected one for each split")
    if not evaluators:
        return {}
    return {**evaluators[0].info(), "eval_splits": {one.split: one.split_info() for one in evaluators}}


def _name_of(extractor: Any) -> str:
    return str(getattr(extractor, "name", getattr(extractor, "__name__", type(extractor).__name__)))
