"""DiffusionNFT: reinforcement on the forward process (Zheng et al. 2025, arXiv:2509.16117).

    L = A_max/beta mean( r |x+ - x0|^2 / w+ + (1 - r) |x- - x0|^2 / w- ) + c |output_theta - output_ref|^2
    r = clip(A / (2 A_max) + 1/2, 0, 1),   A_i = (R_i - mean_group R) / (std R + 1e-4)

x+ mixes the clean estimates of the policy and of an old policy, x- mirrors the policy at the old one
(`losses.nft_loss`): videos better than their group's mean pull the policy towards them, worse ones push it away. Only
final videos are kept: no log-probabilities, no trajectories, no gradients of the reward; any sampler serves, and one
without noise is published.

Videos are sampled by the OLD policy, which follows after each update, theta_old <- d theta_old + (1 - d) theta, with d
from `old_policy_decay`. It is a second set of the trainable weights on the same network, swapped in without gradients.

Works on every schedule. Published is flow, x0 = x_t - t v; for epsilon and v the clean estimate is the schedule's own
(`mdp.schedule.x0_from`; (x_t - sqrt(1 - alpha) eps) / sqrt(alpha) for epsilon). It is affine in the output, so mixing
outputs or estimates is the same; but for epsilon, errors at high noise are amplified by 1 / sqrt(alpha), only in part
undone by w, and success on such models is not published.

Deviations: no moving average of the evaluated weights (published: decay 0.9 over updates), the policy itself is
evaluated. The published policy is sampled without guidance; with `policy.guidance_scale` above 1 videos are sampled
with guidance and the network is still trained without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from algos import distributed
from algos.advantages import group_advantages
from algos.losses import nft_loss, optimality_probability
from algos.losses.forward_process import AdvantageMode
from algos.pairs import noise_of
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

Decay = Literal["type1", "type2", "none"]
METRICS = ("loss", "positive_error", "negative_error", "reference_error", "old_error")


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionNFTConfig:
    """Defaults: the released ones for Stable Diffusion 3.5 (LoRA of rank 32 and alpha 64, 48 groups of 24)."""

    learning_rate: float = 3e-4
    """of AdamW, constant"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-4
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    mixture: float = 1.0
    """beta of the loss; published 1, or 0.1 for OCR and several rewards: smaller steers harder"""
    adv_clip_max: float = 5.0
    """A_max, the advantage at which a video counts as wholly good or bad"""
    adv_mode: AdvantageMode = "all"
    """which advantages teach: "all", "positive_only", "negative_only", "one_only" or "binary", see
    `losses.optimality_probability`"""
    global_std: bool = True
    """advantages are divided by the std of all rewards of the update; False: of the group's"""
    reference_coefficient: float = 1e-4
    """c of the squared distance to the untrained model's output, a mean over elements; 0 saves its forward pass"""
    decay: Decay = "type1"
    """how slowly the old policy follows, see `old_policy_decay`; "none": it is the policy before the update"""
    videos_per_update: int = 1152
    """videos sampled before the policy changes; a multiple of env.num_envs"""
    updates_per_rollout: int = 1
    """optimiser steps the videos are dealt into (published: 1, for OCR 2); at most videos_per_update"""
    timestep_fraction: float = 0.99
    """fraction of the sampler's timesteps that each video is trained at (rounded down, at least one), drawn anew"""
    micro_batch: int = 16
    """videos per backward pass (in each process), the knob for memory"""
    seed: int = 0
    """of the env's stream of prompts and noise, of shuffling, timesteps and training noise"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "mixture", "adv_clip_max", "timestep_fraction")
        check_positive(self, "videos_per_update", "updates_per_rollout", "micro_batch")
        check_not_negative(self, "weight_decay", "reference_coefficient")
        check_choice(self, "decay", Decay)
        check_choice(self, "adv_mode", AdvantageMode)
        if self.timestep_fraction > 1:
            raise ValueError(f"DiffusionNFTConfig.timestep_fraction is {self.timestep_fraction}, expected at most 1")
        if self.updates_per_rollout > self.videos_per_update:
            raise ValueError(
                f"DiffusionNFTConfig.updates_per_rollout is {self.updates_per_rollout}, more than "
                f"videos_per_update={self.videos_per_update}; each optimiser step needs a video"
            )

    @classmethod
    def preset(cls, model: str) -> DiffusionNFTConfig:
        """Settings for a model by name, for an env with group_size=8; a starting point that was not tuned.

        Raises:
            ValueError: there are none for this model.
        """
        settings = cls(learning_rate=1e-3, videos_per_update=64)
        presets = {"MovingShapes": settings, "MovingShapesUNet": settings}
        return pick_preset(presets, model)


def old_policy_decay(step: int, kind: Decay) -> float:
    """The share d of its own weights that the old policy keeps.

    Source: released code, types 0 ("none"), 1 and 2.

    Args:
        step: optimiser steps taken so far, >= 0.
        kind: "type1": min(0.001 step, 0.5); "type2": 0 for 75 steps, then min(0.0075 (step - 75), 0.999); "none": 0.
    """
    if kind == "type1":
        return min(0.001 * step, 0.5)
    if kind == "type2":
        return min(0.0075 * max(step - 75, 0), 0.999)
    return 0.0


class DiffusionNFT:
    """Contrastive fine-tuning on an env's own videos, good and bad.

    Args:
        env: vector env with groups of at least two videos; any sampler, any noise level.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `DiffusionNFTConfig`.

    Raises:
        ValueError: an env without groups, of several clips, or whose batch does not divide videos_per_update.
    """

    def __init__(self, env: Any, policy: Any, config: DiffusionNFTConfig) -> None:
        check_one_clip(env, "DiffusionNFT")
        check_groups(env, "DiffusionNFT", "use DDPO with advantage='per_prompt', which needs no groups")
        self.env, self.policy, self.config = env, policy, config
        self.batches = num_batches(config.videos_per_update, env, "videos_per_update")
        self.parameters = policy.trainable_parameters()
        self.old = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = adamw(self.parameters, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.steps_taken = 0
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Samples `videos_per_update` videos with the old policy, learns from them and lets the old policy follow.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction (of the old policy's videos);
            probability_mean (of r); loss, positive_error, negative_error (see `losses.nft_loss`), reference_error and
            old_error (mean squared distance of the outputs to the untrained model's, 0 where that is not computed,
            and to the old policy's), grad_norm (before clipping), as means over the optimiser steps; old_decay (d),
            learning_rate, optimiser_steps.

        Raises:
            FloatingPointError: the gradient is not finite; this optimiser step was not taken.
        """
        c = self.config
        with self._old_policy():
            clean, prompt_id, reward = sample_videos(self.env, self.policy, self.batches)
        advantage = group_advantages(reward, self.env.group_size, global_std=c.global_std)
        probability = optimality_probability(advantage, c.adv_clip_max, c.adv_mode)
        timesteps = self._deal_timesteps(len(clean))
        order = torch.randperm(len(clean), generator=self.generator).tensor_split(c.updates_per_rollout)
        rows = [self._step(clean[i], prompt_id[i], probability[i], timesteps[i]) for i in order]
        decay = old_policy_decay(self.steps_taken, c.decay)
        with torch.no_grad():
            for old, new in zip(self.old, self.parameters, strict=True):
                old.mul_(decay).add_(new, alpha=1 - decay)
        return {
            **reward_metrics(reward, self.env.group_size),
            "probability_mean": float(probability.mean()),
            **{name: sum(row[name] for row in rows) / len(rows) for name in (*METRICS, "grad_norm")},
            "old_decay": decay,
            "learning_rate": c.learning_rate,
            "optimiser_steps": float(len(rows)),
        }

    @contextmanager
    def _old_policy(self) -> Iterator[None]:
        """Inside, the policy has the old weights and no graph is made.

        Only the storage behind the parameters is exchanged, and put back: a graph that was made before still leads to
        the policy's own weights. Its backward pass has to wait until this context is left.
        """
        new = [parameter.data for parameter in self.parameters]
        with torch.no_grad():
            try:
                for parameter, old in zip(self.parameters, self.old, strict=True):
                    parameter.data = old
                yield
            finally:
                for parameter, value in zip(self.parameters, new, strict=True):
                    parameter.data = value

    def _deal_timesteps(self, videos: int) -> Tensor:
        """Timesteps of the sampler's grid each video is trained at, in an order of its own: [videos, n]."""
        grid = self.env.mdp.table.timesteps
        count = max(1, int(self.config.timestep_fraction * len(grid)))
        order = torch.rand(videos, len(grid), generator=self.generator).argsort(1)
        return grid[order[:, :count]]

    def _step(self, clean: Tensor, prompt_id: Tensor, probability: Tensor, timesteps: Tensor) -> dict[str, float]:
        """One optimiser step on all the videos' timesteps; metrics are means over them."""
        ranks = distributed.current()
        width, count = self.config.micro_batch, timesteps.shape[1]
        totals = dict.fromkeys(METRICS, 0.0)
        self.optimizer.zero_grad(set_to_none=True)  # of a step that failed half-way, out of memory for instance
        seeds = torch.randint(2**62, timesteps.shape, generator=self.generator)
        mine = ranks.rows(len(clean))
        seen: list[tuple[float, dict[str, Tensor]]] = []
        for start in range(mine.start, mine.stop, width):
            part = slice(start, min(start + width, mine.stop))
            for j in range(count):
                noise = noise_of(seeds[part, j], clean.shape[1:])
                row = self._loss(clean[part], noise, prompt_id[part], probability[part], timesteps[part, j])
                share = (part.stop - part.start) / (len(clean) * count)
                (row["loss"] * share).backward()
                seen.append((share, {name: value.detach() for name, value in row.items()}))
        norm = optimiser_step(self.optimizer, self.parameters, self.config.max_grad_norm)
        self.steps_taken += 1
        for share, values in seen:  # not before: each look at a number makes an accelerator wait
            for name, value in values.items():
                totals[name] += share * float(value)
        return {**ranks.totals(totals), "grad_norm": float(norm)}

    def _loss(
        self, clean: Tensor, noise: Tensor, prompts: Tensor, probability: Tensor, timestep: Tensor
    ) -> dict[str, Tensor]:
        """Of b videos with their noise at timesteps [b]; "loss" carries the graph."""
        c, mdp, device = self.config, self.env.mdp, self.env.device
        x0 = upload(clean, device)
        noise = upload(noise, device, x0.dtype)
        t = shared(timestep.to(x0.dtype), device)
        noised = mdp.add_noise(x0, noise, t)
        with self._old_policy():
            old = self.policy.predict(noised, t, prompts)
        reference = None
        if c.reference_coefficient:
            with torch.no_grad(), self.policy.reference():
                reference = self.policy.predict(noised, t, prompts)
        output = self.policy.predict(noised, t, prompts)
        x0_policy, x0_old = mdp.schedule.x0_from(noised, output, t), mdp.schedule.x0_from(noised, old, t)
        wanted = upload(probability, device, x0.dtype)
        loss, metrics = nft_loss(x0_policy, x0_old, x0, wanted, mixture=c.mixture, scale=c.adv_clip_max)
        distance = torch.zeros_like(loss) if reference is None else (output - reference).square().mean()
        return {
            "loss": loss + c.reference_coefficient * distance,
            **metrics,
            "reference_error": distance,
            "old_error": (output.detach() - old).square().mean(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, its steps, generator, env's stream, old weights; the policy's own are saved with the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps_taken": self.steps_taken,
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
            "old": [old.cpu().clone() for old in self.old],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment.

        Raises:
            ValueError: the saved old weights have other shapes: the state is of another policy.
        """
        if [old.shape for old in state["old"]] != [old.shape for old in self.old]:
            raise ValueError(
                "the saved old policy has weights of other shapes; continue with the LoRA rank and targets "
                "it was saved with"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_taken = int(state["steps_taken"])
        self.generator.set_state(state["generator"].cpu())
        self.env.load_state_dict(state["env"])
        # copies: `update` changes them in place, and the state stays the caller's
        self.old = [saved.to(old, copy=True) for saved, old in zip(state["old"], self.old, strict=True)]
