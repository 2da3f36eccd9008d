"""PPO of Stable-Baselines3 on the denoising environment: a proof that it plugs in.

Everything that learns is SB3's (`stable_baselines3.PPO`: rollouts, GAE, the clipped loss); `sb3_parts.py` brings the
environment and the policy into its terms. For results, use the algorithms of this package.

What one has to know:

- **The policy** is an `ActorCriticPolicy` that builds no networks of its own: its mean is the denoiser's output, its
  standard deviation the sampler's, its value a small `StateValue`. `log_prob` is the mean over the D latent elements
  (SB3's own Gaussians sum), so clip ranges are those of DDPO: 1e-4 where SB3's 0.2 is for sums, about c * D nats.
- **The environment** is the vector env itself behind SB3's `VecEnv`, with the spaces of `vdm_env.single.DenoisingEnv`.
  SB3 wants a finite box and clips to it without saying so: an action that reaches the box is an error here.
- **Rewards are standardised** over the videos that end together (or each group): the critic starts at 0.
- **Minibatches** are one denoising step of one batch of videos, as sampled: the ratio before the first update is 1 to
  the last bit, steps without noise are left out, and the order comes from a generator instead of numpy's global one.
  Each minibatch is an optimiser step, as in SB3.
- **Checkpoints.** SB3's `save` pickles objects. `state_dict()` holds the optimiser, the critic and the streams instead.
- One `update()` is one `learn()` of one rollout: sampling and training, nothing else. Data pass through numpy, so on a
  GPU latents travel twice a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import explained_variance
from torch import Tensor

from algos import distributed
from algos.critic import StateValue
from algos.sb3_parts import Baseline, DenoisingActorCritic, SB3VecEnv, StepwiseBuffer
from algos.training import (
    check_choice,
    check_groups,
    check_not_negative,
    check_positive,
    noisy_steps,
    num_batches,
    pick_preset,
    reward_metrics,
    start_stream,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SB3PPOConfig:
    """Defaults: SB3's GAE and value weight, DDPO's clip range."""

    learning_rate: float = 3e-4
    """of AdamW, constant; of the policy and the critic"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-4
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient of policy and critic together is clipped to"""
    clip_range: float = 1e-4
    """c, 0..1 (exclusive), on the exponential of the difference of mean log-probabilities"""
    baseline: Baseline = "batch"
    """what rewards are standardised over: the "batch" of videos that end together, or the env's "group" """
    critic_coefficient: float = 0.5
    """weight of the critic's squared error"""
    gae_lambda: float = 0.95
    """0..1; 1 is reward minus value"""
    videos_per_rollout: int = 256
    """videos sampled before the policy changes; a multiple of env.num_envs"""
    num_inner_epochs: int = 1
    """passes over a rollout"""
    action_bound: float = 1e4
    """half-width of the box that SB3 is told; beyond any |output| + 5 action_std"""
    seed: int = 0
    """of the env's stream of prompts and noise, of the minibatches' order and of the critic's initial weights"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "clip_range", "critic_coefficient")
        check_positive(self, "videos_per_rollout", "num_inner_epochs", "action_bound")
        check_not_negative(self, "weight_decay", "gae_lambda")
        check_choice(self, "baseline", Baseline)
        if self.clip_range >= 1 or self.gae_lambda > 1:
            raise ValueError(
                f"SB3PPOConfig.clip_range is {self.clip_range} and gae_lambda {self.gae_lambda}, expected less than 1 "
                f"and at most 1"
            )

    @classmethod
    def preset(cls, model: str) -> SB3PPOConfig:
        """Settings for a model by name, not tuned; "MovingShapes" wants an env with group_size=8.

        Raises:
            ValueError: there are none for this model.
        """
        settings = cls(learning_rate=1e-4, videos_per_rollout=64, baseline="group")
        presets = {"MovingShapes": settings, "MovingShapesUNet": settings}
        return pick_preset(presets, model)


class SB3PPO:
    """SB3's PPO over an env's noisy denoising steps.

    Args:
        env: vector env of one clip in float32, with at least two videos and one step with noise.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `SB3PPOConfig`.

    Raises:
        ValueError: an env without noise, of one video, of several clips, of float64 latents, or without groups where
            rewards are standardised in them, or a rollout that the env's batch does not divide.
    """

    def __init__(self, env: Any, policy: Any, config: SB3PPOConfig) -> None:
        if getattr(env.mdp, "clips", 1) > 1:
            raise ValueError(
                f"an episode of this env makes {env.mdp.clips} clips, and what each is conditioned on is part of its "
                f"observation, which SB3's spaces leave out; use env.single for one clip, or DDPO for all"
            )
        self.steps = noisy_steps(env, "PPO")
        if config.baseline == "group":
            check_groups(env, "baseline='group'", "set baseline='batch'")
        if env.num_envs < 2:
            raise ValueError("num_envs is 1: SB3 normalises advantages within a minibatch, make the env with 2 or more")
        if env.mdp.dtype != torch.float32:
            raise ValueError(f"the env's latents are {env.mdp.dtype}, SB3 stores float32; make the env with that dtype")
        self.env, self.policy, self.config = env, policy, config
        self.batches = num_batches(config.videos_per_rollout, env, "videos_per_rollout")
        self.parameters = policy.trainable_parameters()
        ranks = distributed.current()
        ranks.check_same(self.parameters)
        self.critic = StateValue(env, seed=config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.vec_env = SB3VecEnv(env, episodes=self.batches, baseline=config.baseline, bound=config.action_bound)
        rows = [b * env.num_steps + k for b in range(self.batches) for k in self.steps]
        self.model = PPO(
            DenoisingActorCritic,
            self.vec_env,
            learning_rate=config.learning_rate,
            n_steps=env.num_steps * self.batches,
            batch_size=env.num_envs,
            n_epochs=config.num_inner_epochs,
            gamma=1.0,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip_range,
            vf_coef=config.critic_coefficient,
            max_grad_norm=config.max_grad_norm,
            normalize_advantage=ranks.world == 1,  # of several processes `StepwiseBuffer` does it over all of them
            rollout_buffer_class=StepwiseBuffer,
            rollout_buffer_kwargs={"rows": rows, "generator": self.generator},
            policy_kwargs={
                "denoiser": policy,
                "critic": self.critic,
                "optimizer_class": torch.optim.AdamW,
                "optimizer_kwargs": {
                    "betas": config.betas,
                    "eps": config.eps,
                    "weight_decay": config.weight_decay,
                },
            },
            seed=None,  # a number would seed the global generators of Python, numpy and torch
            device=env.device,
        )
        self.model.set_logger(Logger(None, []))  # keeps the last values, prints and writes nothing
        self.optimizer = self.model.policy.optimizer
        self.optimizer.register_step_pre_hook(_refuse_bad_gradients)
        if ranks.world > 1:  # SB3 clips right after its backward pass
            for parameter in self.model.policy.parameters():
                parameter.register_post_accumulate_grad_hook(_mean_gradient)
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Samples a rollout and learns from it: one `learn()` of SB3.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction; SB3's own figures: loss (of the last
            minibatch, critic included), loss_policy, loss_critic, clip_fraction (means over minibatches),
            explained_variance (of the critic; 0 where it is not defined); kl_old_nats (second-order estimate from the
            log-ratios of all passes, before each optimiser step, summed over noisy steps; SB3's own is lost in rounding
            at ratios this close to 1); learning_rate, optimiser_steps.

        Raises:
            FloatingPointError: the gradient is not finite; this optimiser step was not taken.
            ValueError: an action reached the box, and SB3 would have changed it.
        """
        c = self.config
        rows = self.model.n_steps * self.env.num_envs
        dealt, asked = self.model.rollout_buffer.dealt, self.model.policy.asked
        dealt.clear()
        asked.clear()
        self.model.learn(total_timesteps=rows, log_interval=None)
        ranks = distributed.current()
        reward = torch.cat(self.vec_env.rewards)
        found = {name.removeprefix("train/"): float(v) for name, v in self.model.logger.name_to_value.items()}
        explained = found.pop("explained_variance")
        if ranks.world > 1:
            buffer = self.model.rollout_buffer
            columns = (ranks.gather(torch.from_numpy(c).flatten()).numpy() for c in (buffer.values, buffer.returns))
            found, explained = ranks.means(found), float(explained_variance(*columns))
        # 0.5 E[(log r)^2] is the KL to second order, for log-ratios in nats; these are means over the elements
        nats = ranks.gather((torch.cat(asked) - torch.cat(dealt)).double()) * math.prod(self.env.mdp.latent_shape)
        return {
            **reward_metrics(reward, self.env.group_size),
            "loss": found["loss"],
            "loss_policy": found["policy_gradient_loss"],
            "loss_critic": found["value_loss"],
            "clip_fraction": found["clip_fraction"],
            "kl_old_nats": 0.5 * float(nats.square().mean()) * len(self.steps),
            "explained_variance": explained if math.isfinite(explained) else 0.0,
            "learning_rate": c.learning_rate,
            "optimiser_steps": float(c.num_inner_epochs * self.batches * len(self.steps)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, critic, generator and the env's stream; the policy's weights are saved with the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "critic": dict(self.critic.state_dict()),
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.critic.load_state_dict(state["critic"])
        self.generator.set_state(state["generator"].cpu())
        self.env.load_state_dict(state["env"])


def _mean_gradient(parameter: Tensor) -> None:
    """Called in the backward pass, when a parameter has its gradient: SB3's losses are means over a process's rows."""
    ranks = distributed.current()
    ranks.sum_gradients([parameter])
    assert parameter.grad is not None
    parameter.grad /= ranks.world


def _refuse_bad_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Called by the optimiser before each step; SB3 itself would step on NaN."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                optimizer.zero_grad(set_to_none=True)
                raise FloatingPointError(
                    "the gradient is not finite; the parameters were not changed. Lower the learning rate, or look at "
                    "the reward, and go on from the last checkpoint"
                )
