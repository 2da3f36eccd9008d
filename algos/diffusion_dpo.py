"""Online Diffusion-DPO: preferences among the policy's own videos (Wallace et al. 2023, arXiv:2311.12908).

    L = mean over pairs of -log sigmoid( -beta/2 [ (m_w - m_l) - (r_w - r_l) ] )

An update samples groups of videos of one prompt, makes pairs of them by their rewards, and trains on noised videos:
winner and loser of a pair share the noise and the timestep. m and r are denoising errors of the policy and of the
reference (see `losses.dpo_loss`), which is the policy's: the untrained model unless it was refreshed. Only the order of
the rewards counts, and neither gradients of the reward nor noise of the sampler are needed. The network is trained
without guidance, videos are sampled with it.

Pairs are kept in a replay buffer and used again, as in VADER's baseline (arXiv:2407.08737); `on_policy=True` uses each
pair once, in the update that made it. Deviation: the published method learns from a fixed set of labelled pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from algos.pairs import Pairs, count_pairs, draw_noise, join_pairs, mean_rows, pair_step, paired_loss, warmed_up
from algos.preferences import Strategy, preference_pairs
from algos.rollout import sample_videos
from algos.training import (
    adamw,
    check_choice,
    check_groups,
    check_not_negative,
    check_positive,
    num_batches,
    pick_preset,
    reward_metrics,
    start_stream,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionDPOConfig:
    """Defaults: the released Stable Diffusion 1.5 launcher's where it has such a setting, full fine-tuning."""

    learning_rate: float = 3.2e-7
    """of AdamW after the warm-up: published as 1e-8 times the pairs of a step, there 2048, here 32"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-2
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    warmup_steps: int = 500
    """optimiser steps over which the learning rate grows linearly; 0: none"""
    beta: float = 5000.0
    """of the loss, for errors that are means over latent elements; larger stays closer to the reference"""
    pairs: Strategy = "best_vs_worst"
    """which videos of a group make pairs, see `preferences.preference_pairs`"""
    videos_per_update: int = 64
    """videos sampled before the policy changes; a multiple of env.num_envs"""
    on_policy: bool = False
    """True: one optimiser step on this update's pairs, each used once; the next three fields are then without use"""
    buffer_pairs: int = 1024
    """latest pairs that are kept"""
    optimiser_steps: int = 4
    """per update, on pairs drawn from the buffer"""
    pairs_per_step: int = 32
    """pairs of one optimiser step, drawn without replacement; all pairs while the buffer has fewer"""
    micro_batch: int = 8
    """pairs per backward pass (twice as many videos), the knob for memory; changes results by rounding alone"""
    seed: int = 0
    """of the env's stream of prompts and noise, of pairs, timesteps and training noise"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "beta")
        check_positive(self, "videos_per_update", "buffer_pairs", "optimiser_steps", "pairs_per_step", "micro_batch")
        check_not_negative(self, "weight_decay", "warmup_steps")
        check_choice(self, "pairs", Strategy)
        if self.pairs_per_step > self.buffer_pairs:
            raise ValueError(
                f"DiffusionDPOConfig.pairs_per_step is {self.pairs_per_step}, but the buffer keeps only "
                f"buffer_pairs={self.buffer_pairs}; raise buffer_pairs, or lower pairs_per_step"
            )

    @classmethod
    def preset(cls, model: str) -> DiffusionDPOConfig:
        """Settings for a model by name; "MovingShapes" wants an env with group_size=8.

        Raises:
            ValueError: there are none for this model.
        """
        noise = cls(learning_rate=1e-3, warmup_steps=0, beta=500.0, pairs="all_pairs")
        presets = {"MovingShapes": replace(noise, beta=100.0), "MovingShapesUNet": noise}
        return pick_preset(presets, model)


class DiffusionDPO:
    """Preference learning on an env's own videos.

    Args:
        env: vector env with groups of at least two videos; any sampler, any noise level.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `DiffusionDPOConfig`.

    Raises:
        ValueError: an env without groups, or whose batch does not divide videos_per_update, or a buffer too small for
            the pairs of one update.
    """

    def __init__(self, env: Any, policy: Any, config: DiffusionDPOConfig) -> None:
        check_groups(env, "DiffusionDPO", "use DDPO with advantage='per_prompt', which needs no groups")
        self.env, self.policy, self.config = env, policy, config
        self.batches = num_batches(config.videos_per_update, env, "videos_per_update")
        n, groups = env.group_size, config.videos_per_update // env.group_size
        most = groups * (n * (n - 1) // 2 if config.pairs == "all_pairs" else 1)
        if not config.on_policy and config.buffer_pairs < most:
            raise ValueError(
                f"buffer_pairs is {config.buffer_pairs}, but an update can make {most} pairs ({groups} groups of {n}, "
                f"pairs={config.pairs!r}), and those of its first prompts would never be used; set "
                f"buffer_pairs={most} or more, or pairs='best_vs_worst'"
            )
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.buffer: Pairs = {}  # oldest first
        self.steps_taken = 0
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Samples `videos_per_update` videos, makes pairs of them and takes the optimiser steps.

        Where no pair is at hand (all groups tied, an empty buffer) there is no optimiser step.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction; pairs_new, pairs_buffered (0 on policy);
            loss, implicit_accuracy, margin, winner_error_change, loser_error_change (see `losses.dpo_loss`) and
            grad_norm (before clipping) as means over the optimiser steps, 0 if there was none; learning_rate of the
            last optimiser step; optimiser_steps.

        Raises:
            FloatingPointError: the gradient is not finite; this optimiser step was not taken.
        """
        c = self.config
        reward, new = self._sample()
        if not c.on_policy:
            # cloned: a slice would keep what was cut off in memory
            joined = join_pairs([self.buffer, new])
            self.buffer = {name: value[-c.buffer_pairs :].clone() for name, value in joined.items()}
        rows = [self._step(pairs) for pairs in self._deal(new)]
        return {
            **reward_metrics(reward, self.env.group_size),
            "pairs_new": float(count_pairs(new)),
            "pairs_buffered": float(count_pairs(self.buffer)),
            **mean_rows(rows),
            "learning_rate": self._learning_rate(max(self.steps_taken - 1, 0)),
            "optimiser_steps": float(len(rows)),
        }

    def _sample(self) -> tuple[Tensor, Pairs]:
        """Rewards [videos_per_update] of new videos, and their pairs."""
        clean, prompt_id, reward = sample_videos(self.env, self.policy, self.batches)
        winner, loser = preference_pairs(reward, self.env.group_size, self.config.pairs, self.generator).unbind(1)
        if not len(winner):
            return reward, {}
        return reward, {"winner": clean[winner], "loser": clean[loser], "prompt_id": prompt_id[winner]}

    def _deal(self, new: Pairs) -> list[Pairs]:
        """The pairs of each optimiser step."""
        c = self.config
        if c.on_policy:
            return [new] if new else []
        if not self.buffer:
            return []
        count = count_pairs(self.buffer)
        draws = [torch.randperm(count, generator=self.generator)[: c.pairs_per_step] for _ in range(c.optimiser_steps)]
        return [{name: value[draw] for name, value in self.buffer.items()} for draw in draws]

    def _step(self, pairs: Pairs) -> dict[str, float]:
        """One optimiser step; metrics are means over its pairs."""
        row = pair_step(
            self.optimizer,
            self.parameters,
            {**pairs, **draw_noise(count_pairs(pairs), self.env.mdp, self.generator)},
            self._loss,
            micro_batch=self.config.micro_batch,
            learning_rate=self._learning_rate(self.steps_taken),
            max_grad_norm=self.config.max_grad_norm,
        )
        self.steps_taken += 1
        return row

    def _loss(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        return paired_loss(self.env.mdp, self.policy, pairs, self.config.beta, self.generator)

    def _learning_rate(self, step: int) -> float:
        """Of optimiser step 0, 1, ..."""
        return warmed_up(self.config.learning_rate, step, self.config.warmup_steps)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, its steps, generator, env's stream, buffer, reference; the policy's weights are saved with it."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps_taken": self.steps_taken,
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
            "buffer": dict(self.buffer),
            "reference": self.policy.reference_state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment.

        Raises:
            ValueError: the saved buffer is larger than buffer_pairs: the state is of another configuration.
            CorruptWeightsError: the saved reference is of another policy. Nothing was changed in either case.
        """
        if count_pairs(state["buffer"]) > self.config.buffer_pairs:
            raise ValueError(
                f"the saved buffer holds {count_pairs(state['buffer'])} pairs, more than "
                f"buffer_pairs={self.config.buffer_pairs}; continue with the buffer_pairs it was saved with"
            )
        self.policy.load_reference_state_dict(state["reference"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_taken = int(state["steps_taken"])
        self.generator.set_state(state["generator"].cpu())
        self.env.load_state_dict(state["env"])
        self.buffer = {name: value.cpu() for name, value in state["buffer"].items()}
