"""From rewards to preference pairs, and weights for the pairs.

B: videos of the batch; a group is `group_size` neighbouring videos of one prompt; P: pairs. A pair is (winner, loser)
with a strictly higher reward for the winner: equal rewards state no preference, and so make no pair.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Strategy = Literal["best_vs_worst", "best_vs_random", "all_pairs", "random"]


def preference_pairs(
    reward: Tensor, group_size: int, strategy: Strategy = "best_vs_worst", generator: torch.Generator | None = None
) -> Tensor:
    """Pairs of videos of the same prompt.

    "best_vs_worst": the group's highest and lowest reward; "best_vs_random": the highest and any one below it;
    "all_pairs": every pair with different rewards; "random": any one of those. Of several best (or worst) videos the
    first is taken. All but "all_pairs" give at most one pair a group, and a group of equal rewards gives none.

    Source: VideoDPO (Liu et al. 2024, arXiv:2412.14167) compares these four; OnlineVPO (arXiv:2412.15159) takes
    best_vs_worst.

    Args:
        reward: [B], finite; group g is reward[g * group_size : (g + 1) * group_size], as the env's slots are.
        group_size: >= 2, divides B.
        strategy: see above.
        generator: CPU generator of the choice; needed by "best_vs_random" and "random" only.

    Returns:
        [P, 2] int64 on the CPU: places in the batch of winner and loser, group by group; P may be 0.

    Raises:
        TypeError, ValueError: bad reward, group_size < 2 or not a divisor of B, an unknown strategy, or a random one
            without a generator.
    """
    check_vector(reward, "reward")
    if group_size < 2 or reward.numel() % group_size:
        raise ValueError(
            f"group_size is {group_size} for {reward.numel()} rewards, expected >= 2 and a divisor: a pair is two "
            f"videos of one prompt; make the env with group_size >= 2"
        )
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy is {strategy!r}, expected one of {', '.join(get_args(Strategy))}")
    if generator is None and strategy in ("best_vs_random", "random"):
        raise ValueError(f"strategy {strategy!r} draws at random; pass generator=torch.Generator().manual_seed(0)")
    pairs = []
    for g, group in enumerate(reward.detach().cpu().reshape(-1, group_size)):
        pairs.append(g * group_size + _pairs_of_group(group, strategy, generator))
    return torch.cat(pairs)


def _pairs_of_group(group: Tensor, strategy: Strategy, generator: torch.Generator | None) -> Tensor:
    """[P, 2], places in the group."""
    candidates = (group[:, None] > group[None, :]).nonzero()
    if strategy == "all_pairs" or not len(candidates):
        return candidates
    best, worst = int(group.argmax()), int(group.argmin())
    if strategy == "best_vs_worst":
        return torch.tensor([[best, worst]])
    if strategy == "best_vs_random":
        candidates = candidates[candidates[:, 0] == best]
    chosen = int(torch.randint(len(candidates), (), generator=generator))
    return candidates[chosen : chosen + 1]


def histogram_probabilities(value: Tensor, bins: int = 10) -> Tensor:
    """How common each value is: the fraction of all values that lie in its bin.

    The bins are equally wide and span the values' range; if all are equal there is one bin and every probability is 1.

    Args:
        value: [P], finite; for pairs the difference of the two rewards.
        bins: >= 1.

    Returns:
        [P] in (0, 1], constant for autograd.

    Raises:
        TypeError, ValueError: bad values, or bins < 1.
    """
    check_vector(value, "value")
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected a whole number >= 1")
    value = value.detach()
    low, width = value.min(), value.max() - value.min()
    place = torch.zeros_like(value, dtype=torch.int64)
    if width > 0:
        place = ((value - low) / width * bins).long().clamp(max=bins - 1)  # the maximum belongs to the last bin
    counts = torch.bincount(place, minlength=bins).to(value)
    return counts[place] / value.numel()


def pair_weights(probability: Tensor, *, base: float = 0.72, beta: float = 1.0) -> Tensor:
    """Rare pairs count more.

        w = (base / p)^beta

    Source: VideoDPO (arXiv:2412.14167): base 0.72, beta 1 in the paper; the released configuration has beta 0, which
    switches the weights off. How p is counted there was not released; `histogram_probabilities` of the differences of
    the two rewards is this package's choice.

    Args:
        probability: [P], in (0, 1].
        base: > 0, the probability of a pair that gets weight 1.
        beta: >= 0.

    Returns:
        [P], for `losses.dpo_loss`, constant for autograd.

    Raises:
        TypeError, ValueError: probabilities outside (0, 1], base <= 0 or beta < 0.
    """
    check_vector(probability, "probability")
    if not bool(((probability > 0) & (probability <= 1)).all()):
        low, high = float(probability.min()), float(probability.max())
        raise ValueError(f"probability is in {low:g}..{high:g}, expected 0 < p <= 1; see histogram_probabilities")
    if not base > 0 or not beta >= 0:
        raise ValueError(f"base is {base} and beta {beta}, expected base > 0 and beta >= 0 (VideoDPO: 0.72 and 1)")
    return (base / probability.detach()) ** beta


def check_vector(value: Tensor, name: str) -> None:
    """Raises TypeError or ValueError unless it is a vector of at least one finite floating-point number."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} is {given}, expected a floating-point tensor; convert it with .float()")
    if value.ndim != 1 or value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected a vector with at least one number")
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{bad} of {value.numel()} numbers of {name} are NaN or infinite, expected finite numbers")
