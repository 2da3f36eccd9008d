"""Out of memory: which error that is, what to lower, and the same update again in smaller pieces.

An algorithm whose config has a `micro_batch` adds up the gradients of its pieces, so that smaller ones change a result
by the order of sums only. It reads `self.config.micro_batch` in every update (None: `env.num_envs`), and may have an
attribute `least_micro_batch`, below which it cannot go (1).
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from algos.checkpoint import join_tensors, split_tensors
from algos.random_state import get_random_state, set_random_state


class OutOfMemoryError(RuntimeError):
    """Memory did not suffice; the message names the settings that need less of it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch has no class of its own for the CPU's memory, nor for that which cuBLAS and cuDNN take beside it
    text = str(error).lower()
    signs = ("can't allocate memory", "out of memory", "_status_alloc_failed", "_allocation_failed")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def short_of_memory(error: Exception, where: str, algorithm: Any, env: Any) -> OutOfMemoryError:
    """The error to raise in its place, which says what to lower."""
    config: Any = getattr(algorithm, "config", None)
    settings = [f"num_envs of the env ({getattr(env, 'num_envs', 'unknown')} now)"]
    if hasattr(config, "micro_batch"):
        settings.insert(0, f"micro_batch of the algorithm's config ({config.micro_batch} now)")
    lower = " or ".join(settings)
    return OutOfMemoryError(
        f"out of memory in {where}: lower {lower} in a new run; where memory was short for a moment only, "
        f"resume=True goes on with the same settings ({error})"
    )


def micro_batch(algorithm: Any) -> int | None:
    """Videos or pairs of one backward pass of an algorithm; None where it has no such setting."""
    config = getattr(algorithm, "config", None)
    if not is_dataclass(config) or "micro_batch" not in [field.name for field in fields(config)]:
        return None
    given: int | None = config.micro_batch  # type: ignore[union-attr]
    return int(algorithm.env.num_envs) if given is None else given


def set_micro_batch(algorithm: Any, number: int) -> None:
    """Gives the algorithm the same config with this `micro_batch`."""
    algorithm.config = replace(algorithm.config, micro_batch=number)


def half(algorithm: Any) -> int | None:
    """Half of its `micro_batch`, or None where it cannot be less."""
    now, least = micro_batch(algorithm), int(getattr(algorithm, "least_micro_batch", 1))
    return None if now is None or now <= least else max(now // 2, least)


class Before:
    """Everything that an update changes, as it was before the update, in main memory.

    Args:
        algorithm: has `state_dict` and `load_state_dict`.
        policy: has `trainable_parameters`.
        device: of the run, whose random states belong to it.
    """

    def __init__(self, algorithm: Any, policy: Any, device: torch.device | str) -> None:
        self._algorithm, self._device = algorithm, device
        self._parameters = list(policy.trainable_parameters())
        self._weights = [parameter.detach().cpu().clone() for parameter in self._parameters]
        self._tensors: dict[str, torch.Tensor] = {}
        self._state = split_tensors(algorithm.state_dict(), self._tensors)
        self._random = get_random_state(device)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts it back, and lets go of the memory that the update had reserved."""
        for parameter, weight in zip(self._parameters, self._weights, strict=True):
            parameter.copy_(weight)
            parameter.grad = None
        self._algorithm.load_state_dict(join_tensors(self._state, self._tensors))
        set_random_state(self._random, self._device)
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()
