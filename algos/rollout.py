"""Running an env with a policy: episodes kept step by step for learning, or only the finished videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from algos import distributed
from vdm_env import noise
from vdm_env.host import take, upload


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """One run of a vector env from noise to video, this process's part of it where there are several.

    B: env.num_envs; S: env.num_steps. Nothing in it carries a graph.
    """

    observations: list[dict[str, Tensor]]
    """S dicts, as the env gave them: latents x_k, timestep, step, action_std, prompt_id, video_seed, ..."""
    actions: list[Tensor]
    """S of [B,C,F,H,W], as the env took them"""
    log_probs: list[Tensor]
    """S of [B], `dist.log_prob` of the action (a mean over elements) when it was taken; 0 without noise"""
    reward: Tensor
    """[B], of the finished videos"""
    parts: dict[str, Tensor]
    """{name: [B]}, what the reward is made of, as in info["reward_parts"], but in `reward`'s type and on its device"""
    prompt_id: Tensor
    """[B] int64"""


@torch.no_grad()
def collect(
    env: Any, policy: Any, *, noise_levels: Sequence[float] | None = None, shared_noise: bool = False
) -> Rollout:
    """Runs the policy once through all denoising steps, on the next videos of the env's stream.

    The network runs once a step: the action is drawn from the distribution it is then scored under, with the same keyed
    noise as `policy(obs)`.

    Args:
        env: vector env.
        policy: has `dist(obs)`.
        noise_levels: one for each denoising step, for this run only; None: the env's own.
        shared_noise: all videos of a group start from the noise of its first one; the noise of the steps stays theirs.
    """
    obs, _ = env.reset(options=None if noise_levels is None else {"noise_levels": noise_levels})
    if shared_noise:
        size = env.group_size
        obs = {**obs, "latents": obs["latents"][::size].repeat_interleave(size, dim=0)}
        env.set_state(obs)
    observations, actions, log_probs = [], [], []
    reward, info = torch.empty(0), {}
    for _ in range(env.num_steps):
        dist = policy.dist(obs)
        latents = obs["latents"]
        drawn = noise.normal(obs["video_seed"], obs["step"], latents.shape[1:])
        action = dist.rsample(noise=upload(drawn, latents.device, latents.dtype))
        observations.append(obs)
        actions.append(action)
        log_probs.append(dist.log_prob(action))
        obs, reward, _, _, info = env.step(action)
    return Rollout(
        observations=observations,
        actions=actions,
        log_probs=log_probs,
        reward=reward,
        parts={name: value.to(reward) for name, value in info["reward_parts"].items()},
        prompt_id=observations[0]["prompt_id"],
    )


def gathered(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """Rewards and prompt ids [N] of some rollouts in turn, those of all processes.

    Each rollout's are its chunk of N, and in it this process's are `distributed.current().own(chunk)`.
    """
    gather = distributed.current().gather
    return torch.cat([gather(r.reward) for r in rollouts]), torch.cat([gather(r.prompt_id) for r in rollouts])


def rows(rollout: Rollout, step: int, start: int, stop: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Observation, action and old log-probability of videos start..stop-1 at one denoising step."""
    obs = take(rollout.observations[step], slice(start, stop))
    return obs, rollout.actions[step][start:stop], rollout.log_probs[step][start:stop]


@torch.no_grad()
def sample_videos(env: Any, policy: Any, batches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finished videos of the env's stream, those of all processes, for methods that need no trajectories.

    Args:
        env: vector env.
        policy: called as policy(obs).
        batches: runs of the env, >= 1; N = batches * env.num_envs, times the number of processes.

    Returns:
        Clean latents [N,C,F,H,W], prompt ids [N] int64 and rewards [N] (at least float32), on the CPU.
    """
    sampled, gather = [], distributed.current().gather
    for _ in range(batches):
        obs, _ = env.reset()
        reward = torch.empty(0)
        for _ in range(env.num_steps):
            obs, reward, *_ = env.step(policy(obs))
        # the last observation holds what was decoded
        sampled.append(tuple(gather(value.cpu()) for value in (obs["latents"], obs["prompt_id"], reward)))
    clean, prompt_id, rewards = (torch.cat([batch[i] for batch in sampled]) for i in range(3))
    return clean, prompt_id, rewards.to(torch.promote_types(rewards.dtype, torch.float32))
