"""What algorithms insist on that follow the gradient of a reward, or learn from finished videos."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_differentiable(env: Any, algorithm: str) -> None:
    """Raises ValueError if the env's reward says that no gradient reaches the pixels.

    Args:
        env: vector env.
        algorithm: its name, for the message.
    """
    reward = env.mdp.reward
    if not reward.differentiable:
        raise ValueError(
            f"{algorithm} needs gradients of the reward, and {reward.name!r} says differentiable=False; "
            f"choose a differentiable reward, or an algorithm that only needs scores, such as DDPO"
        )


def check_one_clip(env: Any, algorithm: str) -> None:
    """Raises ValueError for an env whose episodes make several clips one after the other (`vdm_env.continuation`).

    Noising such a video, or taking a clean estimate of it, would touch clips that are finished or not yet begun.

    Args:
        env: vector env.
        algorithm: its name, for the message.
    """
    clips = getattr(env.mdp, "clips", 1)
    if clips > 1:
        raise ValueError(
            f"{algorithm} learns from one clip, but an episode of this env makes {clips}; use the env of the single "
            f"clip, or VADER or DDPO, which follow the chain step by step, however long it is"
        )


def check_graph(scores: Tensor, env: Any) -> None:
    """Raises ValueError if scores computed with autograd on have no graph, although the reward says differentiable."""
    if not scores.requires_grad:
        raise ValueError(
            f"the reward {env.mdp.reward.name!r} says differentiable=True but its scores have no graph; "
            f"remove torch.no_grad() or .detach() from it, or set differentiable=False and use DDPO"
        )
