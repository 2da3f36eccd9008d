"""DDPO: PPO over denoising steps (Black et al. 2023, arXiv:2305.13301; the importance-sampled variant DDPO-IS).

    L = mean over videos and noisy steps k of max(-A r_k, -A clip(r_k, 1 - c, 1 + c))
    r_k = pi_theta(a_k | x_k, t_k, prompt) / pi_old(a_k | x_k, t_k, prompt),   A = the video's normalised reward

Only scores are needed, no gradients of the reward. Log-probabilities are means over latent elements, as in the released
code; clip_range is to be read with that (see `algos.losses`). Deterministic steps have no density and are left out.

Deviation: a forward pass holds videos of ONE denoising step, in the batches they were sampled in, where the released
code shuffles timesteps for each video. Gradients are accumulated over all timesteps, so their sum is the same, and the
ratio before the first update is 1 exactly, not up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from algos import distributed
from algos.advantages import PerPromptTracker, batch_advantages, clip_advantages, group_advantages
from algos.losses import clipped_surrogate, kl_penalty
from algos.rollout import Rollout, collect, gathered, rows
from algos.training import (
    adamw,
    check_choice,
    check_groups,
    check_not_negative,
    check_positive,
    free_elements,
    noisy_steps,
    num_batches,
    optimiser_step,
    pick_preset,
    reward_metrics,
    start_stream,
)

Statistic = Literal["per_prompt", "group", "batch"]
Entry = tuple[Rollout, Tensor, int]
"""A rollout, its videos' advantages [B] and one denoising step: one unit of work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DDPOConfig:
    """Defaults: the released code's base and compressibility settings (there on 8 devices)."""

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
    clip_range: float = 1e-4
    """c, on the exponential of the difference of mean log-probabilities"""
    adv_clip_max: float = 5.0
    """advantages are clipped to this magnitude"""
    advantage: Statistic = "per_prompt"
    """rewards are normalised by the prompt's latest ("per_prompt"), by the env's "group", or by the "batch" """
    tracker_buffer_size: int = 16
    """of "per_prompt": latest rewards kept of each prompt"""
    tracker_min_count: int = 16
    """of "per_prompt": below this count a prompt is normalised by the batch"""
    videos_per_rollout: int = 256
    """videos sampled before the policy changes; a multiple of env.num_envs"""
    updates_per_rollout: int = 4
    """parts the rollout's batches are dealt into, each with an optimiser step of its own; a divisor of their number"""
    accumulate_timesteps: bool = True
    """gradients of all timesteps of a part make one optimiser step; False: each timestep makes one"""
    num_inner_epochs: int = 1
    """passes over a rollout"""
    timestep_fraction: float = 1.0
    """fraction of the noisy steps that is trained on, drawn anew for each part"""
    kl_coefficient: float = 0.0
    """beta of the KL to the reference per step, a mean over elements; 0 saves the reference's forward pass"""
    micro_batch: int | None = None
    """videos per backward pass, the knob for memory; None: env.num_envs (other sizes leave r = 1 to rounding only)"""
    seed: int = 0
    """of the env's stream of prompts and noise, and of shuffling"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "clip_range", "adv_clip_max", "timestep_fraction")
        check_positive(self, "videos_per_rollout", "updates_per_rollout", "num_inner_epochs")
        check_not_negative(self, "weight_decay", "kl_coefficient")
        check_choice(self, "advantage", Statistic)
        if self.timestep_fraction > 1 or self.clip_range >= 1:
            raise ValueError(
                f"DDPOConfig.timestep_fraction is {self.timestep_fraction} and clip_range {self.clip_range}, "
                f"expected at most 1 and less than 1"
            )
        if self.micro_batch is not None:
            check_positive(self, "micro_batch")
        if self.advantage == "per_prompt":
            check_positive(self, "tracker_buffer_size", "tracker_min_count")
            PerPromptTracker(self.tracker_buffer_size, self.tracker_min_count)  # refuses a count it could never reach

    @classmethod
    def preset(cls, model: str) -> DDPOConfig:
        """Settings found for a model by name; "MovingShapes" wants an env with group_size=8.

        Raises:
            ValueError: there are none for this model.
        """
        flow = cls(learning_rate=5e-4, videos_per_rollout=64, updates_per_rollout=1, advantage="group")
        return pick_preset({"MovingShapes": flow, "MovingShapesUNet": replace(flow, learning_rate=1e-3)}, model)


class DDPO:
    """Policy gradient over an env's noisy denoising steps.

    Args:
        env: vector env with at least one step with noise.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `DDPOConfig`.

    Raises:
        ValueError: an env without noise, or without groups where advantages are relative to them, or whose batch does
            not divide the rollout as asked.
    """

    def __init__(self, env: Any, policy: Any, config: DDPOConfig) -> None:
        self.steps = noisy_steps(env, "DDPO")
        if config.advantage == "group":
            check_groups(env, "advantage='group'", "set advantage='per_prompt' or 'batch'")
        if config.videos_per_rollout < 2:
            raise ValueError("videos_per_rollout is 1: one reward has no spread to be normalised by; sample at least 2")
        self.env, self.policy, self.config = env, policy, config
        self.batches = num_batches(config.videos_per_rollout, env, "videos_per_rollout")
        if self.batches % config.updates_per_rollout:
            raise ValueError(
                f"updates_per_rollout is {config.updates_per_rollout}, expected a divisor of {self.batches} batches "
                f"(videos_per_rollout={config.videos_per_rollout} / num_envs={env.num_envs}); set it to 1"
            )
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        self.tracker: PerPromptTracker | None = None
        if config.advantage == "per_prompt":
            self.tracker = PerPromptTracker(config.tracker_buffer_size, config.tracker_min_count)
        self.generator = torch.Generator().manual_seed(config.seed)
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Samples a rollout and learns from it.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction; over all (video, step) pairs trained on,
            before each pair's optimiser step: loss, ratio_mean, ratio_std, clip_fraction_low, clip_fraction_high,
            kl_old_nats (second-order estimate from the log-ratios, summed over noisy steps); ratio_first_error = max
            |r - 1| of the first micro-batch, 0 unless rollout and update disagree; grad_norm (mean over optimiser
            steps, before clipping), learning_rate, optimiser_steps.

        Raises:
            FloatingPointError: the gradient is not finite; this optimiser step was not taken.
        """
        c = self.config
        ranks = distributed.current()
        rollouts = [collect(self.env, self.policy) for _ in range(self.batches)]
        reward, prompt_id = gathered(rollouts)
        advantages = [ranks.own(a) for a in self._advantages(reward, prompt_id).chunk(self.batches)]
        seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        norms = []
        for _ in range(c.num_inner_epochs):
            order = torch.randperm(self.batches, generator=self.generator).chunk(c.updates_per_rollout)
            for part in order:
                for steps in self._deal_steps():
                    entries = [(rollouts[i], advantages[i], k) for i in part.tolist() for k in steps]
                    seen += self._accumulate(entries)
                    norms.append(optimiser_step(self.optimizer, self.parameters, c.max_grad_norm))
        return {
            **reward_metrics(reward, self.env.group_size),
            **self._ratio_metrics(seen),
            "grad_norm": float(torch.stack(norms).mean()),
            "learning_rate": c.learning_rate,
            "optimiser_steps": float(len(norms)),
        }

    def _advantages(self, reward: Tensor, prompt_id: Tensor) -> Tensor:
        c = self.config
        if self.tracker:
            advantage = self.tracker.update(prompt_id.tolist(), reward)
        elif c.advantage == "group":
            advantage = group_advantages(reward, self.env.group_size)
        else:
            advantage = batch_advantages(reward)
        return clip_advantages(advantage, c.adv_clip_max)

    def _deal_steps(self) -> list[list[int]]:
        """The denoising steps of each optimiser step, in random order."""
        count = max(1, int(self.config.timestep_fraction * len(self.steps)))
        order = torch.randperm(len(self.steps), generator=self.generator)[:count]
        steps = [self.steps[i] for i in order.tolist()]
        return [steps] if self.config.accumulate_timesteps else [[k] for k in steps]

    def _accumulate(self, entries: list[Entry]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Adds the gradient of the mean loss over the entries' videos; one graph is alive at a time.

        Returns:
            Per micro-batch: log_prob, log_prob_old, advantage [b] and the loss times b, detached.
        """
        c, width = self.config, self.config.micro_batch or self.env.num_envs
        total = len(entries) * self.env.num_envs * distributed.current().world
        seen = []
        for rollout, advantage, k in entries:
            for start in range(0, self.env.num_envs, width):
                stop = min(start + width, self.env.num_envs)
                obs, action, log_prob_old = rows(rollout, k, start, stop)
                dist = self.policy.dist(obs)
                log_prob = dist.log_prob(action)
                loss, _ = clipped_surrogate(log_prob, log_prob_old, advantage[start:stop], c.clip_range)
                if c.kl_coefficient:
                    with torch.no_grad(), self.policy.reference():
                        reference = self.policy.dist(obs)
                    loss = loss + kl_penalty(dist.kl(reference, reduction="mean"), c.kl_coefficient)
                share = loss * (stop - start)
                (share / total).backward()
                seen.append((log_prob.detach(), log_prob_old, advantage[start:stop], share.detach()))
        return seen

    def _ratio_metrics(self, seen: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> dict[str, float]:
        ranks = distributed.current()
        first = ranks.gather((seen[0][0] - seen[0][1]).exp())
        log_prob, log_prob_old, advantage = (ranks.gather(torch.cat([row[i] for row in seen])) for i in range(3))
        _, metrics = clipped_surrogate(log_prob, log_prob_old, advantage, self.config.clip_range)
        values = {name: float(value) for name, value in metrics.items()}
        # 0.5 E[(log r)^2] is the KL to second order, for log-ratios in nats; these are means over the elements
        nats = values.pop("approx_kl") * free_elements(self.env) ** 2 * len(self.steps)
        loss = ranks.total(float(torch.stack([row[3] for row in seen]).sum())) / len(log_prob)
        return {**values, "kl_old_nats": nats, "loss": loss, "ratio_first_error": float((first - 1).abs().max())}

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, generator, env's stream, per-prompt statistics; the policy's weights are saved with the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
            "tracker": (self.tracker or PerPromptTracker()).state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.env.load_state_dict(state["env"])
        if self.tracker:
            self.tracker.load_state_dict(state["tracker"])
