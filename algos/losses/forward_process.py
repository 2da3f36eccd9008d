"""Losses on noised samples that use rewards as weights. B: videos of the batch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from algos.losses.checks import check_vectors, check_videos

AdvantageMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]


def optimality_probability(advantage: Tensor, adv_clip_max: float = 5.0, mode: AdvantageMode = "all") -> Tensor:
    """How much a video counts as a good one.

        r = clip( f(A) / (2 A_max) + 1/2, 0, 1 )

        all             f(A) = A
        positive_only   max(A, 0): bad videos teach nothing
        negative_only   min(A, 0): good videos teach nothing
        one_only        1[A > 0]: all good videos alike
        binary          sign(A)

    f = 0 teaches nothing at first, because r = 1/2 pulls and pushes alike while the policy is the old one; one_only and
    binary are in units of the advantage, so with A_max 5 their r is 0.6 or 0.4, not 1 or 0.

    Source: Zheng et al. 2025 (DiffusionNFT, arXiv:2509.16117) and its released code, A_max 5.

    Args:
        advantage: [B], taken as constant.
        adv_clip_max: A_max > 0, the magnitude at which r is 0 or 1.
        mode: see above.

    Returns:
        r [B] in [0, 1]; 1/2 where the advantage is 0.

    Raises:
        TypeError, ValueError: advantage is not a floating-point vector, adv_clip_max <= 0, or an unknown mode.
    """
    check_vectors(advantage=advantage)
    if not adv_clip_max > 0:
        raise ValueError(f"adv_clip_max is {adv_clip_max}, expected a number > 0 (DiffusionNFT: 5)")
    if mode not in get_args(AdvantageMode):
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(get_args(AdvantageMode))}")
    value = advantage.detach()
    if mode == "positive_only":
        value = value.clamp(min=0)
    elif mode == "negative_only":
        value = value.clamp(max=0)
    elif mode == "one_only":
        value = (value > 0).to(value.dtype)
    elif mode == "binary":
        value = value.sign()
    return (value / (2 * adv_clip_max) + 0.5).clamp(0, 1)


def nft_loss(
    x0_policy: Tensor, x0_old: Tensor, x0: Tensor, probability: Tensor, *, mixture: float, scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """DiffusionNFT: what was good is fitted by the policy, what was bad by the policy's mirror image.

        L = A_max/beta mean_B( r |x+ - x0|^2 / w+  +  (1 - r) |x- - x0|^2 / w- )
        x+ = beta x_theta + (1 - beta) x_old,   x- = (1 + beta) x_old - beta x_theta,   w = max(mean |x+- - x0|, 1e-5)

    Squares and w are means over one video's elements; w is constant for autograd and computed in float64. The mixtures
    are published for velocities; x_t - t v is affine in v and the coefficients sum to 1, so those of the clean
    estimates are the same.

    Source: Zheng et al. 2025 (arXiv:2509.16117) and its released code.

    Args:
        x0_policy: [B, ...] clean estimates of the policy; carries the gradient.
        x0_old: [B, ...] of the old policy on the same noised latents; taken as constant.
        x0: [B, ...] what was noised.
        probability: r [B] in [0, 1], see `optimality_probability`.
        mixture: beta > 0; smaller steers harder (published: 1 or 0.1).
        scale: A_max > 0.

    Returns:
        The loss (a scalar) and detached metrics: `positive_error` and `negative_error`, mean_B |x+- - x0|^2 / w+-.

    Raises:
        TypeError, ValueError: shapes that do not fit, probability outside [0, 1], mixture or scale <= 0.
    """
    check_videos(x0_policy=x0_policy, x0_old=x0_old, x0=x0)
    check_vectors(probability=probability)
    if len(probability) != len(x0):
        raise ValueError(f"probability has {len(probability)} numbers for {len(x0)} videos; pass one for each video")
    if bool(((probability < 0) | (probability > 1)).any()):
        raise ValueError("probability leaves [0, 1]; make it with optimality_probability(advantage)")
    if not (mixture > 0 and scale > 0):
        raise ValueError(f"mixture is {mixture} and scale {scale}, expected numbers > 0 (published: 1 and 5)")
    x0_old, x0, r = x0_old.detach(), x0.detach(), probability.detach()

    def weighted_error(estimate: Tensor) -> Tensor:
        weight = (estimate.detach().double() - x0.double()).abs().flatten(1).mean(1).clamp(min=1e-5)
        # divided as float64, so that the loss is at least as precise as its weights whatever the videos' dtype
        return (estimate - x0).square().flatten(1).mean(1) / weight

    positive = weighted_error(mixture * x0_policy + (1 - mixture) * x0_old)
    negative = weighted_error((1 + mixture) * x0_old - mixture * x0_policy)
    loss = (scale / mixture) * (r * positive + (1 - r) * negative).mean()
    return loss, {"positive_error": positive.detach().mean(), "negative_error": negative.detach().mean()}


def softmax_weights(reward: Tensor, beta: float) -> Tensor:
    """Weights of reward-weighted regression.

        w_i = exp(beta R_i) / Z,   Z = mean_j exp(beta R_j) over the batch

    The weights have mean 1, so that beta does not also set the size of the gradient.

    Source: Peters & Schaal 2007; for diffusion Lee et al. 2023 (arXiv:2302.12192) and Black et al. 2023
    (arXiv:2305.13301).

    Args:
        reward: [B], taken as constant.
        beta: inverse temperature > 0, in 1 / units of the reward.

    Returns:
        w [B] >= 0, in reward's dtype; stable for large beta R.

    Raises:
        TypeError, ValueError: reward is not a floating-point vector, or beta <= 0.
    """
    check_vectors(reward=reward)
    if not beta > 0:
        raise ValueError(f"beta is {beta}, expected a number > 0: 0 weighs all videos alike and learns no preference")
    return len(reward) * torch.softmax(beta * reward.detach(), 0)


def sparse_weights(reward: Tensor, threshold: float) -> Tensor:
    """Sparse reward-weighted regression: w_i = 1[R_i >= C].

    Source: Black et al. 2023 (arXiv:2305.13301), there RWR-sparse.

    Args:
        reward: [B], taken as constant.
        threshold: C, in units of the reward.

    Returns:
        w [B], 0 or 1, in reward's dtype.

    Raises:
        TypeError, ValueError: reward is not a floating-point vector.
    """
    check_vectors(reward=reward)
    return (reward.detach() >= threshold).to(reward.dtype)


def raw_weights(reward: Tensor) -> Tensor:
    """The reward itself as the weight: w_i = R_i.

    Source: Flow-GRPO's released reward-weighted baseline (arXiv:2505.05470).

    Args:
        reward: [B], taken as constant; for rewards that are >= 0 by nature.

    Returns:
        w [B] >= 0, in reward's dtype.

    Raises:
        TypeError, ValueError: reward is not a floating-point vector, or a reward is negative: a negative weight makes
            the loss better without bound the further the output is from its target.
    """
    check_vectors(reward=reward)
    if bool((reward < 0).any()):
        raise ValueError(
            f"the lowest reward is {float(reward.min()):g}, but as weights rewards must be >= 0; use "
            f"weighting='softmax', or shift the reward"
        )
    return reward.detach()


def best_of_group_weights(reward: Tensor, group_size: int) -> Tensor:
    """Fine-tuning on the best of each group: w_i = 1[R_i = max of its group]; equally good ones all count.

    Source: Flow-GRPO's released SFT baseline (arXiv:2505.05470). Deviation: groups of equal rewards are left out, where
    the released code takes all their videos as best.

    Args:
        reward: [B], taken as constant; group g is reward[g * group_size : (g + 1) * group_size].
        group_size: >= 2, divides B.

    Returns:
        w [B], 0 or 1, in reward's dtype; 0 for groups of equal rewards, which have no best one.

    Raises:
        TypeError, ValueError: reward is not a floating-point vector, group_size < 2 or not a divisor of B.
    """
    check_vectors(reward=reward)
    if group_size < 2 or reward.numel() % group_size:
        raise ValueError(f"group_size is {group_size} for {reward.numel()} rewards, expected >= 2 and a divisor")
    groups = reward.detach().reshape(-1, group_size)
    best, worst = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
    return ((groups == best) & (best > worst)).to(reward.dtype).reshape(-1)


def weighted_regression(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Denoising loss in which each video counts as much as its weight.

        L = mean_B( w |output - target|^2 ),   squares are means over one video's elements

    Source: Lee et al. 2023 (arXiv:2302.12192) eq. 4; Black et al. 2023 (arXiv:2305.13301) section 4.1.

    Args:
        prediction: [B, ...] network outputs; carries the gradient.
        target: [B, ...] what they should be.
        weight: w [B], taken as constant.

    Raises:
        TypeError, ValueError: shapes that do not fit.
    """
    check_videos(prediction=prediction, target=target)
    check_vectors(weight=weight)
    if len(weight) != len(prediction):
        raise ValueError(f"weight has {len(weight)} numbers for {len(prediction)} videos; pass one for each video")
    return (weight.detach() * (prediction - target.detach()).square().flatten(1).mean(1)).mean()
