"""Losses, one pure function per equation, by the kind of signal they learn from."""

from algos.losses.forward_process import (
    best_of_group_weights,
    nft_loss,
    optimality_probability,
    softmax_weights,
    sparse_weights,
    weighted_regression,
)
from algos.losses.policy_gradient import clipped_surrogate, kl_penalty
from algos.losses.preference import dpo_loss, videodpo_column_loss
from algos.losses.reward_gradient import negative_mean, one_minus, target_l1

__all__ = [
    "best_of_group_weights",
    "clipped_surrogate",
    "dpo_loss",
    "kl_penalty",
    "negative_mean",
    "nft_loss",
    "one_minus",
    "optimality_probability",
    "softmax_weights",
    "sparse_weights",
    "target_l1",
    "videodpo_column_loss",
    "weighted_regression",
]
