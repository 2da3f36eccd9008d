"""D3PO: direct preferences over denoising steps (Yang et al. 2023, arXiv:2311.13231).

    L = mean over pairs and noisy steps k of -log sigmoid( beta [ log clip(rho_w,k) - log clip(rho_l,k) ] )
    rho_k = pi_theta(a_k | x_k, t_k, prompt) / pi_ref(a_k | x_k, t_k, prompt),   clip to 1 +- c

An update samples groups of videos of one prompt, makes pairs of them by their rewards, and treats every denoising step
of the better video as preferred to the same step of the worse one (`losses.d3po_loss`). It learns from the sampler's
own steps, as DDPO does, where Diffusion-DPO noises the finished videos; so noise is needed, and steps without are left
out. Only the order of rewards counts. The reference is the policy's, the untrained model unless it was refreshed.

Log-probabilities are means over latent elements, as released. With them, the released clip bounds the margin by
beta log((1 + c) / (1 - c)) = 0.0201, so the loss always lies between 0.683 and 0.703: neither its value nor the margin
says how far the policy has come (the ratios do), all pairs count alike, and a video's step is left alone once its ratio
is outside 1 +- c. `clip_range=None` gives DPO's unbounded margin.

Deviations: the preferred video is chosen by the env's reward where the paper asks people; ties make no pair (published:
a constant loss). Pairs are formed and weighed by `pairs`; all that a prompt's videos make are published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from algos import distributed
from algos.losses import d3po_loss
from algos.preferences import Strategy, preference_pairs
from algos.rollout import Rollout, collect, gathered
from algos.training import (
    adamw,
    check_choice,
    check_groups,
    check_not_negative,
    check_positive,
    noisy_steps,
    num_batches,
    optimiser_step,
    pick_preset,
    reward_metrics,
    start_stream,
)
from vdm_env.host import take, upload

METRICS = ("loss", "implicit_accuracy", "margin", "ratio_winner", "ratio_loser", "clip_fraction")
Part = tuple[Rollout, Tensor]
"""A rollout and pairs [P, 2] of places in it, P >= 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class D3POConfig:
    """Defaults: the released ones for Stable Diffusion 1.5 (20 DDIM steps, eta 1, guidance 5, LoRA)."""

    learning_rate: float = 3e-5
    """of AdamW, constant"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-4
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    beta: float = 0.1
    """of the loss, for log-probabilities that are means over elements"""
    clip_range: float | None = 0.1
    """c, bound on each video's ratio; None: no bound, see the module"""
    pairs: Strategy = "all_pairs"
    """which videos of a group make pairs, see `preferences.preference_pairs`"""
    videos_per_update: int = 20
    """videos sampled before the policy changes; a multiple of env.num_envs"""
    steps_per_update: int = 1
    """optimiser steps the update's pairs are dealt into, whole groups to each; at most the number of groups"""
    num_inner_epochs: int = 1
    """passes over the pairs"""
    timestep_fraction: float = 1.0
    """fraction of the noisy denoising steps that is trained on, drawn anew for each optimiser step"""
    micro_batch: int | None = None
    """videos whose groups make one backward pass, the knob for memory; a multiple of env.group_size that divides
    env.num_envs; None: env.num_envs. Videos in no pair cost nothing"""
    seed: int = 0
    """of the env's stream of prompts and noise, of pairs and shuffling"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "beta", "timestep_fraction")
        check_positive(self, "videos_per_update", "steps_per_update", "num_inner_epochs")
        check_not_negative(self, "weight_decay")
        check_choice(self, "pairs", Strategy)
        if self.timestep_fraction > 1:
            raise ValueError(f"D3POConfig.timestep_fraction is {self.timestep_fraction}, expected at most 1")
        if self.clip_range is not None and not 0 < self.clip_range < 1:
            raise ValueError(
                f"D3POConfig.clip_range is {self.clip_range}, expected a number in (0, 1) (published: 0.1), or None "
                f"for no clip"
            )

    @classmethod
    def preset(cls, model: str) -> D3POConfig:
        """Settings for a model by name, for an env with group_size=8; a starting point that was not tuned.

        Raises:
            ValueError: there are none for this model.
        """
        settings = cls(learning_rate=1e-3, videos_per_update=64)
        presets = {"MovingShapes": settings, "MovingShapesUNet": settings}
        return pick_preset(presets, model)


class D3PO:
    """Preference learning over an env's noisy denoising steps.

    Args:
        env: vector env with groups of at least two videos, and at least one step with noise.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `D3POConfig`.

    Raises:
        ValueError: an env without noise or without groups, or whose batch does not divide the videos as asked.
    """

    def __init__(self, env: Any, policy: Any, config: D3POConfig) -> None:
        self.steps = noisy_steps(env, "D3PO", instead="DiffusionDPO")
        check_groups(env, "D3PO", "use DDPO with advantage='per_prompt', which needs no groups")
        self.env, self.policy, self.config = env, policy, config
        self.batches = num_batches(config.videos_per_update, env, "videos_per_update")
        self.least_micro_batch = env.group_size
        if self.width < 1 or self.width % env.group_size or env.num_envs % self.width:
            raise ValueError(
                f"micro_batch is {config.micro_batch}, expected a multiple of group_size={env.group_size} that divides "
                f"num_envs={env.num_envs}, since the videos of a pair are trained together; set it to {env.group_size}"
            )
        groups = config.videos_per_update // env.group_size
        if config.steps_per_update > groups:
            raise ValueError(
                f"steps_per_update is {config.steps_per_update}, more than the {groups} groups of an update; set it to "
                f"{groups} or less, or raise videos_per_update"
            )
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Samples `videos_per_update` videos and learns from their pairs.

        Optimiser steps without a pair (all their groups are tied) are not taken.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction; pairs; loss, implicit_accuracy, margin,
            ratio_winner, ratio_loser, clip_fraction (see `losses.d3po_loss`) as means over pairs and denoising steps,
            and grad_norm (before clipping), as means over the optimiser steps, 0 if there was none; learning_rate,
            optimiser_steps.

        Raises:
            FloatingPointError: the gradient is not finite; this optimiser step was not taken.
        """
        c, size = self.config, self.env.group_size
        rollouts = [collect(self.env, self.policy) for _ in range(self.batches)]
        reward, _ = gathered(rollouts)
        batches = reward.chunk(self.batches)
        pairs = [preference_pairs(batch, size, c.pairs, self.generator) for batch in batches]
        groups = [(i, g) for i in range(self.batches) for g in range(len(batches[0]) // size)]
        rows = []
        for _ in range(c.num_inner_epochs):
            order = torch.randperm(len(groups), generator=self.generator).tensor_split(c.steps_per_update)
            for chosen in order:
                parts = self._parts(rollouts, pairs, [groups[i] for i in chosen.tolist()])
                distributed.current().check_even(len(parts))
                if distributed.current().any(bool(parts)):
                    rows.append(self._step(parts))
        return {
            **reward_metrics(reward, size),
            "pairs": float(sum(len(p) for p in pairs)),
            **{name: sum(row[name] for row in rows) / max(len(rows), 1) for name in (*METRICS, "grad_norm")},
            "learning_rate": c.learning_rate,
            "optimiser_steps": float(len(rows)),
        }

    @property
    def width(self) -> int:
        """Videos of one backward pass at most."""
        return self.env.num_envs if self.config.micro_batch is None else self.config.micro_batch

    def _parts(self, rollouts: list[Rollout], pairs: list[Tensor], groups: list[tuple[int, int]]) -> list[Part]:
        """The pairs of some groups, (rollout, place in it), in backward passes of at most `width` videos.

        Pairs and groups are of all processes, the parts of this one's.
        """
        size, parts = self.env.group_size, []
        first = distributed.current().rank * self.env.num_envs
        own = range(first // size, (first + self.env.num_envs) // size)
        for i, rollout in enumerate(rollouts):
            wanted = sorted(g for j, g in groups if j == i and g in own)
            each = self.width // size
            for start in range(0, len(wanted), each):
                group_of_pair = pairs[i][:, 0] // size
                chosen = pairs[i][torch.isin(group_of_pair, torch.tensor(wanted[start : start + each]))]
                if len(chosen):
                    parts.append((rollout, chosen - first))
        return parts

    def _step(self, parts: list[Part]) -> dict[str, float]:
        """One optimiser step; metrics are means over its pairs, of all processes, and denoising steps."""
        steps, ranks = self._deal_steps(), distributed.current()
        total = ranks.total(sum(len(pairs) for _, pairs in parts)) * len(steps)
        totals = dict.fromkeys(METRICS, 0.0)
        seen: list[tuple[float, dict[str, Tensor]]] = []
        self.optimizer.zero_grad(set_to_none=True)  # of a step that failed half-way, out of memory for instance
        for rollout, pairs in parts:
            for k in steps:
                loss, metrics = self._loss(rollout, pairs, k)
                share = len(pairs) / total
                (loss * share).backward()
                seen.append((share, {"loss": loss.detach(), **metrics}))
        norm = optimiser_step(self.optimizer, self.parameters, self.config.max_grad_norm)
        for share, values in seen:  # not before: each look at a number makes an accelerator wait
            for name, value in values.items():
                totals[name] += share * float(value)
        return {**ranks.totals(totals), "grad_norm": float(norm)}

    def _deal_steps(self) -> list[int]:
        """The denoising steps of one optimiser step."""
        count = max(1, int(self.config.timestep_fraction * len(self.steps)))
        order = torch.randperm(len(self.steps), generator=self.generator)[:count]
        return [self.steps[i] for i in order.tolist()]

    def _loss(self, rollout: Rollout, pairs: Tensor, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of some pairs at one denoising step; each video runs through the networks once, in however many pairs."""
        c = self.config
        videos, place = pairs.unique(return_inverse=True)
        obs = take(rollout.observations[k], videos)
        action = rollout.actions[k][upload(videos, self.env.device)]
        with torch.no_grad(), self.policy.reference():
            reference = self.policy.dist(obs).log_prob(action)
        log_prob = self.policy.dist(obs).log_prob(action)
        winners_first = upload(place.T.reshape(-1), log_prob.device)
        return d3po_loss(log_prob[winners_first], reference[winners_first], c.beta, c.clip_range)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, generator, env's stream, reference; the policy's weights are saved with the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
            "reference": self.policy.reference_state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment.

        Raises:
            CorruptWeightsError: the saved reference is of another policy; nothing was changed.
        """
        self.policy.load_reference_state_dict(state["reference"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.env.load_state_dict(state["env"])
