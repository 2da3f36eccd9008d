"""OnlineVPO: online preference optimisation with a reference that follows (Zhang et al. 2024, arXiv:2412.15159).

    L = c mean over pairs of -log sigmoid( -beta/2 [ (m_w - m_l) - (r_w - r_l) ] )

An update samples N candidates of each prompt, pairs the best with the worst by the reward, and trains on the pairs at
once: winner and loser share the noise and the timestep. m and r are denoising errors of the policy and of the reference
(see `losses.dpo_loss`). Every K optimiser steps the reference becomes the policy as it is then, so that the policy may
go on where a fixed reference would hold it back. N is the env's group_size, published 6. The paper's reward is
VideoScore's temporal score; here it is the env's. The order of rewards is all that counts.

The same with refresh_every=40, beta=100 and logit-normal timesteps is Flow-GRPO's online Flow-DPO (arXiv:2505.05470).
Unlike there, a group of equal rewards makes no pair.

The paper gives no beta: the default is Diffusion-DPO's 5000 for models that predict noise, and for Open-Sora 1.2
Flow-DPO's 100; both are for errors that are means over elements. Of the paper's "batch of 8" the default makes 8 pairs.
The network is trained without guidance, videos are sampled with it. No code was released.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from algos.pairs import Pairs, count_pairs, draw_noise, mean_rows, pair_step, paired_loss, warmed_up
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
from vdm_env.schedule import FlowSchedule

Draw = Literal["auto", "schedule", "logit_normal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineVPOConfig:
    """Defaults: the paper's for VideoCrafter2 (12 frames of 320x512, LoRA of rank 16, 4000 steps, 8 groups of 6)."""

    learning_rate: float = 1e-4
    """of AdamW after the warm-up"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW; not given in the paper"""
    weight_decay: float = 1e-2
    """of AdamW; not given in the paper"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to; not given in the paper"""
    warmup_steps: int = 0
    """optimiser steps over which the learning rate grows linearly; 0: none (published: 500 for Open-Sora 1.2)"""
    beta: float = 5000.0
    """of the loss, for errors that are means over latent elements; not given in the paper, see the module"""
    loss_scale: float = 1.0
    """c, multiplies the loss and so the gradient before it is clipped (published: 0.01 for Open-Sora 1.2)"""
    refresh_every: int | None = 200
    """K, optimiser steps after which the reference becomes the policy; None: never (published: of 100 to 600, 200)"""
    timesteps: Draw = "auto"
    """"schedule": as the model was trained, uniform for epsilon and v; "logit_normal": flow models only, see
    `logit_normal_timesteps`; "auto": logit_normal for flow models, schedule for others"""
    pairs: Strategy = "best_vs_worst"
    """which videos of a group make pairs, see `preferences.preference_pairs`"""
    videos_per_update: int = 48
    """videos sampled before the policy changes; a multiple of env.num_envs"""
    optimiser_steps: int = 1
    """per update, each on all its pairs with new noise and timesteps (published: 1, every pair is used once)"""
    micro_batch: int = 8
    """pairs per backward pass (twice as many videos), the knob for memory; changes results by rounding alone"""
    seed: int = 0
    """of the env's stream of prompts and noise, of pairs, timesteps and training noise"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "beta", "loss_scale")
        check_positive(self, "videos_per_update", "optimiser_steps", "micro_batch")
        check_not_negative(self, "weight_decay", "warmup_steps")
        check_choice(self, "pairs", Strategy)
        check_choice(self, "timesteps", Draw)
        if self.refresh_every is not None and self.refresh_every < 1:
            raise ValueError(
                f"OnlineVPOConfig.refresh_every is {self.refresh_every}, expected a number of optimiser steps >= 1, or "
                f"None to keep the untrained model as the reference"
            )

    @classmethod
    def open_sora(cls, **changes: Any) -> OnlineVPOConfig:
        """The paper's for Open-Sora 1.2 (34 frames of 240x424, 30 steps, guidance 4, 5000 optimiser steps).

        Args:
            changes: fields that shall differ.
        """
        published: dict[str, Any] = {"learning_rate": 2e-6, "warmup_steps": 500, "loss_scale": 0.01}
        return cls(**{**published, "timesteps": "logit_normal", "beta": 100.0, **changes})

    @classmethod
    def preset(cls, model: str) -> OnlineVPOConfig:
        """Settings for a model by name, for an env with group_size=8.

        Raises:
            ValueError: there are none for this model.
        """
        small = cls(learning_rate=5e-4, beta=500.0, refresh_every=20, videos_per_update=64, optimiser_steps=4)
        presets = {"MovingShapes": small, "MovingShapesUNet": replace(small, learning_rate=3e-4)}
        return pick_preset(presets, model)


def logit_normal_timesteps(schedule: FlowSchedule, count: int, generator: torch.Generator) -> Tensor:
    """Timesteps of a flow model, drawn most often in the middle.

        u = sigmoid(z), z ~ N(0, 1);   sigma = r u / (1 + (r - 1) u);   t = T sigma,   r the schedule's shift

    Source: Esser et al. 2024 (arXiv:2403.03206); Open-Sora 1.2 and Flow-DPO, which shift u in the same way.

    Args:
        schedule: gives r and T.
        count: how many.
        generator: CPU generator.

    Returns:
        t [count] in (0, T), float32, on the CPU.
    """
    u = torch.randn(count, generator=generator).sigmoid()
    return schedule.num_train_timesteps * schedule.shift * u / (1 + (schedule.shift - 1) * u)


class OnlineVPO:
    """Preference learning on an env's own videos, with a reference that is refreshed.

    The reference is the policy's (`policy.refresh_reference`); a policy made anew has the untrained model.

    Args:
        env: vector env with groups of at least two videos; any sampler, any noise level.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `OnlineVPOConfig`.

    Raises:
        ValueError: an env without groups, or whose batch does not divide videos_per_update, or logit-normal timesteps
            for a model that is no flow model.
    """

    def __init__(self, env: Any, policy: Any, config: OnlineVPOConfig) -> None:
        check_groups(env, "OnlineVPO", "use DDPO with advantage='per_prompt', which needs no groups", size=6)
        schedule = env.mdp.schedule
        if config.timesteps == "logit_normal" and not isinstance(schedule, FlowSchedule):
            raise ValueError(
                f"timesteps='logit_normal' draws noise levels of flow models, and this model has a "
                f"{type(schedule).__name__} with {schedule.prediction} prediction; set timesteps='auto' or 'schedule'"
            )
        self.env, self.policy, self.config = env, policy, config
        self.logit_normal = config.timesteps != "schedule" and isinstance(schedule, FlowSchedule)
        self.batches = num_batches(config.videos_per_update, env, "videos_per_update")
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.steps_taken = 0
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Samples `videos_per_update` videos, learns from their pairs, and refreshes the reference when it is time.

        Where no pair is at hand (all groups tied) there is no optimiser step.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction; pairs; loss (with loss_scale),
            implicit_accuracy, margin, winner_error_change, loser_error_change (see `losses.dpo_loss`) and grad_norm
            (before clipping) as means over the optimiser steps, 0 if there was none; learning_rate of the last
            optimiser step; optimiser_steps; reference_age (optimiser steps since the reference was the policy) and
            reference_refreshes (since the beginning), both after this update.

        Raises:
            FloatingPointError: the gradient is not finite; this optimiser step was not taken.
        """
        c = self.config
        clean, prompt_id, reward = sample_videos(self.env, self.policy, self.batches)
        winner, loser = preference_pairs(reward, self.env.group_size, c.pairs, self.generator).unbind(1)
        pairs = {"winner": clean[winner], "loser": clean[loser], "prompt_id": prompt_id[winner]}
        rows = [self._step(pairs) for _ in range(c.optimiser_steps if len(winner) else 0)]
        every = c.refresh_every
        return {
            **reward_metrics(reward, self.env.group_size),
            "pairs": float(len(winner)),
            **mean_rows(rows),
            "learning_rate": self._learning_rate(max(self.steps_taken - 1, 0)),
            "optimiser_steps": float(len(rows)),
            "reference_age": float(self.steps_taken % every if every else self.steps_taken),
            "reference_refreshes": float(self.steps_taken // every if every else 0),
        }

    def _step(self, pairs: Pairs) -> dict[str, float]:
        """One optimiser step, after which the reference may be refreshed; metrics are means over the pairs."""
        c = self.config
        drawn = draw_noise(count_pairs(pairs), self.env.mdp, self.generator, self._draw)
        row = pair_step(
            self.optimizer,
            self.parameters,
            {**pairs, **drawn},
            self._loss,
            micro_batch=c.micro_batch,
            learning_rate=self._learning_rate(self.steps_taken),
            max_grad_norm=c.max_grad_norm,
        )
        self.steps_taken += 1
        if c.refresh_every and self.steps_taken % c.refresh_every == 0:
            self.policy.refresh_reference()
        return row

    def _loss(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        mdp, beta = self.env.mdp, self.config.beta
        loss, metrics = paired_loss(mdp, self.policy, pairs, beta, self.generator, timesteps=self._draw)
        return self.config.loss_scale * loss, metrics

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps [count]."""
        schedule = self.env.mdp.schedule
        if self.logit_normal:
            return logit_normal_timesteps(schedule, count, generator)
        return schedule.sample_timesteps(count, generator)

    def _learning_rate(self, step: int) -> float:
        """Of optimiser step 0, 1, ..."""
        return warmed_up(self.config.learning_rate, step, self.config.warmup_steps)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, its steps, generator, env's stream, reference; the policy's weights are saved with the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps_taken": self.steps_taken,
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
        self.steps_taken = int(state["steps_taken"])
        self.generator.set_state(state["generator"].cpu())
        self.env.load_state_dict(state["env"])
