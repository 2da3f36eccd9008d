"""Losses on preferences between videos. P: pairs; B: videos of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from algos.losses.checks import check_vectors


def _check_pairs(prediction: Tensor, reference: Tensor, target: Tensor, beta: float, weight: Tensor | None) -> None:
    """Outputs [2P, ...] of one shape with winners first, beta > 0, and weights [P] if any."""
    for name, tensor in (("prediction", prediction), ("reference", reference), ("target", target)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} is {given}, expected a floating-point tensor [2P, ...]")
        if tensor.shape != prediction.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, prediction {tuple(prediction.shape)}; pass equal shapes"
            )
    if prediction.ndim < 2 or len(prediction) < 2 or len(prediction) % 2:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, expected [2P, ...] with P >= 1: the P winners, then "
            f"their losers in the same order, as torch.cat([winners, losers]) makes it"
        )
    if not beta > 0:
        raise ValueError(f"beta is {beta}, expected a number > 0 (Diffusion-DPO: 5000)")
    if weight is not None:
        check_vectors(weight=weight)
        if 2 * len(weight) != len(prediction):
            raise ValueError(
                f"weight has {len(weight)} numbers for {len(prediction) // 2} pairs; pass one number for each pair"
            )


def dpo_loss(
    prediction: Tensor, reference: Tensor, target: Tensor, beta: float, weight: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Diffusion-DPO: the trained model shall fit winners better, and losers worse, than the reference does.

        L = mean_P( -w log sigmoid(h) ),   h = -beta/2 [ (m_w - m_l) - (r_w - r_l) ]

    m and r are the mean squared errors |output - target|^2 of one video under the trained model and the reference, over
    ALL dimensions but the first: a pair has one margin, whatever the shape of the latents.

    Source: Wallace et al. 2023 (arXiv:2311.12908) eq. 14 and its released code, beta 5000; weights: VideoDPO
    (arXiv:2412.14167).

    Args:
        prediction: [2P, ...], the P winners and then their losers; carries the gradient.
        reference: [2P, ...], of the reference model on the same noised latents; taken as constant.
        target: [2P, ...], what the output should be; with epsilon prediction the same noise for winner and loser.
        beta: > 0, for errors that are means over the elements.
        weight: [P] of the pairs, see `preferences.pair_weights`; None is 1.

    Returns:
        The loss (a scalar) and detached metrics: `implicit_accuracy` (fraction of h > 0), `margin` (mean of h),
        `winner_error_change` and `loser_error_change` (mean of m - r: preferences are also met if both grow, and the
        videos then get worse).

    Raises:
        TypeError, ValueError: shapes that do not fit, beta <= 0.
    """
    _check_pairs(prediction, reference, target, beta, weight)
    target = target.detach()
    error = (prediction - target).square().flatten(1).mean(1)
    change = error - (reference.detach() - target).square().flatten(1).mean(1)
    winner, loser = change.chunk(2)
    inside = -0.5 * beta * (winner - loser)
    loss = -torch.nn.functional.logsigmoid(inside)
    if weight is not None:
        loss = weight.detach() * loss
    metrics = {
        "implicit_accuracy": (inside > 0).to(inside.dtype).mean(),
        "margin": inside.mean(),
        "winner_error_change": winner.mean(),
        "loser_error_change": loser.mean(),
    }
    return loss.mean(), {name: value.detach() for name, value in metrics.items()}


def videodpo_column_loss(
    prediction: Tensor, reference: Tensor, target: Tensor, beta: float, weight: Tensor | None = None
) -> Tensor:
    """VideoDPO's loss as released, to reproduce its numbers; `dpo_loss` is the one to train with.

        L = mean over pairs and columns j of -w log sigmoid(-beta/2 [ (m_wj - m_lj) - (r_wj - r_lj) ])

    Its errors are means over dimensions 1, 2, 3 of [2P,C,F,H,W] latents only, so every column of the frame has a
    sigmoid of its own. The paper (arXiv:2412.14167) has one per video.

    Args:
        prediction, reference, target: [2P,C,F,H,W], the P winners and then their losers.
        beta: > 0 (released: 5000).
        weight: [P]; None is 1.

    Returns:
        The loss (a scalar).

    Raises:
        TypeError, ValueError: shapes that do not fit, beta <= 0.
    """
    _check_pairs(prediction, reference, target, beta, weight)
    if prediction.ndim != 5:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, expected [2P,C,F,H,W]; or use dpo_loss")
    target = target.detach()
    error = (prediction - target).square().mean((1, 2, 3))
    winner, loser = (error - (reference.detach() - target).square().mean((1, 2, 3))).chunk(2)
    loss = -torch.nn.functional.logsigmoid(-0.5 * beta * (winner - loser))
    if weight is not None:
        loss = weight.detach()[:, None] * loss
    return loss.mean()
