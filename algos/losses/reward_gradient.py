"""Losses of rewards that carry a gradient. B: videos of the batch."""

from __future__ import annotations

from torch import Tensor

from algos.losses.checks import check_vectors


def target_l1(reward: Tensor, target: float, scale: float = 1.0) -> Tensor:
    """Distance to a reward that is out of reach.

        L = scale mean_B | R - target |

    Source: Prabhudesai et al. 2024 (VADER, arXiv:2407.08737): aesthetic target 10, scale 0.1; PickScore target 100,
    scale 0.01 (there written |1 - s/100|).

    Args:
        reward: [B], carries the gradient.
        target: in units of the reward.
        scale: > 0, multiplies the gradient (AdamW hardly sees it; gradient clipping does).

    Raises:
        TypeError, ValueError: reward is not a floating-point vector, or scale <= 0.
    """
    check_vectors(reward=reward)
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected a number > 0")
    return scale * (reward - target).abs().mean()


def one_minus(reward: Tensor) -> Tensor:
    """For rewards that are similarities with maximum 1.

        L = mean_B (1 - R)

    Source: VADER (arXiv:2407.08737) and AlignProp (arXiv:2310.03739), for HPS.

    Args:
        reward: [B], carries the gradient.

    Raises:
        TypeError, ValueError: reward is not a floating-point vector.
    """
    check_vectors(reward=reward)
    return (1 - reward).mean()


def negative_mean(reward: Tensor) -> Tensor:
    """Plain ascent, for rewards without a natural maximum.

        L = -mean_B R

    Source: Clark et al. 2023 (DRaFT, arXiv:2309.17400).

    Args:
        reward: [B], carries the gradient.

    Raises:
        TypeError, ValueError: reward is not a floating-point vector.
    """
    check_vectors(reward=reward)
    return -reward.mean()
