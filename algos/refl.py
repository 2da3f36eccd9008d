"""ReFL: reward feedback learning (Xu et al. 2023, ImageReward, arXiv:2304.05977).

    L = scale mean_B max(0, target - R(decode(x0), prompt)),   x0 = x0_A_k x_k + x0_B_k a_theta(x_k, t_k, prompt)

The chain runs without a graph to a step k drawn from the last few; there the network's clean estimate is decoded and
scored at once, and the gradient passes through this one network call. The estimate is good enough to be judged only
late in the chain, hence the window. Many steps learn, not the last alone as with DRaFT-1, and the steps after k are
never run. k is one draw for a batch; drawing it late keeps the cost below that of a whole rollout.

Settings are those of the released trainer (THUDM/ImageReward, ImageReward/ReFL.py): 40 DDPM steps without guidance,
window the last 10, target 2 and scale 1e-3 for ImageReward. A noise level of 1 is its sampler.

Deviations: the released trainer tells the network the number k where t_k belongs, and takes the clean estimate with
the previous step's noise level; here both are those of x_k. The paper adds a pre-training loss on image-text pairs as a
regulariser (from memory); the trainer has none, and neither has this.

With `policy.guidance_scale` above 1 the guided output makes both the chain and the estimate.

Legend: B = env.num_envs videos of one batch, S = env.num_steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from algos import distributed, losses
from algos.reward_checks import check_differentiable, check_graph, check_one_clip
from algos.training import (
    adamw,
    check_choice,
    check_not_negative,
    check_positive,
    num_batches,
    optimiser_step,
    pick_preset,
    reward_metrics,
    start_stream,
)

Loss = Literal["hinge", "negative", "one_minus"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReFLConfig:
    """Defaults: the released trainer's, whose reward is ImageReward (mean 0, standard deviation 1)."""

    learning_rate: float = 1e-5
    """of AdamW, constant (released: all weights are trained)"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-2
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    window_steps: int | None = None
    """the step is drawn from this many last steps, 1..S; None: a quarter of S, rounded up (released: 10 of 40)"""
    loss: Loss = "hinge"
    """max(0, loss_target - R), -R, or 1 - R"""
    loss_target: float = 2.0
    """target of "hinge", in the reward's units: videos that score higher give no gradient"""
    loss_coefficient: float = 1e-3
    """multiplies the loss, whichever; AdamW hardly sees it, gradient clipping does"""
    videos_per_update: int = 8
    """videos whose gradients are accumulated for one optimiser step; a multiple of env.num_envs"""
    seed: int = 0
    """of the env's stream of prompts and noise, and of the steps that are drawn"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "loss_coefficient", "videos_per_update")
        check_not_negative(self, "weight_decay")
        check_choice(self, "loss", Loss)
        if self.window_steps is not None and self.window_steps < 1:
            raise ValueError(f"ReFLConfig.window_steps is {self.window_steps}, expected at least 1, or None")

    @classmethod
    def preset(cls, model: str) -> ReFLConfig:
        """Settings for a model by name; a starting point that was not tuned.

        Raises:
            ValueError: there are none for this model.
        """
        settings = cls(learning_rate=1e-3, loss="one_minus", loss_coefficient=1.0, videos_per_update=64)
        presets = {"MovingShapes": settings, "MovingShapesUNet": settings}
        return pick_preset(presets, model)


class ReFL:
    """Reward gradients through the clean estimate of a random late step.

    Args:
        env: vector env with a differentiable reward.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `ReFLConfig`.

    Raises:
        ValueError: a reward without gradients, an env of several clips, a window longer than the chain, or
            videos_per_update that the env's batch does not divide.
    """

    def __init__(self, env: Any, policy: Any, config: ReFLConfig) -> None:
        check_differentiable(env, "ReFL")
        check_one_clip(env, "ReFL")
        steps = env.num_steps
        self.window = -(-steps // 4) if config.window_steps is None else config.window_steps
        if self.window > steps:
            raise ValueError(
                f"window_steps is {self.window}, but an episode has {steps} denoising steps; set window_steps to at "
                f"most {steps}, or None for the last quarter"
            )
        self.env, self.policy, self.config = env, policy, config
        self.batches = num_batches(config.videos_per_update, env, "videos_per_update")
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Judges `videos_per_update` clean estimates and takes one optimiser step.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction (of the clean estimates, which are less
            sharp than finished videos), loss, grad_norm (before clipping), learning_rate, step_mean (mean k of the
            batches).

        Raises:
            FloatingPointError: the gradient is not finite; nothing was changed.
            ValueError: the reward has no graph although it says that it is differentiable.
        """
        c, ranks = self.config, distributed.current()
        rewards, loss_sum, step_sum = [], 0.0, 0
        for _ in range(self.batches):
            step = self._draw_step()
            reward = self._estimate(step)
            check_graph(reward, self.env)
            loss = losses.reward_loss(reward, c.loss, target=c.loss_target)
            loss = c.loss_coefficient * loss / (self.batches * ranks.world)
            loss.backward()
            rewards.append(ranks.gather(reward.detach()))
            loss_sum += float(loss.detach())
            step_sum += step
        norm = optimiser_step(self.optimizer, self.parameters, self.config.max_grad_norm)
        return {
            **reward_metrics(torch.cat(rewards), self.env.group_size),
            "loss": ranks.total(loss_sum),
            "grad_norm": float(norm),
            "learning_rate": self.config.learning_rate,
            "step_mean": step_sum / self.batches,
        }

    def _draw_step(self) -> int:
        """The step that learns, uniform over the window."""
        return self.env.num_steps - 1 - int(torch.randint(self.window, (), generator=self.generator))

    def _estimate(self, step: int) -> Tensor:
        """Rewards [B] of the clean estimates at a step of the chain, with that one network call's graph."""
        mdp = self.env.mdp
        started = mdp.clock()
        obs, _ = self.env.reset()
        with torch.no_grad():
            for _ in range(step):
                obs, *_ = self.env.step(self.policy(obs))
        # The mean, not a sample: exploration noise is part of the next x, not of the clean estimate.
        clean = mdp.x0(obs["latents"], self.policy.mean(obs), obs["step"])
        mdp.counters.rollout_s += mdp.clock() - started  # the env counts only episodes that end
        return mdp.outcome(clean, obs["prompt_id"], obs["video_seed"]).reward

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
