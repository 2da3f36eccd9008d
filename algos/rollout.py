"""Episodes kept for learning: what the policy saw, did, and how likely that was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdm_env import noise


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """One run of a vector env from noise to video. B: env.num_envs; S: env.num_steps. Nothing in it carries a graph."""

    observations: list[dict[str, Tensor]]
    """S dicts, as the env gave them: latents x_k, timestep, step, action_std, prompt_id, video_seed, ..."""
    actions: list[Tensor]
    """S of [B,C,F,H,W], as the env took them"""
    log_probs: list[Tensor]
    """S of [B], `dist.log_prob` of the action (a mean over elements) when it was taken; 0 without noise"""
    reward: Tensor
    """[B], of the finished videos"""
    prompt_id: Tensor
    """[B] int64"""


@torch.no_grad()
def collect(env: Any, policy: Any) -> Rollout:
    """Runs the policy once through all denoising steps, on the next videos of the env's stream.

    The network runs once a step: the action is drawn from the distribution it is then scored under, with the same keyed
    noise as `policy(obs)`.

    Args:
        env: vector env.
        policy: has `dist(obs)`.
    """
    obs, _ = env.reset()
    observations, actions, log_probs = [], [], []
    reward = torch.empty(0)
    for _ in range(env.num_steps):
        dist = policy.dist(obs)
        latents = obs["latents"]
        action = dist.rsample(noise=noise.normal(obs["video_seed"], obs["step"], latents.shape[1:]).to(latents))
        observations.append(obs)
        actions.append(action)
        log_probs.append(dist.log_prob(action))
        obs, reward, *_ = env.step(action)
    return Rollout(
        observations=observations,
        actions=actions,
        log_probs=log_probs,
        reward=reward,
        prompt_id=observations[0]["prompt_id"],
    )


def rows(rollout: Rollout, step: int, start: int, stop: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Observation, action and old log-probability of videos start..stop-1 at one denoising step."""
    obs = {name: value[start:stop] for name, value in rollout.observations[step].items()}
    return obs, rollout.actions[step][start:stop], rollout.log_probs[step][start:stop]
