"""What several algorithms share besides their mathematics, as functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from algos import distributed
from algos.advantages import zero_std_fraction

Config = TypeVar("Config")


def num_batches(videos: int, env: Any, name: str) -> int:
    """How many times the env has to be run for so many videos, by all processes side by side.

    Args:
        videos: asked for, >= 1, of all processes.
        env: has `num_envs`, the videos of one run in one process.
        name: of the config field, for the message.

    Raises:
        ValueError: not a positive multiple of `env.num_envs` times the number of processes.
    """
    world = distributed.current().world
    together = env.num_envs * world
    if videos < 1 or videos % together:
        near = max(1, round(videos / together)) * together
        of = f" in {world} processes" if world > 1 else ""
        raise ValueError(
            f"{name} is {videos}, expected a positive multiple of the env's num_envs={env.num_envs}{of}; "
            f"set {name}={near}, or make the env with a num_envs that divides {videos // world if of else videos}"
        )
    return videos // together


def noisy_steps(env: Any, learner: str, instead: str = "VADER") -> list[int]:
    """The denoising steps that have noise, of the env's own table, whatever the noise levels of its last reset.

    Args:
        env: the environment.
        learner: what learns from their noise, for the message.
        instead: what learns without, for the message.

    Raises:
        ValueError: there are none.
    """
    table = env.mdp.base_table
    steps: list[int] = table.stochastic.nonzero().flatten().tolist()
    if not steps:
        raise ValueError(
            f"{learner} learns from the sampler's noise, and {table.name!r} at this noise level has none; make the "
            f"env with noise_level > 0 (and a sampler that has noise), or use {instead}, which needs none"
        )
    return steps


def check_groups(env: Any, learner: str, instead: str, size: int = 8) -> None:
    """Raises ValueError unless the env has groups of at least two videos of one prompt.

    Args:
        env: the environment.
        learner: what compares them, for the message.
        instead: what to do without groups, for the message.
        size: of groups, to recommend.
    """
    if env.group_size < 2:
        raise ValueError(
            f"{learner} compares videos of one prompt, but the env has group_size={env.group_size}; make it with "
            f"group_size={size} (2 or more), or {instead}"
        )


def start_stream(env: Any, seed: int) -> None:
    """Puts the env at the beginning of the stream of prompts and noise of a seed, which its next `reset()` draws from.

    Where several processes train together, the env becomes this one's part of the wider env.

    Not `env.reset(seed=seed)`: that draws a batch, which nobody would use and whose size would shift all later videos.
    """
    distributed.shard_env(env)
    env.load_state_dict({"seed": seed, "videos_drawn": 0, "groups_drawn": 0})


def free_elements(env: Any) -> int:
    """Latent elements that one action moves: those of the video, or of the clip in the making where it has several.

    Log-probabilities are means over them, so a mean times this is in nats.
    """
    return math.prod(env.mdp.latent_shape) // getattr(env.mdp, "clips", 1)


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError for the first of these config fields that is not > 0 (`nan` included), or not whole.

    Fields declared as int have to be whole: 32.0 would only fail later, where it is counted with.
    """
    for name in names:
        value, kind = _number(config, name)
        if not value > 0:
            raise ValueError(f"{type(config).__name__}.{name} is {value}, expected a {kind} > 0")


def check_not_negative(config: Any, *names: str) -> None:
    """Raises ValueError for the first of these config fields that is not >= 0 (`nan` included), or not whole."""
    for name in names:
        value, kind = _number(config, name)
        if not value >= 0:
            raise ValueError(f"{type(config).__name__}.{name} is {value}, expected a {kind} >= 0")


def _number(config: Any, name: str) -> tuple[Any, str]:
    """A field's value and what it is to be: a "number", or a "whole number", which it then is."""
    value = getattr(config, name)
    declared = next(field.type for field in fields(config) if field.name == name)
    if declared not in (int, "int", "int | None"):
        return value, "number"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{type(config).__name__}.{name} is {value!r}, expected a whole number, as in {name}=8")
    return value, "whole number"


def check_choice(config: Any, name: str, choices: Any) -> None:
    """Raises ValueError for a config field that is none of the values of its `Literal` type."""
    value, allowed = getattr(config, name), get_args(choices)
    if value not in allowed:
        raise ValueError(f"{type(config).__name__}.{name} is {value!r}, expected one of {', '.join(allowed)}")


def pick_preset(presets: Mapping[str, Config], model: str) -> Config:
    """The settings of one model.

    Args:
        presets: configs of one class by name of the model, at least one.
        model: `env.model.spec.name`.

    Raises:
        ValueError: there are none for this model.
    """
    if model not in presets:
        name = type(next(iter(presets.values()))).__name__
        raise ValueError(f"no {name} preset for {model!r}, only for {', '.join(presets)}; write {name}(...)")
    return presets[model]


def adamw(parameters: Sequence[Tensor], config: Any) -> torch.optim.AdamW:
    """AdamW with a config's learning_rate, betas, eps and weight_decay.

    They stay the config's when a saved state is loaded: torch would take the saved ones, and a run that is continued
    with another learning rate would not use it.

    Raises:
        RuntimeError: processes that train together have different parameters.
    """
    distributed.current().check_same(parameters)
    settings = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, **settings)

    def keep_settings(loaded: torch.optim.Optimizer) -> None:
        for group in loaded.param_groups:
            group.update(settings, lr=config.learning_rate)

    optimizer.register_load_state_dict_post_hook(keep_settings)
    return optimizer


def optimiser_step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], max_grad_norm: float) -> Tensor:
    """Adds up the processes' gradients, clips the sum, steps and clears it.

    Args:
        optimizer: over `parameters`.
        parameters: with gradients: of each process its share of the whole loss.
        max_grad_norm: > 0, bound on the L2 norm over all of them.

    Returns:
        The norm before clipping (a scalar).

    Raises:
        FloatingPointError: the gradient is NaN or infinite; the parameters are left as they were.
    """
    distributed.current().sum_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if not torch.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"the gradient norm is {float(norm)}, expected a finite number; the parameters were not changed. "
            f"Lower the learning rate, or look at the reward's gradient, and go on from the last checkpoint"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()


def reward_metrics(reward: Tensor, group_size: int) -> dict[str, float]:
    """Mean and spread of training rewards [B], those of all processes; groups of one count as one group of them all."""
    reward = reward.detach()
    size = group_size if group_size > 1 else reward.numel()
    return {
        "reward_mean": float(reward.mean()),
        "reward_std": float(reward.std(correction=0)),
        "reward_group_std_mean": float(reward.reshape(-1, size).std(1, correction=0).mean()),
        "zero_std_fraction": zero_std_fraction(reward, size),
    }
