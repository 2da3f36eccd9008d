"""VADER: reward gradients through the last denoising steps (Prabhudesai et al. 2024, arXiv:2407.08737).

    theta <- theta - lr * grad L(R(decode(x_S), prompt)),   x_{k+1} = A_k x_k + B_k a_theta(x_k, t_k, prompt)

The chain is differentiable, so no log-probability is needed and any noise level serves. Only the last steps carry a
graph; x at the cut is a constant. AlignProp and DRaFT-K are the same update with other cuts and losses, and the reward
LoRAs of VideoX-Fun another setting: `VADERConfig.alignprop()`, `.draft(k)`, `.videox_fun()`.

How many frames are decoded, and so how much memory the decoder takes, is the env's `decode_frames`:

| VADER's decode_frame | here                        |                                                    |
|----------------------|-----------------------------|----------------------------------------------------|
| -1 (its default)     | `decode_frames="random1"`   | one random frame, drawn anew for each video        |
| i                    | `decode_frames=[i]`         | frame i (an int n would be n evenly spread frames) |
| alt                  | `decode_frames="alternate"` | frames 0, 2, 4, ...                                |
| all                  | `decode_frames="all"`       | every frame                                        |

With None, the default, the reward says which frames it wants.

Legend: B = env.num_envs videos of one batch, S = env.num_steps, K = steps with a graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from algos import distributed, losses
from algos.reward_checks import check_differentiable, check_graph
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

Loss = Literal["one_minus", "target_l1", "negative"]
Truncation = Literal["last", "random", "gaussian", "step"]


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
    """where the graph starts: before the "last" `backprop_steps`, at a "random" step 0..S-1, at a "gaussian"
    one (floor(S N(cutoff_mean, cutoff_std^2)), redrawn until in 1..S-1), or at the "step" `cutoff_step`; drawn anew for
    each batch"""
    backprop_steps: int = 1
    """K of "last": denoising steps with a graph, 1..S"""
    cutoff_step: int = 15
    """first step with a graph for "step", 0..S-1"""
    cutoff_mean: float = 0.84
    """of "gaussian", as a fraction of S (AlignProp: 42 of 50)"""
    cutoff_std: float = 0.1
    """of "gaussian", as a fraction of S (AlignProp: 5 of 50)"""
    stop_latent_gradient: bool = False
    """the network's input counts as constant at each step: the gradient passes from step to step through A_k only, not
    through the network's Jacobian (an option of VideoX-Fun, after DRaFT); for K = 1 it changes nothing"""
    loss: Loss = "one_minus"
    """1 - R (HPS), |R - loss_target| (aesthetic: 10, PickScore: 100) or -R"""
    loss_target: float = 10.0
    """target of "target_l1", in the reward's units"""
    loss_scale: float = 0.1
    """factor of "target_l1" """
    loss_coefficient: float = 1.0
    """multiplies the loss, whichever (AlignProp: 0.01); AdamW hardly sees it, gradient clipping does"""
    videos_per_update: int = 8
    """videos whose gradients are accumulated for one optimiser step; a multiple of env.num_envs"""
    seed: int = 0
    """of the env's stream of prompts and noise, and of random cuts"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "loss_scale", "loss_coefficient")
        check_positive(self, "backprop_steps", "videos_per_update", "cutoff_mean", "cutoff_std")
        check_not_negative(self, "weight_decay", "cutoff_step")
        check_choice(self, "truncation", Truncation)
        check_choice(self, "loss", Loss)

    @classmethod
    def alignprop(cls, **changes: Any) -> VADERConfig:
        """AlignProp (Prabhudesai et al. 2023, arXiv:2310.03739): released settings for the aesthetic reward.

        Cut drawn from N(42, 5^2) of 50 steps, loss 0.01 |R - 10|, 128 images an update. For HPS give
        `loss="one_minus"`. Released sampling: 50 DDIM steps, eta 1, guidance 5.

        Args:
            changes: fields with other values.
        """
        published: dict[str, Any] = {
            "learning_rate": 1e-3,
            "weight_decay": 1e-4,
            "truncation": "gaussian",
            "loss": "target_l1",
            "loss_target": 10.0,
            "loss_scale": 1.0,
            "loss_coefficient": 0.01,
            "videos_per_update": 128,
        }
        return cls(**(published | changes))

    @classmethod
    def draft(cls, backprop_steps: int = 1, **changes: Any) -> VADERConfig:
        """DRaFT-K (Clark et al. 2023, arXiv:2309.17400): the last K steps and plain ascent on the reward.

        The numbers are the paper's small-scale ones (learning rate 4e-4, weight decay 0.1, 4 images an update), from
        memory: no code is published. K = S is DRaFT; for DRaFT-LV see `algos.draft_lv`.

        Args:
            backprop_steps: K.
            changes: other fields with other values.
        """
        published: dict[str, Any] = {
            "learning_rate": 4e-4,
            "weight_decay": 0.1,
            "loss": "negative",
            "videos_per_update": 4,
        }
        return cls(**(published | {"backprop_steps": backprop_steps} | changes))

    @classmethod
    def videox_fun(cls, **changes: Any) -> VADERConfig:
        """VideoX-Fun's reward LoRA for Wan2.1-Fun-1.3B: the last 5 of 30 steps.

        Source: scripts/wan2.1_fun/train_reward_lora.py of aigc-apps/VideoX-Fun, and its published LoRAs (batch 8).
        It decodes the first latent frame only (here: `decode_frames="first"`) and offers `stop_latent_gradient=True`.
        The loss 1 - R for HPS is from memory. For the 14B model: `backprop_steps=1`.

        Args:
            changes: fields with other values.
        """
        published: dict[str, Any] = {
            "learning_rate": 1e-5,
            "weight_decay": 3e-2,
            "eps": 1e-10,
            "max_grad_norm": 0.3,
            "backprop_steps": 5,
            "loss": "one_minus",
            "videos_per_update": 8,
        }
        return cls(**(published | changes))

    @classmethod
    def preset(cls, model: str) -> VADERConfig:
        """Settings found for a model by name.

        Raises:
            ValueError: there are none for this model.
        """
        presets = {
            "MovingShapes": cls(learning_rate=1e-3, videos_per_update=64),
            "MovingShapesUNet": cls(learning_rate=5e-4, videos_per_update=64),
        }
        return pick_preset(presets, model)


def _check_gaussian(config: VADERConfig, num_steps: int) -> None:
    """Raises ValueError where fewer than one draw in a thousand lies in 1..S-1: redrawing would hardly end."""
    low, high = ((edge - config.cutoff_mean) / config.cutoff_std for edge in (1 / num_steps, 1.0))
    if (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2 < 1e-3:
        raise ValueError(
            f"hardly any cut from N({config.cutoff_mean:g}, {config.cutoff_std:g}^2) lies in steps 1..{num_steps - 1} "
            f"of {num_steps}; set cutoff_mean to a fraction of the chain such as 0.84, or truncation='last'"
        )


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
        check_differentiable(env, "VADER")
        if config.truncation == "last" and config.backprop_steps > env.num_steps:
            raise ValueError(
                f"backprop_steps is {config.backprop_steps}, but an episode has {env.num_steps} denoising steps; "
                f"set backprop_steps={env.num_steps} for the whole chain"
            )
        if config.truncation == "step" and config.cutoff_step >= env.num_steps:
            raise ValueError(f"cutoff_step is {config.cutoff_step}, expected 0..{env.num_steps - 1} (the last step)")
        if config.truncation == "gaussian":
            _check_gaussian(config, env.num_steps)
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
        c, ranks = self.config, distributed.current()
        rewards, loss_sum, depth = [], 0.0, 0
        for _ in range(self.batches):
            cut = self._cut()
            reward = self._sample(cut)
            loss = c.loss_coefficient * losses.reward_loss(reward, c.loss, target=c.loss_target, scale=c.loss_scale)
            (loss / (self.batches * ranks.world)).backward()
            rewards.append(ranks.gather(reward.detach()))
            loss_sum += float(loss.detach())
            depth += self.env.num_steps - cut
        norm = optimiser_step(self.optimizer, self.parameters, self.config.max_grad_norm)
        return {
            **reward_metrics(torch.cat(rewards), self.env.group_size),
            "loss": ranks.total(loss_sum) / (self.batches * ranks.world),
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
        if self.config.truncation == "gaussian":
            while True:
                draw = float(torch.randn((), generator=self.generator))
                step = math.floor(steps * (self.config.cutoff_mean + self.config.cutoff_std * draw))
                if 1 <= step < steps:
                    return step
        return int(torch.randint(steps, (), generator=self.generator))

    def _sample(self, cut: int) -> Tensor:
        """Rewards [B] of one batch, with the graph of steps cut..S-1."""
        obs, _ = self.env.reset()
        reward = torch.empty(0)
        for k in range(self.env.num_steps):
            with torch.set_grad_enabled(k >= cut):
                seen = {**obs, "latents": obs["latents"].detach()} if self.config.stop_latent_gradient else obs
                obs, reward, *_ = self.env.step(self.policy(seen))
        check_graph(reward, self.env)
        return reward

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
