"""Losses on preferences between videos. P: pairs; B: videos of the batch."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from algos.losses.checks import check_vectors, check_videos

Offset = Literal["batch", "labels", "none"]
Utility = Literal["kto", "loss_averse", "risk_seeking"]


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
    winner, loser = error_change(prediction, reference, target).chunk(2)
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


def d3po_loss(
    log_prob: Tensor, reference: Tensor, beta: float, clip_range: float | None = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """D3PO: the winner's denoising step shall become likelier, and the loser's less likely, than in the reference.

        L = mean_P( -log sigmoid(h) ),   h = beta [ log clip(rho_w, 1 - c, 1 + c) - log clip(rho_l, 1 - c, 1 + c) ]
        rho = exp(log_prob - reference)

    The clip bounds h by beta log((1 + c) / (1 - c)), 0.0201 as published: the loss stays within 0.683 and 0.703
    whatever happens, all pairs get nearly the same weight, and a ratio beyond the clip gets no gradient, not even back
    towards 1. Without a clip (`clip_range=None`) h is DPO's own.

    Source: Yang et al. 2023 (D3PO, arXiv:2311.13231); clip, beta 0.1 and c 0.1 from its released code, where
    log-probabilities are means over elements: beta per nat is the D-th part of it, D the elements of a video.

    Args:
        log_prob: [2P] of the steps the P winners took and then of those of their losers; carries the gradient.
        reference: [2P] of the same steps under the reference model; taken as constant.
        beta: > 0, in 1 / units of log_prob.
        clip_range: c, in (0, 1), or None.

    Returns:
        The loss (a scalar) and detached metrics: `implicit_accuracy` (fraction of h > 0), `margin` (mean of h),
        `ratio_winner` and `ratio_loser` (mean rho), `clip_fraction` (fraction of rho outside 1 - c .. 1 + c).

    Raises:
        TypeError, ValueError: not floating-point vectors of one even length, beta <= 0 or clip_range outside (0, 1).
    """
    check_vectors(log_prob=log_prob, reference=reference)
    if len(log_prob) % 2:
        raise ValueError(
            f"log_prob has {len(log_prob)} numbers, expected 2P: those of the P winners, then those of their losers "
            f"in the same order, as torch.cat([winners, losers]) makes it"
        )
    if not beta > 0 or not (clip_range is None or 0 < clip_range < 1):
        raise ValueError(
            f"beta is {beta} and clip_range {clip_range}, expected beta > 0 and a clip_range in (0, 1) or None "
            f"(D3PO: 0.1 and 0.1)"
        )
    log_ratio = log_prob - reference.detach()
    clipped = log_ratio
    if clip_range is not None:  # the logarithm, not the ratio: where exp overflows, its gradient times 0 is NaN
        clipped = log_ratio.clamp(math.log1p(-clip_range), math.log1p(clip_range))
    winner, loser = clipped.chunk(2)
    inside = beta * (winner - loser)
    ratio = log_ratio.detach().exp()
    outside = (log_ratio.detach() != clipped.detach()).to(ratio.dtype)
    metrics = {
        "implicit_accuracy": (inside > 0).to(inside.dtype).mean(),
        "margin": inside.mean(),
        "ratio_winner": ratio.chunk(2)[0].mean(),
        "ratio_loser": ratio.chunk(2)[1].mean(),
        "clip_fraction": outside.mean(),
    }
    return -torch.nn.functional.logsigmoid(inside).mean(), {name: value.detach() for name, value in metrics.items()}


def error_change(prediction: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """How much worse than the reference the trained model denoises each video.

        d = m - r,   m and r the means over a video's elements of |output - target|^2

    Source: Diffusion-KTO (arXiv:2404.04465), where -d stands for the log-ratio of the policy and the reference.

    Args:
        prediction: [B, ...]; carries the gradient.
        reference: [B, ...] of the reference model on the same noised latents; taken as constant.
        target: [B, ...] what the output should be.

    Returns:
        d [B], at least float32; below 0 where the trained model fits the video better. Worked out as the mean of
        (output - reference's) (output + reference's - 2 target): early in training d is a millionth of m, and the
        difference of two rounded means would be rounding alone.

    Raises:
        TypeError, ValueError: shapes that do not fit.
    """
    check_videos(prediction=prediction, reference=reference, target=target)
    exact = torch.promote_types(prediction.dtype, torch.float32)
    p, r, t = (x.to(exact) for x in (prediction, reference.detach(), target.detach()))
    return ((p - r) * (p + r - 2 * t)).flatten(1).mean(1)


def kto_offset(change: Tensor, desirable: Tensor, kind: Offset = "batch") -> Tensor:
    """The reference point that gains and losses are counted from: a crude KL of the policy to the reference.

        "batch"    q = max(0, mean_B(-d))
        "labels"   q = max(0, the mean of the desirable videos' mean of -d and of the undesirable ones')
        "none"     q = 0

    "labels" is not drawn towards the label that most videos have; without videos of both labels it is "batch".

    Source: Diffusion-KTO (arXiv:2404.04465) and its released code ("batch" is its default, over all ranks). The
    estimate of KTO itself (arXiv:2402.01306), from prompts dealt to the wrong videos, takes two more forward passes.

    Args:
        change: d [B] of `error_change`.
        desirable: [B] bool.
        kind: see above.

    Returns:
        q >= 0, a scalar, constant for autograd.

    Raises:
        TypeError, ValueError: not vectors of one length, labels that are not bool, or an unknown kind.
    """
    _check_labels(change, desirable)
    if kind not in get_args(Offset):
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(get_args(Offset))}")
    gain = -change.detach()
    if kind == "none":
        return torch.zeros_like(gain[0])
    both = bool(desirable.any()) and not bool(desirable.all())
    if kind == "labels" and both:
        return (0.5 * (gain[desirable].mean() + gain[~desirable].mean())).clamp(min=0)
    return gain.mean().clamp(min=0)


def kto_loss(
    change: Tensor,
    desirable: Tensor,
    offset: Tensor | float = 0.0,
    *,
    beta: float = 1000.0,
    utility: Utility = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Diffusion-KTO: the expected utility of desirable and undesirable videos, each on its own.

        L = mean_B( w (1 - U(z)) ),   z = +-beta (-d - q)   (+ desirable, - undesirable)

        "kto"           U = sigmoid(z)         losses and gains are felt less and less: Kahneman and Tversky
        "loss_averse"   U = log sigmoid(z)     losses are felt in full: concave, as Diffusion-DPO's
        "risk_seeking"  U = -log sigmoid(-z)   gains are felt in full: convex, and the loss has no lower bound

    Source: Li et al. 2024 (arXiv:2404.04465) and its released code, which gives all three the constant 1.

    Args:
        change: d [B] of `error_change`; carries the gradient.
        desirable: [B] bool.
        offset: q >= 0 of `kto_offset`, taken as constant.
        beta: > 0, for errors that are means over the elements.
        utility: U.
        desirable_weight, undesirable_weight: w of each label, >= 0 and not both 0.

    Returns:
        The loss (a scalar) and detached metrics: `implicit_accuracy` (fraction of z > 0), `desirable_change` and
        `undesirable_change` (mean d of each label, 0 where it has no video).

    Raises:
        TypeError, ValueError: not vectors of one length, labels that are not bool, beta <= 0, an unknown utility, or
            weights that are negative or both 0.
    """
    _check_labels(change, desirable)
    if not beta > 0 or utility not in get_args(Utility):
        raise ValueError(
            f"beta is {beta} and utility {utility!r}, expected beta > 0 (Diffusion-KTO: 1000) and one of "
            f"{', '.join(get_args(Utility))}"
        )
    if not (min(desirable_weight, undesirable_weight) >= 0 and desirable_weight + undesirable_weight > 0):
        raise ValueError(
            f"desirable_weight is {desirable_weight} and undesirable_weight {undesirable_weight}, expected numbers "
            f">= 0, one of them > 0 (Diffusion-KTO: 1 and 1)"
        )
    good = desirable.to(change)
    weight = desirable_weight * good + undesirable_weight * (1 - good)
    offset = torch.as_tensor(offset, dtype=change.dtype, device=change.device).detach()
    z = (2 * good - 1) * beta * (-change - offset)
    if utility == "kto":
        value = torch.sigmoid(z)
    elif utility == "loss_averse":
        value = torch.nn.functional.logsigmoid(z)
    else:
        value = -torch.nn.functional.logsigmoid(-z)
    detached = change.detach()
    metrics = {
        "implicit_accuracy": (z.detach() > 0).to(z.dtype).mean(),
        "desirable_change": detached[desirable].sum() / max(int(desirable.sum()), 1),
        "undesirable_change": detached[~desirable].sum() / max(int((~desirable).sum()), 1),
    }
    return (weight * (1 - value)).mean(), metrics


def _check_labels(change: Tensor, desirable: Tensor) -> None:
    """A floating-point vector and bool labels of its length."""
    check_vectors(change=change)
    if not isinstance(desirable, Tensor) or desirable.dtype != torch.bool:
        given = desirable.dtype if isinstance(desirable, Tensor) else type(desirable).__name__
        raise TypeError(f"desirable is {given}, expected a bool tensor [B]: True for videos to make likelier")
    if desirable.shape != change.shape:
        raise ValueError(
            f"desirable has shape {tuple(desirable.shape)}, change {tuple(change.shape)}; pass one label for each video"
        )
