"""VADER: reward gradients through the last denoising steps (Prabhudesai et al. 2024, arXiv:2407.08737).

    theta <- theta - lr * grad L(R(decode(x_S), prompt)),   x_{k+1} = A_k x_k + B_k a_theta(x_k, t_k, prompt)

The chain is differentiable, so no log-probability is needed and any noise level serves. Only the last steps carry a
graph; x at the cut is a constant. AlignProp and DRaFT-K are the same update with other cuts and losses. How many frames
are decoded, and so how much memory the decoder takes, is the env's `decode_frames` ("random1" is VADER's).

Legend: B = env.num_envs videos of one batch, S = env.num_steps, K = steps with a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from algos import losses
from algos.training import (
    adamw,
    check_choice,
    check_not_negative,
    check_positive,
    num_batches,
    optimiser_step,
    reward_metrics,
    start_stream,
)

Loss = Literal["one_minus", "target_l1", "negative"]
Truncation = Literal["last", "random", "step"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VADERConfig:
    """Defaults: the released VideoCrafter2 script's (for betas, weight_decay and eps: torch's)."""

    learning_rate: float = 2e-4
    """of AdamW, constant"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-2
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    truncation: Truncation = "last"
    """where the graph starts: before the "last" `backprop_steps`, at a "random" step, or at the "step" `cutoff_step`"""
    backprop_steps: int = 1
    """K of "last": denoising steps with a graph, 1..S"""
    cutoff_step: int = 15
    """first step with a graph for "step", 0..S-1"""
    loss: Loss = "one_minus"
    """1 - R (HPS), |R - loss_target| (aesthetic: 10, PickScore: 100) or -R"""
    loss_target: float = 10.0
    """target of "target_l1", in the reward's units"""
    loss_scale: float = 0.1
    """factor of "target_l1" """
    videos_per_update: int = 8
    """videos whose gradients are accumulated for one optimiser step; a multiple of env.num_envs"""
    seed: int = 0
    """of the env's stream of prompts and noise, and of random cuts"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "loss_scale")
        check_positive(self, "backprop_steps", "videos_per_update")
        check_not_negative(self, "weight_decay", "cutoff_step")
        check_choice(self, "truncation", Truncation)
        check_choice(self, "loss", Loss)

    @classmethod
    def preset(cls, model: str) -> VADERConfig:
        """Settings found for a model by name.

        Raises:
            ValueError: there are none for this model.
        """
        presets = {"MovingShapes": cls(learning_rate=1e-3, backprop_steps=1, videos_per_update=64)}
        if model not in presets:
            raise ValueError(f"no VADER preset for {model!r}, only for {', '.join(presets)}; write VADERConfig(...)")
        return presets[model]


class VADER:
    """Reward back-propagation through an env's denoising chain.

    Args:
        env: vector env with a differentiable reward.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `VADERConfig`.

    Raises:
        ValueError: a reward without gradients, a cut outside the chain, or videos_per_update that the env's batch does
            not divide.
    """

    def __init__(self, env: Any, policy: Any, config: VADERConfig) -> None:
        reward = env.mdp.reward
        if not reward.differentiable:
            raise ValueError(
                f"VADER needs gradients of the reward, and {reward.name!r} says differentiable=False; "
                f"choose a differentiable reward, or an algorithm that only needs scores, such as DDPO"
            )
        if config.truncation == "last" and config.backprop_steps > env.num_steps:
            raise ValueError(
                f"backprop_steps is {config.backprop_steps}, but an episode has {env.num_steps} denoising steps; "
                f"set backprop_steps={env.num_steps} for the whole chain"
            )
        if config.truncation == "step" and config.cutoff_step >= env.num_steps:
            raise ValueError(f"cutoff_step is {config.cutoff_step}, expected 0..{env.num_steps - 1} (the last step)")
        self.env, self.policy, self.config = env, policy, config
        self.batches = num_batches(config.videos_per_update, env, "videos_per_update")
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Samples `videos_per_update` videos and takes one optimiser step.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction, loss, grad_norm (before clipping),
            learning_rate, backprop_steps (mean K of the batches).

        Raises:
            FloatingPointError: the gradient is not finite; nothing was changed.
            ValueError: the reward has no graph although it says that it is differentiable.
        """
        rewards, loss_sum, depth = [], 0.0, 0
        for _ in range(self.batches):
            cut = self._cut()
            reward = self._sample(cut)
            loss = self._loss(reward)
            (loss / self.batches).backward()
            rewards.append(reward.detach())
            loss_sum += float(loss.detach())
            depth += self.env.num_steps - cut
        norm = optimiser_step(self.optimizer, self.parameters, self.config.max_grad_norm)
        return {
            **reward_metrics(torch.cat(rewards), self.env.group_size),
            "loss": loss_sum / self.batches,
            "grad_norm": float(norm),
            "learning_rate": self.config.learning_rate,
            "backprop_steps": depth / self.batches,
        }

    def _cut(self) -> int:
        """First denoising step with a graph, 0..S-1."""
        steps = self.env.num_steps
        if self.config.truncation == "last":
            return steps - self.config.backprop_steps
        if self.config.truncation == "step":
            return self.config.cutoff_step
        return int(torch.randint(steps, (), generator=self.generator))

    def _sample(self, cut: int) -> Tensor:
        """Rewards [B] of one batch, with the graph of steps cut..S-1."""
        obs, _ = self.env.reset()
        reward = torch.empty(0)
        for k in range(self.env.num_steps):
            with torch.set_grad_enabled(k >= cut):
                obs, reward, *_ = self.env.step(self.policy(obs))
        if not reward.requires_grad:
            raise ValueError(
                f"the reward {self.env.mdp.reward.name!r} says differentiable=True but its scores have no graph; "
                f"remove torch.no_grad() or .detach() from it, or set differentiable=False and use DDPO"
            )
        return reward

    def _loss(self, reward: Tensor) -> Tensor:
        if self.config.loss == "one_minus":
            return losses.one_minus(reward)
        if self.config.loss == "negative":
            return losses.negative_mean(reward)
        return losses.target_l1(reward, self.config.loss_target, self.config.loss_scale)

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
