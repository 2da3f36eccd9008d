"""Losses on log-probabilities: PPO's surrogate and the pull towards a reference.

Log-probabilities are the policy's `dist.log_prob`: the MEAN over the D latent elements of a video, as in DDPO's
released code. A clip range c on exp(mean difference) bounds the summed log-ratio by about c * D nats: 1e-4 is small,
and D is large. B: videos of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algos.losses.checks import check_vectors


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
    check_vectors(log_prob=log_prob, log_prob_old=log_prob_old, advantage=advantage)
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
    check_vectors(kl=kl)
    if not coefficient >= 0:
        raise ValueError(f"coefficient is {coefficient}, expected a number >= 0 (0 switches the penalty off)")
    return coefficient * kl.mean()
