"""From rewards to advantages. B: videos of the batch; a group is `group_size` neighbouring videos of one prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor


def _check_reward(reward: Tensor) -> None:
    if not isinstance(reward, Tensor) or not reward.is_floating_point():
        given = reward.dtype if isinstance(reward, Tensor) else type(reward).__name__
        raise TypeError(f"reward is {given}, expected a floating-point tensor [B]; convert it with .float()")
    if reward.ndim != 1 or reward.numel() == 0:
        raise ValueError(f"reward has shape {tuple(reward.shape)}, expected [B] with B >= 1: one number per video")
    if not torch.isfinite(reward).all():
        bad = int((~torch.isfinite(reward)).sum())
        raise ValueError(
            f"{bad} of {reward.numel()} rewards are NaN or infinite, expected finite numbers; repair the reward"
        )


def batch_advantages(reward: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Normalisation over the whole batch.

        A = (R - mean R) / (std R + eps),   population std

    Source: ddpo-pytorch (arXiv:2305.13301) without the per-prompt tracker.

    Args:
        reward: [B], finite.
        eps: added to the std.

    Returns:
        [B], constant for autograd; a batch of equal rewards has zero advantage.
    """
    _check_reward(reward)
    reward = reward.detach()
    if reward.amax() == reward.amin():  # their mean is not quite that number, and eps would make an advantage of it
        return torch.zeros_like(reward)
    return (reward - reward.mean()) / (reward.std(correction=0) + eps)


def group_advantages(
    reward: Tensor,
    group_size: int,
    *,
    std: Literal["population", "unbiased", "none"] = "population",
    global_std: bool = False,
    eps: float = 1e-4,
) -> Tensor:
    """Each video against the others of its prompt.

        A_i = (R_i - mean_group R) / (std R + eps)

    Source: Flow-GRPO (arXiv:2505.05470): population std, over the whole batch (`global_std=True`), eps 1e-4.
    DanceGRPO (arXiv:2505.07818) and MixGRPO: unbiased std of the group, eps 1e-8.

    Args:
        reward: [B], finite; group g is reward[g * group_size : (g + 1) * group_size], as the env's slots are.
        group_size: >= 2, divides B.
        std: estimator; "none" leaves the units of the reward.
        global_std: spread of the whole batch instead of the group's.
        eps: added to the std.

    Returns:
        [B], constant for autograd; a group of equal rewards has zero advantage.

    Raises:
        TypeError, ValueError: bad reward, group_size < 2 or not a divisor of B, unknown std.
    """
    _check_reward(reward)
    if group_size < 2 or reward.numel() % group_size:
        raise ValueError(
            f"group_size is {group_size} for {reward.numel()} rewards, expected >= 2 and a divisor; "
            f"make the env with group_size >= 2, or use batch_advantages"
        )
    if std not in ("population", "unbiased", "none"):
        raise ValueError(f"std is {std!r}, expected 'population', 'unbiased' or 'none'")
    groups = reward.detach().reshape(-1, group_size)
    differ = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)
    # the mean of equal numbers is not that number to the last bit, and a small eps would make an advantage of it
    centred = torch.where(differ, groups - groups.mean(1, keepdim=True), 0.0)
    if std == "none":
        return centred.reshape(-1)
    correction = 1 if std == "unbiased" else 0
    spread = groups.reshape(1, -1) if global_std else groups
    return (centred / (spread.std(1, correction=correction, keepdim=True) + eps)).reshape(-1)


def zero_std_fraction(reward: Tensor, group_size: int) -> float:
    """Fraction of groups whose rewards are all equal, and so teach nothing: [0, 1]. Args as `group_advantages`."""
    _check_reward(reward)
    if group_size < 1 or reward.numel() % group_size:
        raise ValueError(f"group_size is {group_size} for {reward.numel()} rewards, expected a divisor >= 1")
    groups = reward.detach().reshape(-1, group_size)
    return float((groups.amax(1) == groups.amin(1)).double().mean())


def clip_advantages(advantage: Tensor, clip_max: float) -> Tensor:
    """A = clip(A, -clip_max, clip_max); DDPO uses 5. clip_max > 0."""
    if not clip_max > 0:
        raise ValueError(f"clip_max is {clip_max}, expected a number > 0 (DDPO uses 5)")
    return advantage.clamp(-clip_max, clip_max)


class PerPromptTracker:
    """Running statistics of each prompt's latest rewards.

        A_i = (R_i - mean of the prompt's buffer) / (population std of the buffer + 1e-6)

    A prompt seen fewer than `min_count` times is normalised by the batch instead, since two or three rewards say little
    about its spread. Source: ddpo-pytorch (arXiv:2305.13301).

    Args:
        buffer_size: rewards kept per prompt, the oldest fall out.
        min_count: 1..buffer_size.

    Raises:
        ValueError: buffer_size < 1 or min_count outside 1..buffer_size (it would never be reached).
    """

    EPS = 1e-6

    def __init__(self, buffer_size: int = 16, min_count: int = 16) -> None:
        if buffer_size < 1 or not 1 <= min_count <= buffer_size:
            raise ValueError(
                f"buffer_size is {buffer_size} and min_count {min_count}, expected 1 <= min_count <= buffer_size: "
                f"with a larger min_count no prompt would ever get statistics of its own"
            )
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._buffers: dict[Hashable, deque[float]] = {}

    def update(self, prompts: Sequence[Hashable], reward: Tensor) -> Tensor:
        """Add the batch to the buffers, then return its advantages.

        Args:
            prompts: B keys (prompt ids or texts).
            reward: [B], finite.

        Returns:
            [B], in reward's dtype, on its device, constant for autograd.

        Raises:
            TypeError, ValueError: bad reward, or not one key per reward; the buffers are then unchanged.
        """
        _check_reward(reward)
        if len(prompts) != reward.numel():
            raise ValueError(f"{len(prompts)} prompts for {reward.numel()} rewards, expected one prompt per reward")
        rewards = reward.detach().to("cpu", torch.float64)
        positions: dict[Hashable, list[int]] = {}
        for i, prompt in enumerate(prompts):
            positions.setdefault(prompt, []).append(i)
        advantage = torch.empty_like(rewards)
        for prompt, rows in positions.items():
            buffer = self._buffers.setdefault(prompt, deque(maxlen=self.buffer_size))
            buffer.extend(rewards[rows].tolist())
            known = torch.tensor(list(buffer), dtype=torch.float64) if len(buffer) >= self.min_count else rewards
            # in float64 and with this eps the rounding of the mean of equal rewards stays without effect
            advantage[rows] = (rewards[rows] - known.mean()) / (known.std(correction=0) + self.EPS)
        return advantage.to(reward)

    def state_dict(self) -> dict[str, Any]:
        """The buffers, as lists (also survives JSON when the keys are ints or strings)."""
        return {"prompts": list(self._buffers), "rewards": [list(buffer) for buffer in self._buffers.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`.

        Raises:
            ValueError: a buffer is longer than buffer_size: the state is of another tracker.
        """
        if any(len(rewards) > self.buffer_size for rewards in state["rewards"]):
            raise ValueError(
                f"the saved tracker holds more than buffer_size={self.buffer_size} rewards for a prompt; "
                f"continue with the buffer_size it was saved with"
            )
        pairs = zip(state["prompts"], state["rewards"], strict=True)
        self._buffers = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in pairs}
