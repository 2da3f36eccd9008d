"""Losses, one pure function per equation. B: videos of the batch; D: latent elements of one video.

Log-probabilities here are the policy's `dist.log_prob`: the MEAN over the D elements, as in DDPO's released code. A
clip range c on exp(mean difference) bounds the summed log-ratio by about c * D nats: 1e-4 is small, and D is large.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _check_vectors(**tensors: Tensor) -> None:
    """All are floating-point vectors [B] of one length, B >= 1: [B, 1] against [B] would broadcast silently."""
    expected: tuple[int, ...] | None = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} is {given}, expected a floating-point tensor [B]; convert it with .float()")
        if tensor.ndim != 1 or tensor.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [B] with B >= 1: one number per video")
        expected = expected or tuple(tensor.shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the others {expected}; pass vectors of one length"
            )


def clipped_surrogate(
    log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective, as a loss.

        L = mean_B max( -A r, -A clip(r, 1 - c, 1 + c) ),   r = exp(log_prob - log_prob_old)

    Source: Schulman et al. 2017 (arXiv:1707.06347) eq. 7; Black et al. 2023 (arXiv:2305.13301) for denoising steps.

    Args:
        log_prob: [B] under the policy being trained, mean over latent elements; carries the gradient.
        log_prob_old: [B] under the policy that acted; taken as constant.
        advantage: [B], taken as constant.
        clip_range: c > 0.

    Returns:
        The loss (a scalar) and detached metrics: `ratio_mean`, `ratio_std` (population), `clip_fraction_low` and
        `clip_fraction_high` (fraction of r < 1 - c and r > 1 + c), `approx_kl` = 0.5 mean (log r)^2, the second-order
        estimate in units of the mean log-probability (D^2 times it is in nats).

    Raises:
        TypeError, ValueError: not floating-point vectors of one length, or clip_range <= 0.
    """
    _check_vectors(log_prob=log_prob, log_prob_old=log_prob_old, advantage=advantage)
    if not clip_range > 0:
        raise ValueError(
            f"clip_range is {clip_range}, expected a number > 0 (DDPO uses 1e-4 on mean log-probabilities)"
        )
    log_ratio = log_prob - log_prob_old.detach()
    ratio = log_ratio.exp()
    advantage = advantage.detach()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
    with torch.no_grad():
        metrics = {
            "ratio_mean": ratio.mean(),
            "ratio_std": ratio.std(correction=0),
            "clip_fraction_low": (ratio < 1 - clip_range).to(ratio.dtype).mean(),
            "clip_fraction_high": (ratio > 1 + clip_range).to(ratio.dtype).mean(),
            "approx_kl": 0.5 * log_ratio.square().mean(),
        }
    return loss, metrics


def kl_penalty(kl: Tensor, coefficient: float) -> Tensor:
    """Pull towards the reference model.

        L = beta mean_B KL(pi_theta || pi_ref)

    Source: Fan et al. 2023 (DPOK, arXiv:2305.16381); Flow-GRPO's beta is for a KL that is a mean over elements.

    Args:
        kl: [B] >= 0, of one denoising step, from `dist.kl(reference, reduction)`; beta depends on that reduction.
        coefficient: beta >= 0.

    Raises:
        TypeError, ValueError: kl is not a floating-point vector, or coefficient < 0.
    """
    _check_vectors(kl=kl)
    if not coefficient >= 0:
        raise ValueError(f"coefficient is {coefficient}, expected a number >= 0 (0 switches the penalty off)")
    return coefficient * kl.mean()


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
    _check_vectors(reward=reward)
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
    _check_vectors(reward=reward)
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
    _check_vectors(reward=reward)
    return -reward.mean()


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
        _check_vectors(weight=weight)
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
