"""PPO of TorchRL (Schulman et al. 2017, arXiv:1707.06347) on the denoising environment: a proof that it plugs in.

Everything that learns is TorchRL's: the rollout (`EnvBase.rollout`), the actor (`ProbabilisticActor`), the advantage
(`GAE`) and the loss (`ClipPPOLoss`). This file only connects them to `vdm_env.torchrl`. For results, use the algorithms
of this package; for how to bring one of TorchRL's, read on.

What one has to know:

- **Log-probabilities are means, TorchRL's are sums.** The usual TorchRL distribution sums nats over the event
  dimensions, and its clip range 0.2 belongs to that sum. The actor's distribution here answers `log_prob` with the mean
  over the D latent elements, so `ClipPPOLoss` computes r = exp(mean difference): 1e-4 is a usual range, 0.2 would never
  clip. A range c meant for sums is the same region as (1 +- c)^(1/D) for means; `clip_convention="sum"` converts it
  (`clip_of_sum`) and hands TorchRL the pair. The ratio itself stays the D-th root of the summed one, so that inside the
  region the gradient is about 1/D of that of sums, which AdamW evens out.
- **Rollouts, not collectors.** A TorchRL collector resets the env at the end of a batch, which draws the next videos
  before they are needed; a checkpoint taken in between would skip them. `rollout` stops at the last step.
- **One denoising step at a time.** A tensordict [B, S] is handed to the loss step by step, in the batches in which it
  was sampled: the ratio before the first update is then 1 to the last bit. Steps without noise are left out.
- **No entropy bonus.** The standard deviation is the sampler's, no parameter moves it.
- **Rewards are standardised** over the batch (or each group) before they reach GAE: the critic starts at 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from algos import distributed
from algos.advantages import batch_advantages, clip_advantages, group_advantages
from algos.critic import StateValue
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
from vdm_env.torchrl import make_actor

Baseline = Literal["batch", "group"]
Convention = Literal["mean", "sum"]


def clip_of_sum(clip_range: float, elements: int) -> tuple[float, float]:
    """The clip range on exp(mean) that clips where 1 +- c on exp(sum) does.

        1 - low = (1 - c)^(1/D),   1 + high = (1 + c)^(1/D)

    Args:
        clip_range: c, 0 < c < 1, for ratios of summed log-probabilities.
        elements: D >= 1, latent elements of a video.

    Returns:
        low and high, > 0; about c / D both.

    Raises:
        ValueError: an argument out of its range.
    """
    if not 0 < clip_range < 1 or elements < 1:
        raise ValueError(f"clip_range is {clip_range} and elements {elements}, expected 0 < clip_range < 1 and >= 1")
    return -math.expm1(math.log1p(-clip_range) / elements), math.expm1(math.log1p(clip_range) / elements)


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchRLPPOConfig:
    """Defaults: PPO's gamma and lambda, DDPO's optimiser and clip range."""

    learning_rate: float = 3e-4
    """of AdamW, constant; of the policy and the critic"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-4
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm that the policy's gradient is clipped to; the critic's, by itself, too"""
    clip_range: float = 1e-4
    """c, 0..1 (exclusive), see `clip_convention`"""
    clip_convention: Convention = "mean"
    """whether c is for exp of the mean log-ratio ("mean", the package's) or of the sum in nats ("sum", TorchRL's)"""
    adv_clip_max: float = 5.0
    """advantages are clipped to this magnitude"""
    baseline: Baseline = "batch"
    """what rewards are standardised over: the "batch", or the env's "group" """
    critic: bool = True
    """a learned value function and GAE; False: every step gets the video's standardised reward"""
    critic_coefficient: float = 0.5
    """weight of the critic's squared error"""
    gae_lambda: float = 0.95
    """0..1; 1 is reward minus value"""
    videos_per_rollout: int = 256
    """videos sampled before the policy changes; a multiple of env.num_envs"""
    num_inner_epochs: int = 4
    """optimiser steps on a rollout, each over all of it"""
    seed: int = 0
    """of the env's stream of prompts and noise, and of the critic's initial weights"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "clip_range", "adv_clip_max")
        check_positive(self, "critic_coefficient", "videos_per_rollout", "num_inner_epochs")
        check_not_negative(self, "weight_decay", "gae_lambda")
        check_choice(self, "baseline", Baseline)
        check_choice(self, "clip_convention", Convention)
        if self.clip_range >= 1 or self.gae_lambda > 1:
            raise ValueError(
                f"TorchRLPPOConfig.clip_range is {self.clip_range} and gae_lambda {self.gae_lambda}, expected less "
                f"than 1 and at most 1"
            )

    @classmethod
    def preset(cls, model: str) -> TorchRLPPOConfig:
        """Settings for a model by name, not tuned; "MovingShapes" wants an env with group_size=8.

        Raises:
            ValueError: there are none for this model.
        """
        settings = cls(learning_rate=5e-4, videos_per_rollout=64, num_inner_epochs=2, baseline="group", critic=False)
        presets = {"MovingShapes": settings, "MovingShapesUNet": settings}
        return pick_preset(presets, model)


class TorchRLPPO:
    """TorchRL's clipped PPO over an env's noisy denoising steps.

    Args:
        env: vector env of one clip with at least one step with noise; TorchRL's interface is put over it here.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `TorchRLPPOConfig`.

    Raises:
        ValueError: an env without noise, of several clips, or without groups where rewards are standardised in them, a
            rollout of one video, or one that the env's batch does not divide.
    """

    def __init__(self, env: Any, policy: Any, config: TorchRLPPOConfig) -> None:
        self.torchrl_env = env.to_torchrl()  # refuses what TorchRL's actors cannot describe
        self.steps = noisy_steps(env, "PPO")
        if config.baseline == "group":
            check_groups(env, "baseline='group'", "set baseline='batch'")
        if config.videos_per_rollout < 2:
            raise ValueError("videos_per_rollout is 1: one reward has no spread to be normalised by; sample at least 2")
        self.env, self.policy, self.config = env, policy, config
        self.batches = num_batches(config.videos_per_rollout, env, "videos_per_rollout")
        self.elements = math.prod(env.mdp.latent_shape)
        self.actor = make_actor(policy)
        self.parameters = policy.trainable_parameters()
        self.critic = StateValue(env, seed=config.seed) if config.critic else None
        self.critic_parameters = list(self.critic.parameters()) if self.critic else []
        value, self.gae = None, None
        if self.critic:
            value = TensorDictModule(self.critic, in_keys=["latents", "step", "prompt_id"], out_keys=["state_value"])
            # deactivate_vmap: two plain calls of the critic, on each state and on its successor
            self.gae = GAE(gamma=1.0, lmbda=config.gae_lambda, value_network=value, deactivate_vmap=True)
        summed = config.clip_convention == "sum"
        self.loss = ClipPPOLoss(
            self.actor,
            value,
            clip_epsilon=clip_of_sum(config.clip_range, self.elements) if summed else config.clip_range,
            entropy_bonus=False,
            critic_coeff=config.critic_coefficient if self.critic else None,
            loss_critic_type="l2",
            functional=False,  # the modules as they are: the policy's network is not theirs to copy
        )
        self.optimizer = adamw([*self.parameters, *self.critic_parameters], config)
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Samples a rollout and learns from it.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction; of TorchRL's loss, means over (video,
            step) pairs before their optimiser step: loss (the surrogate), loss_critic (0 without one), ratio_mean,
            ratio_max, clip_fraction, kl_old_nats (first-order estimate -mean log r, in nats and summed over noisy
            steps); ratio_first_error = how far the first batch's mean and largest ratio are from 1; grad_norm (of the
            policy, mean over optimiser steps, before clipping), learning_rate, optimiser_steps.

        Raises:
            FloatingPointError: the policy's or the critic's gradient is not finite; this optimiser step was not taken.
        """
        c = self.config
        ranks = distributed.current()
        batches = [self._rollout() for _ in range(self.batches)]
        reward = torch.cat([ranks.gather(batch["next", "reward"][:, -1, 0]) for batch in batches])
        scores = torch.cat([ranks.own(part) for part in self._standardised(reward).chunk(self.batches)])
        parts = self._parts(batches, scores)
        seen: list[dict[str, float]] = []
        norms = []
        for _ in range(c.num_inner_epochs):
            seen += [self._accumulate(part, len(parts)) for part in parts]
            if self.critic_parameters:
                self._clip_critic()
            norms.append(optimiser_step(self.optimizer, self.parameters, c.max_grad_norm))
        mean = ranks.means({name: sum(row[name] for row in seen) / len(seen) for name in seen[0]})
        largest = ranks.gather(torch.tensor([[row["max_ratio"] for row in seen]], dtype=torch.float64)).amax(0).tolist()
        first = ranks.means({"ratio": seen[0]["mean_ratio"]})["ratio"]
        return {
            **reward_metrics(reward, self.env.group_size),
            "loss": mean["loss_objective"],
            "loss_critic": mean.get("loss_critic", 0.0),
            "ratio_mean": mean["mean_ratio"],
            "ratio_max": max(largest),
            "ratio_first_error": max(abs(first - 1), abs(largest[0] - 1)),
            "clip_fraction": mean["clip_fraction"],
            "kl_old_nats": mean["kl_approx"] * self.elements * len(self.steps),
            "grad_norm": float(torch.stack(norms).mean()),
            "learning_rate": c.learning_rate,
            "optimiser_steps": float(len(norms)),
        }

    @torch.no_grad()
    def _rollout(self) -> TensorDict:
        """The next videos of the env's stream from noise to the end, [B, S]."""
        return self.torchrl_env.rollout(self.env.num_steps, self.actor)

    def _standardised(self, reward: Tensor) -> Tensor:
        if self.config.baseline == "group":
            return group_advantages(reward, self.env.group_size)
        return batch_advantages(reward)

    def _parts(self, batches: list[TensorDict], scores: Tensor) -> list[TensorDict]:
        """Each batch at each noisy step, [B], with what `ClipPPOLoss` wants to find: `advantage`, `value_target`."""
        for batch, score in zip(batches, scores.chunk(len(batches)), strict=True):
            if self.gae is None:
                batch["advantage"] = score[:, None, None].expand(*batch.batch_size, 1)
                continue
            reward = torch.zeros_like(batch["next", "reward"])
            reward[:, -1, 0] = score
            batch["next", "reward"] = reward
            with torch.no_grad():
                self.gae(batch)
        advantage = torch.stack([batch["advantage"][:, self.steps] for batch in batches])
        if self.gae is not None:
            ranks = distributed.current()
            advantage = ranks.own(batch_advantages(ranks.gather(advantage.flatten()))).view_as(advantage)
        advantage = clip_advantages(advantage, self.config.adv_clip_max)
        parts = []
        for batch, values in zip(batches, advantage, strict=True):
            for i, k in enumerate(self.steps):
                # a copy, contiguous as it was sampled: other strides may round differently
                parts.append(batch[:, k].exclude("next").clone().set("advantage", values[:, i]))
        return parts

    def _accumulate(self, part: TensorDict, count: int) -> dict[str, float]:
        """Adds the gradient of one part's share of the mean loss; one graph is alive at a time."""
        count *= distributed.current().world
        found = self.loss(part)
        total = found["loss_objective"]
        if self.critic is not None:
            total = total + found["loss_critic"]
        (total / count).backward()
        return {name: float(value.detach()) for name, value in found.items() if value.numel() == 1}

    def _clip_critic(self) -> None:
        """Clips the critic's gradient; one that is not finite is refused, as `optimiser_step` refuses the policy's."""
        distributed.current().sum_gradients(self.critic_parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.critic_parameters, self.config.max_grad_norm)
        if not torch.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"the critic's gradient norm is {float(norm)}, expected a finite number; the parameters were not "
                f"changed. Lower the learning rate, or set critic=False, and go on from the last checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, critic and the env's stream; the policy's weights are saved with the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "critic": dict(self.critic.state_dict()) if self.critic else {},
            "env": self.env.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment.

        Raises:
            ValueError: one of the two has a critic and the other has not; nothing was changed.
        """
        if bool(state["critic"]) != bool(self.critic):
            raise ValueError(
                f"the saved state has {'a' if state['critic'] else 'no'} critic, this config has critic="
                f"{self.config.critic}; continue with the setting it was saved with"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])
        self.env.load_state_dict(state["env"])
