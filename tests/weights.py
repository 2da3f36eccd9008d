"""Weights that act: adapters that are not zero, layers that do not start at zero and hide what goes wrong in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vdm_env import noise


@torch.no_grad()
def redraw(parameters: Iterable[Tensor], std: float = 0.1, seed: int = 0) -> None:
    """Normal values of that deviation for each, one after the other from one generator."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def trained(env: Any, **options: Any) -> Any:
    """A policy of the env whose LoRA does something, and all of whose matrices have a gradient."""
    policy = env.make_policy(lora_rank=1, seed=1, **options)
    redraw(policy.trainable_parameters())
    return policy


def wake(network: nn.Module) -> None:
    """Gives layers that are zero values of their own."""
    redraw((parameter for parameter in network.parameters() if not parameter.any()), 0.05, seed=1)


@torch.no_grad()
def nudge(policy: Any, size: float = 0.05) -> Any:
    """Moves a policy away from where it is; where it starts, LoRA's second matrices are zero."""
    for i, parameter in enumerate(policy.trainable_parameters()):
        parameter.add_(size * noise.normal([i], 0, parameter.shape)[0])
    return policy
