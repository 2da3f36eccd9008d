"""DRaFT-LV: the last step's reward gradient, averaged over noises (Clark et al. 2023, arXiv:2309.17400).

    g = mean_i grad_theta R( decode(x0_i), prompt ),   x0_i = step_{S-1}( x_i, a_theta(x_i, t_{S-1}) )
    x_i = add_noise( stop_gradient(x0), eps_i, t_{S-1} ),   eps_i ~ N(0, I),   i = 1..n

DRaFT-1 pays a whole chain for one gradient of one step. Here the finished video x0 is noised again to the level of the
chain's last step and denoised once more, n times: n more gradients for n more network calls. The noise of the last step
averages out, the choice of x0 stays. x_i stands for the chain's own x_{S-1}: its law is the same only where the network
is a perfect denoiser, so the mean of the gradient is not exactly that of DRaFT-1.

x0 is noised by the model's own schedule (`mdp.add_noise`) and the step is the env's (`mdp.table`), so variance
preserving, flow and EDM models are all served. Where the last step is stochastic, each copy draws noise of its own.

No code is published. From memory of the paper: n = 2, and the chain's own last step counts as one more copy (its
Algorithm 1 adds the n gradients to that of DRaFT-1); `include_sample=False` averages over the n copies alone.

Deviation: gradients are averaged over the copies where the paper adds them up, so that n does not also set the size of
the gradient that is clipped.

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
from vdm_env.host import on_host

Loss = Literal["negative", "one_minus", "target_l1"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DRaFTLVConfig:
    """Defaults: the paper's small-scale settings, from memory (for eps and clipping: this package's)."""

    learning_rate: float = 4e-4
    """of AdamW, constant"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 0.1
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    copies: int = 2
    """n, noised copies of each finished video"""
    include_sample: bool = True
    """the chain's own last step counts as one more copy; False: it is scored for the record only"""
    loss: Loss = "negative"
    """-R, 1 - R or |R - loss_target|"""
    loss_target: float = 10.0
    """target of "target_l1", in the reward's units"""
    loss_scale: float = 1.0
    """factor of "target_l1" """
    videos_per_update: int = 4
    """videos whose gradients are accumulated for one optimiser step; a multiple of env.num_envs"""
    seed: int = 0
    """of the env's stream of prompts and noise, and of the copies' noise"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "loss_scale")
        check_positive(self, "copies", "videos_per_update")
        check_not_negative(self, "weight_decay")
        check_choice(self, "loss", Loss)

    @classmethod
    def preset(cls, model: str) -> DRaFTLVConfig:
        """Settings for a model by name; a starting point that was not tuned.

        Raises:
            ValueError: there are none for this model.
        """
        settings = cls(learning_rate=1e-3, weight_decay=1e-2, videos_per_update=64)
        presets = {"MovingShapes": settings, "MovingShapesUNet": settings}
        return pick_preset(presets, model)


class DRaFTLV:
    """Reward gradients of the last denoising step, at several noises for each sampled video.

    Args:
        env: vector env with a differentiable reward.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `DRaFTLVConfig`.

    Raises:
        ValueError: a reward without gradients, an env of several clips, or videos_per_update that the env's batch does
            not divide.
    """

    def __init__(self, env: Any, policy: Any, config: DRaFTLVConfig) -> None:
        check_differentiable(env, "DRaFT-LV")
        check_one_clip(env, "DRaFT-LV")
        self.env, self.policy, self.config = env, policy, config
        self.batches = num_batches(config.videos_per_update, env, "videos_per_update")
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Samples `videos_per_update` videos and takes one optimiser step.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction (of the sampled videos),
            copy_reward_mean, copy_reward_std (mean over the videos of the spread between the copies of one; 0 for one
            copy), loss, grad_norm (before clipping), learning_rate.

        Raises:
            FloatingPointError: the gradient is not finite; nothing was changed.
            ValueError: the reward has no graph although it says that it is differentiable.
        """
        c, ranks = self.config, distributed.current()
        terms = self.batches * (c.copies + c.include_sample) * ranks.world
        rewards, copy_rewards, loss_sum = [], [], 0.0

        def learn(reward: Tensor) -> Tensor:
            nonlocal loss_sum
            check_graph(reward, self.env)
            loss = losses.reward_loss(reward, c.loss, target=c.loss_target, scale=c.loss_scale) / terms
            loss.backward()  # at once: only one copy's graph is alive at a time
            loss_sum += float(loss.detach())
            return ranks.gather(reward.detach())

        for _ in range(self.batches):
            before, after, reward = self._sample()
            rewards.append(learn(reward) if c.include_sample else ranks.gather(reward))
            clean = after["latents"].detach()
            copies = [learn(self._copy(before, clean)) for _ in range(c.copies)]
            copy_rewards.append(torch.stack(copies))
        norm = optimiser_step(self.optimizer, self.parameters, c.max_grad_norm)
        copied = torch.cat(copy_rewards, dim=1)
        return {
            **reward_metrics(torch.cat(rewards), self.env.group_size),
            "copy_reward_mean": float(copied.mean()),
            "copy_reward_std": float(copied.std(0, correction=0).mean()),
            "loss": ranks.total(loss_sum),
            "grad_norm": float(norm),
            "learning_rate": c.learning_rate,
        }

    def _sample(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Observations before and after the last step, and rewards [B], with its graph if that step is learned from."""
        obs, _ = self.env.reset()
        before, reward = obs, torch.empty(0)
        for k in range(self.env.num_steps):
            before = obs
            last = k == self.env.num_steps - 1
            with torch.set_grad_enabled(last and self.config.include_sample):
                obs, reward, *_ = self.env.step(self.policy(obs))
        return before, obs, reward

    def _copy(self, before: dict[str, Tensor], clean: Tensor) -> Tensor:
        """Rewards [B] of clean latents that were noised to the last step's level and denoised in that step."""
        mdp, randn = self.env.mdp, distributed.current().randn
        eps, action_noise = (randn(clean.shape, self.generator).to(clean) for _ in range(2))
        noised = mdp.add_noise(clean, eps, mdp.table.timesteps[on_host(before["step"])])
        action = self.policy.dist({**before, "latents": noised}).rsample(noise=action_noise)
        again = mdp.step(noised, action, before["step"])
        return mdp.outcome(again, before["prompt_id"], before["video_seed"]).reward

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
