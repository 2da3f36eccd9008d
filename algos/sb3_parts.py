"""The environment, the policy and the rollout buffer in the terms of Stable-Baselines3, for `ppo_sb3.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from algos import distributed
from algos.advantages import batch_advantages, group_advantages
from vdm_env import noise
from vdm_env.single import DenoisingEnv

Baseline = Literal["batch", "group"]


class SB3VecEnv(VecEnv):
    """A `DenoisingVectorEnv` as SB3's vectorised environment: numpy arrays, standardised rewards, automatic resets.

    All videos end together and are reset together. After `episodes` of them it is not reset any more: the final
    observation stays (its value is never used, the episode being over), and no video is drawn before it is needed.

    Args:
        env: the vector env, driven by this object.
        episodes: how often it is run between two calls of `reset`.
        baseline: rewards are standardised over the "batch" or over each "group".
        bound: of the box, see `DenoisingEnv`.
    """

    def __init__(self, env: Any, *, episodes: int, baseline: Baseline, bound: float) -> None:
        single = DenoisingEnv(env, observe_embedding=False, action_bound=bound)  # for its spaces
        self.env, self.episodes, self.baseline, self.bound = env, episodes, baseline, bound
        self.rewards: list[Tensor] = []
        """[B] of each episode since the last reset, of all processes, as the reward model gave them"""
        super().__init__(env.num_envs, single.observation_space, single.action_space)

    def reset(self) -> dict[str, np.ndarray]:
        self.rewards = []
        return self._arrays(self.env.reset()[0])

    def _arrays(self, obs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """What the spaces hold, as SB3 wants it: on the CPU, and [B, 1] where there is one number a video."""
        names = self.observation_space.spaces
        return {name: (obs[name] if obs[name].ndim > 1 else obs[name][:, None]).cpu().numpy() for name in names}

    def step_async(self, actions: np.ndarray) -> None:
        if not bool((np.abs(actions) < self.bound).all()):
            raise ValueError(
                f"an action reached action_bound={self.bound} (or is NaN), and SB3 clips to it without a word: the "
                f"log-probability would be another action's. Raise action_bound, or look at the gradients"
            )
        self._action = torch.as_tensor(actions).to(self.env.device)

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        with torch.no_grad():
            obs, reward, terminated, _, _ = self.env.step(self._action)
        if bool(terminated.all()):
            ranks = distributed.current()
            reward = ranks.gather(reward)
            self.rewards.append(reward)
            grouped = self.baseline == "group"
            reward = group_advantages(reward, self.env.group_size) if grouped else batch_advantages(reward)
            reward = ranks.own(reward)
            if len(self.rewards) < self.episodes:
                obs, _ = self.env.reset()
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        return self._arrays(obs), reward.cpu().numpy(), terminated.cpu().numpy(), infos

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Calls the vector env's method once; there are no single environments behind it."""
        found = getattr(self.env, method_name)(*args, **kwargs)
        return [found for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


class DenoisingActorCritic(ActorCriticPolicy):
    """The denoiser as SB3's actor, with a small critic. Observations are SB3's: one number a video has shape [B, 1].

    Args:
        observation_space: of `SB3VecEnv`.
        action_space: of `SB3VecEnv`.
        lr_schedule: SB3's.
        denoiser: from `env.make_policy`.
        critic: values [B, 1] of latents, step and prompt_id.
        kwargs: of `ActorCriticPolicy`.
    """

    def __init__(
        self, observation_space: Any, action_space: Any, lr_schedule: Any, *, denoiser: Any, critic: Any, **kwargs: Any
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        self.__dict__["denoiser"] = denoiser  # no sub-module: SB3 may not switch its network to training mode
        self.trainable = nn.ParameterList(denoiser.trainable_parameters())
        self.critic = critic
        self.asked: list[Tensor] = []
        """log-probabilities [B] that `evaluate_actions` gave, without their graph"""
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _build(self, lr_schedule: Any) -> None:
        """None of SB3's networks: its linear layer to all latent elements would outweigh the denoiser."""

    def forward(self, obs: Mapping[str, Tensor], deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions [B,C,F,H,W], values [B,1] and log-probabilities [B] (means over elements)."""
        plain = _observation(obs)
        dist = self.denoiser.dist(plain)
        drawn = dist.mean if deterministic else dist.rsample(noise=_keyed_noise(plain))
        return drawn, self._value(plain), dist.log_prob(drawn)

    def evaluate_actions(self, obs: Mapping[str, Tensor], actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values [B,1], log-probabilities [B] of actions [B,D] or [B,C,F,H,W], and entropies [B]."""
        plain = _observation(obs)
        dist = self.denoiser.dist(plain)
        log_prob = dist.log_prob(actions.reshape(plain["latents"].shape))
        self.asked.append(log_prob.detach())
        return self._value(plain), log_prob, dist.entropy()

    def predict_values(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Values [B,1]."""
        return self._value(_observation(obs))

    def _predict(self, observation: Mapping[str, Tensor], deterministic: bool = False) -> Tensor:
        return self.forward(observation, deterministic)[0]

    def _value(self, obs: Mapping[str, Tensor]) -> Tensor:
        return self.critic(obs["latents"], obs["step"], obs["prompt_id"])


class StepwiseBuffer(DictRolloutBuffer):
    """SB3's rollout buffer, dealt out in rows: one denoising step of one batch of videos.

    Args:
        args: of `DictRolloutBuffer`.
        rows: the rows that are trained on.
        generator: of their order.
        kwargs: of `DictRolloutBuffer`.
    """

    def __init__(self, *args: Any, rows: list[int], generator: torch.Generator, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows, self.generator = rows, generator
        self.dealt: list[Tensor] = []
        """log-probabilities [B] of the rows that were dealt, as of the rollout"""

    def get(self, batch_size: int | None = None) -> Iterator[DictRolloutBufferSamples]:
        """The rows in random order, each of `batch_size` = n_envs videos."""
        for i in torch.randperm(len(self.rows), generator=self.generator).tolist():
            row = self.rows[i]
            old_log_prob = self.to_torch(self.log_probs[row])
            self.dealt.append(old_log_prob)
            yield DictRolloutBufferSamples(
                observations={name: self.to_torch(value[row]) for name, value in self.observations.items()},
                actions=self.to_torch(self.actions[row]),
                old_values=self.to_torch(self.values[row]),
                old_log_prob=old_log_prob,
                advantages=_normalised(self.to_torch(self.advantages[row])),
                returns=self.to_torch(self.returns[row]),
            )


def _normalised(advantages: Tensor) -> Tensor:
    """What SB3 does to a minibatch, over the rows of several processes; untouched where there is one."""
    ranks = distributed.current()
    everyone = ranks.gather(advantages)
    return advantages if ranks.world == 1 else (advantages - everyone.mean()) / (everyone.std() + 1e-8)


def _observation(obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as the vector env gives them: all but the latents are one number a video, [B, 1] in SB3's terms."""
    return {name: value if name == "latents" else value[:, 0] for name, value in obs.items()}


def _keyed_noise(obs: Mapping[str, Tensor]) -> Tensor:
    return noise.normal(obs["video_seed"], obs["step"], obs["latents"].shape[1:]).to(obs["latents"])
