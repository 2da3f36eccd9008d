"""Losses, one pure function per equation, by the kind of signal they learn from."""

from algos.losses.forward_process import (
    best_of_group_weights,
    nft_loss,
    optimality_probability,
    raw_weights,
    softmax_weights,
    sparse_weights,
    weighted_regression,
)
from algos.losses.policy_gradient import clipped_surrogate, kl_penalty
from algos.losses.preference import (
    d3po_loss,
    dpo_loss,
    error_change,
    kto_loss,
    kto_offset,
    videodpo_column_loss,
)
from algos.losses.reward_gradient import (
    attenuated_one_minus,
    hinge,
    negative_mean,
    one_minus,
    reward_loss,
    target_l1,
    temporal_attenuation,
)

__all__ = [
    "attenuated_one_minus",
    "best_of_group_weights",
    "clipped_surrogate",
    "d3po_loss",
    "dpo_loss",
    "error_change",
    "hinge",
    "kl_penalty",
    "kto_loss",
    "kto_offset",
    "negative_mean",
    "nft_loss",
    "one_minus",
    "optimality_probability",
    "raw_weights",
    "reward_loss",
    "softmax_weights",
    "sparse_weights",
    "target_l1",
    "temporal_attenuation",
    "videodpo_column_loss",
    "weighted_regression",
]
