"""Reward-weighted regression, and fine-tuning on the best videos: supervised learning on the policy's own samples.

    L = mean over videos of w(R) |output(x_t, t, prompt) - target|^2,   x_t = noised video, t as the model was trained

    softmax         w = exp(beta R) / Z    Lee et al. 2023 (arXiv:2302.12192), Black et al. 2023 (arXiv:2305.13301)
    sparse          w = 1[R >= C]          RWR-sparse of Black et al. 2023
    raw             w = R, for rewards >= 0                 Flow-GRPO's RWR baseline (arXiv:2505.05470)
    best_of_group   w = 1[R = max of the prompt's group]    Flow-GRPO's SFT baseline, the same paper

Neither gradients of the reward nor noise of the sampler are needed, and nothing is compared to a reference, so nothing
holds the policy near it. The network is trained without guidance, videos are sampled with the policy's.

Deviations: Z is of one batch of videos (published: of each prompt, estimated from samples, or left out), weights are
scaled to mean 1 over the videos trained on, whichever rule made them, and each update samples anew. Of best_of_group,
groups of equal rewards are left out (released: they count whole), and timesteps are drawn as the model was trained
(Flow-GRPO's baselines: logit-normal). All weights but best_of_group's compare rewards across prompts: a prompt that
always scores high is then trained on more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from algos import distributed
from algos.losses import best_of_group_weights, softmax_weights, sparse_weights, weighted_regression
from algos.losses.forward_process import raw_weights
from algos.pairs import draw_noise, noise_of
from algos.reward_checks import check_one_clip
from algos.rollout import sample_videos
from algos.training import (
    adamw,
    check_choice,
    check_groups,
    check_not_negative,
    check_positive,
    num_batches,
    optimiser_step,
    pick_preset,
    reward_metrics,
    start_stream,
)
from vdm_env.host import shared, upload

Weighting = Literal["softmax", "sparse", "raw", "best_of_group"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RWRConfig:
    """Defaults of beta, quantile and AdamW's betas, eps and weight decay follow the baselines of the DDPO paper."""

    learning_rate: float = 1e-5
    """of AdamW, constant; for training all weights, LoRA takes about 3e-4"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-4
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    weighting: Weighting = "softmax"
    """how a video's reward becomes its weight"""
    beta: float = 0.2
    """inverse temperature of "softmax", in 1 / units of the (normalised) reward"""
    normalise: bool = True
    """softmax weights of (R - mean) / std of the batch, so that beta does not depend on the reward's units"""
    threshold: float | None = None
    """C of "sparse" in the reward's units; None: the `quantile` of the batch's rewards"""
    quantile: float = 0.9
    """of "sparse" without a threshold, 0..1 (exclusive)"""
    videos_per_update: int = 256
    """videos sampled before the policy changes; a multiple of env.num_envs"""
    num_inner_epochs: int = 1
    """passes over the videos trained on, each with new timesteps and noise"""
    videos_per_step: int = 32
    """videos of one optimiser step, drawn without replacement from those with weight > 0; a pass's last has the rest"""
    micro_batch: int = 16
    """videos per backward pass (in each process), the knob for memory"""
    seed: int = 0
    """of the env's stream of prompts and noise, of shuffling, timesteps and training noise"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "beta", "quantile")
        check_positive(self, "videos_per_update", "num_inner_epochs", "videos_per_step", "micro_batch")
        check_not_negative(self, "weight_decay")
        check_choice(self, "weighting", Weighting)
        if self.quantile >= 1:
            raise ValueError(f"RWRConfig.quantile is {self.quantile}, expected less than 1 (0.9 keeps the best tenth)")
        if self.threshold is not None and self.threshold != self.threshold:
            raise ValueError("RWRConfig.threshold is nan, expected a number, or None for a quantile of the batch")

    @classmethod
    def preset(cls, model: str) -> RWRConfig:
        """Settings for a model by name; a starting point that was not tuned.

        Raises:
            ValueError: there are none for this model.
        """
        settings = cls(learning_rate=5e-4, beta=1.0, videos_per_update=64, videos_per_step=16)
        presets = {"MovingShapes": settings, "MovingShapesUNet": settings}
        return pick_preset(presets, model)


class RWR:
    """Weighted fine-tuning on an env's own videos.

    Args:
        env: vector env; any sampler, any noise level; groups for weighting="best_of_group".
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `RWRConfig`.

    Raises:
        ValueError: an env of several clips, or without groups where the best of one is asked for, a single video per
            update, or a number of videos that the env's batch does not divide.
    """

    def __init__(self, env: Any, policy: Any, config: RWRConfig) -> None:
        check_one_clip(env, "RWR")
        if config.weighting == "best_of_group":
            check_groups(env, "weighting='best_of_group'", "set weighting='softmax' or 'sparse'")
        if config.videos_per_update < 2:
            raise ValueError("videos_per_update is 1: one video's weight says nothing; sample at least 2")
        self.env, self.policy, self.config = env, policy, config
        self.batches = num_batches(config.videos_per_update, env, "videos_per_update")
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Samples `videos_per_update` videos and takes the optimiser steps of `num_inner_epochs` passes over them.

        Where no video has a weight (all below the threshold, all groups tied) there is no optimiser step.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction; videos_kept (with weight > 0),
            effective_videos = (sum w)^2 / sum w^2; loss and grad_norm (before clipping) as means over the optimiser
            steps, 0 if there was none; learning_rate, optimiser_steps.

        Raises:
            FloatingPointError: the gradient is not finite; this optimiser step was not taken.
            ValueError: a negative reward with weighting="raw"; nothing was learned.
        """
        c = self.config
        clean, prompt_id, reward = sample_videos(self.env, self.policy, self.batches)
        weight = self._weights(reward)
        kept = (weight > 0).nonzero().flatten()
        rows = []
        if len(kept):
            weight = weight / weight[kept].mean()
            for _ in range(c.num_inner_epochs):
                order = kept[torch.randperm(len(kept), generator=self.generator)]
                rows += [self._step(clean[i], prompt_id[i], weight[i]) for i in order.split(c.videos_per_step)]
        square = float(weight.square().sum())
        return {
            **reward_metrics(reward, self.env.group_size),
            "videos_kept": float(len(kept)),
            "effective_videos": float(weight.sum()) ** 2 / square if square else 0.0,
            "loss": sum(loss for loss, _ in rows) / max(len(rows), 1),
            "grad_norm": sum(norm for _, norm in rows) / max(len(rows), 1),
            "learning_rate": c.learning_rate,
            "optimiser_steps": float(len(rows)),
        }

    def _weights(self, reward: Tensor) -> Tensor:
        """Of all videos of the update, [B] >= 0."""
        c = self.config
        if c.weighting == "best_of_group":
            return best_of_group_weights(reward, self.env.group_size)
        if c.weighting == "raw":
            return raw_weights(reward)
        if c.weighting == "sparse":
            limit = c.threshold if c.threshold is not None else float(reward.quantile(c.quantile))
            return sparse_weights(reward, limit)
        if c.normalise:
            reward = (reward - reward.mean()) / (reward.std(correction=0) + 1e-8)
        return softmax_weights(reward, c.beta)

    def _step(self, clean: Tensor, prompt_id: Tensor, weight: Tensor) -> tuple[float, float]:
        """One optimiser step; its loss and gradient norm."""
        seen, width, ranks = [], self.config.micro_batch, distributed.current()
        self.optimizer.zero_grad(set_to_none=True)  # of a step that failed half-way, out of memory for instance
        drawn, mine = draw_noise(len(clean), self.env.mdp, self.generator), ranks.rows(len(clean))
        for start in range(mine.start, mine.stop, width):
            part = slice(start, min(start + width, mine.stop))
            noise = noise_of(drawn["noise_seed"][part], clean.shape[1:])
            t = shared(drawn["t"][part], self.env.device)
            x0, noise, w = (upload(column, self.env.device) for column in (clean[part], noise, weight[part]))
            loss = self._loss(x0, noise, t, w, prompt_id[part]) * (len(x0) / len(clean))
            loss.backward()
            seen.append(loss.detach())
        norm = optimiser_step(self.optimizer, self.parameters, self.config.max_grad_norm)
        return ranks.total(sum(map(float, seen), 0.0)), float(norm)

    def _loss(self, x0: Tensor, noise: Tensor, t: Tensor, weight: Tensor, prompts: Tensor) -> Tensor:
        """Of videos at timesteps t with their noise."""
        mdp, noise = self.env.mdp, noise.to(x0)
        prediction = self.policy.predict(mdp.add_noise(x0, noise, t), t, prompts)
        return weighted_regression(prediction, mdp.target(x0, noise, t), weight)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, generator and the env's stream; the policy's weights are saved with the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.env.load_state_dict(state["env"])
