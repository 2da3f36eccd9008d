"""Evaluation on fixed (prompt, noise seed) pairs, the same for every algorithm and at every moment of training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algos.meter import finite
from vdm_env.video import to_uint8

PROXY = "proxy"
"""Name, in `eval.jsonl`, of the reward that is optimised; its parts stand beside it as "proxy/<name>"."""
GOLD = "gold"
"""Name of the true preference, where the world has one; its parts are "gold/<part>"."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one evaluation found.

    rows: dicts with split, reward, prompt_id, noise_seed, value (None where the score was not finite).
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
        """Mean over the pairs; a score that was not finite does not enter it. NaN where there is none."""
        values = [row["value"] for row in self.rows if row["reward"] == reward and row["value"] is not None]
        return float(np.mean(values)) if values else float("nan")


class Evaluator:
    """Samples and scores the same videos again and again.

    Each prompt is sampled from every noise seed. The noise seed is the video seed, which keys the initial latents and
    the policy's exploration noise, so that two evaluations differ only by the policy.

    Args:
        env: an environment on the networks of the training environment, from `env.derive(split=..., group_size=1)`.
        prompt_ids: indices into `env.prompts`, without repeats.
        noise_seeds: video seeds, without repeats.
        num_videos: how many prompts keep their video (0: none).

    Raises:
        ValueError: empty or repeated ids or seeds, an id outside `env.prompts`, or an env with groups.
    """

    def __init__(
        self, env: Any, prompt_ids: Sequence[int], noise_seeds: Sequence[int] = (0,), *, num_videos: int = 0
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
        self.env = env
        self.prompt_ids = [int(index) for index in prompt_ids]
        self.noise_seeds = [int(seed) for seed in noise_seeds]
        self.num_videos = num_videos

    def info(self) -> dict[str, Any]:
        """What `run.json` keeps about the evaluation; the hash tells runs on other prompts apart."""
        texts = "\n".join(self.env.prompts[index] for index in self.prompt_ids)
        return {
            "prompts_test_sha256": hashlib.sha256(texts.encode()).hexdigest(),
            "eval_prompt_ids": self.prompt_ids,
            "eval_noise_seeds": self.noise_seeds,
        }

    @torch.no_grad()
    def evaluate(self, policy: Any, split: str | None = None) -> Evaluation:
        """Samples every pair with `policy(obs)` and scores it with the proxy and, where there is one, the gold score.

        Args:
            policy: callable from observations to actions.
            split: what the rows say; default `env.split`.
        """
        pairs = [(prompt, seed) for prompt in self.prompt_ids for seed in self.noise_seeds]
        shown = [(prompt, self.noise_seeds[0]) for prompt in self.prompt_ids[: self.num_videos]]
        split = split or self.env.split
        rows: list[dict[str, Any]] = []
        kept: dict[tuple[int, int], np.ndarray] = {}
        for start in range(0, len(pairs), self.env.num_envs):
            chunk = pairs[start : start + self.env.num_envs]
            scores, video = self._sample(policy, chunk)
            if set(chunk) & set(shown):
                kept |= {pair: to_uint8(video[i]) for i, pair in enumerate(chunk) if pair in shown}
            for name, values in scores.items():
                for (prompt, seed), value in zip(chunk, values.tolist(), strict=True):
                    rows.append(
                        {
                            "split": split,
                            "reward": name,
                            "prompt_id": prompt,
                            "noise_seed": seed,
                            "value": finite(value),
                        }
                    )
        videos = np.stack([kept[pair] for pair in shown]) if shown else None
        return Evaluation(rows, videos, shown, [self.env.prompts[prompt] for prompt, _ in shown])

    def _sample(self, policy: Any, chunk: list[tuple[int, int]]) -> tuple[dict[str, Tensor], Tensor]:
        """Scores {name: [len(chunk)]} and the whole batch's video; a short chunk is filled up with its last pair."""
        env, count = self.env, len(chunk)
        padded = chunk + [chunk[-1]] * (env.num_envs - count)
        prompt_ids, seeds = [prompt for prompt, _ in padded], [seed for _, seed in padded]
        obs, _ = env.reset(seed=seeds, options={"prompt_ids": prompt_ids})
        terminated = torch.zeros(env.num_envs, dtype=torch.bool)
        while not bool(terminated.all()):
            obs, reward, terminated, _, info = env.step(policy(obs))
        video = info["video"]
        if env.mdp.decode_frames != "all":  # the reward saw only some frames; people and the gold score see them all
            video = env.mdp.decode(obs["latents"])
        scores = {PROXY: reward}
        scores |= {f"{PROXY}/{name}": part for name, part in info["reward_parts"].items()}
        gold = env.mdp.gold(video, [env.prompts[index] for index in prompt_ids])
        if gold is not None:
            scores[GOLD] = gold.total
            scores |= {f"{GOLD}/{part.name}": getattr(gold, part.name) for part in fields(gold)}
        return {name: values.detach().float().cpu()[:count] for name, values in scores.items()}, video
