"""Diffusion-DPO on preferences that are on disk (Wallace et al. 2023, arXiv:2311.12908).

    L = mean over pairs of -log sigmoid( -beta/2 [ (m_w - m_l) - (r_w - r_l) ] )

m and r are the denoising errors on noised videos of the policy and of the reference, which is the policy's: the
untrained model unless it was refreshed. Winner and loser of a pair share the noise and the timestep, and a pair has one
margin (see `losses.dpo_loss`). No video is sampled and no reward is asked: `preference_sampling.build_preferences`
makes the data, or `preference_files.PreferenceWriter` takes videos and labels from elsewhere.

So a run itself pays for learning alone. What making the data has cost is stored with them and reported by every update
(data_device_s and others, see `offline_pairs`); add it where methods are compared by cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from algos.offline_pairs import PairLearner
from algos.preference_data import PreferenceData
from algos.preferences import Strategy
from algos.training import check_choice, check_not_negative, check_positive, pick_preset


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineDPOConfig:
    """Defaults: the released Stable Diffusion 1.5 launcher's, full fine-tuning, 2000 optimiser steps."""

    folder: str = "runs/preferences"
    """of the preference data"""
    groups: int | None = None
    """use the data's first so many groups only; None: all"""
    pairs: Strategy = "best_vs_worst"
    """which videos of a group make pairs, see `preferences.preference_pairs`"""
    rank_by: str | None = None
    """the sub-score that ranks them; None: the reward the data were made with"""
    learning_rate: float = 2.048e-5
    """of AdamW after the warm-up: published as 1e-8 times the 2048 pairs of a step"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-2
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    warmup_steps: int = 500
    """optimiser steps over which the learning rate grows linearly; 0: none"""
    beta: float = 5000.0
    """of the loss, for errors that are means over latent elements; larger stays closer to the reference"""
    optimiser_steps: int = 1
    """per update"""
    pairs_per_step: int = 2048
    """pairs of one optimiser step; drawn in passes over all pairs, each in a new order"""
    micro_batch: int = 1
    """pairs per backward pass (twice as many videos), the knob for memory; changes results by rounding alone"""
    seed: int = 0
    """of random pairs, the order of pairs, timesteps and training noise"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "beta")
        check_positive(self, "optimiser_steps", "pairs_per_step", "micro_batch")
        check_not_negative(self, "weight_decay", "warmup_steps")
        check_choice(self, "pairs", Strategy)
        if self.groups is not None:
            check_positive(self, "groups")

    @classmethod
    def preset(cls, model: str) -> OfflineDPOConfig:
        """Settings for a model by name.

        Raises:
            ValueError: there are none for this model.
        """
        moving_shapes = cls(
            learning_rate=5e-4,
            warmup_steps=0,
            beta=500.0,
            pairs="all_pairs",
            optimiser_steps=4,
            pairs_per_step=32,
            micro_batch=8,
        )
        presets = {"MovingShapes": moving_shapes, "MovingShapesUNet": moving_shapes}
        return pick_preset(presets, model)


class OfflineDPO:
    """Preference learning from a folder of preference data.

    Args:
        env: of the model whose videos the data are, with prompts that contain theirs; no episode is run in it.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `OfflineDPOConfig`.

    Raises:
        FileNotFoundError: no data in the folder.
        preference_files.DamagedDataError: damaged, truncated or missing files.
        ValueError: data that do not fit the env (model, latents, prompts), no pairs, an unknown score.
    """

    def __init__(self, env: Any, policy: Any, config: OfflineDPOConfig) -> None:
        self.env, self.policy, self.config = env, policy, config
        self.data = PreferenceData(config.folder)
        drawn = torch.Generator().manual_seed(config.seed)
        table = self.data.pairs(config.pairs, drawn, reward=config.rank_by, groups=config.groups)
        self.learner = PairLearner(env, policy, config)
        self.learner.data_cost = self.data.cost(config.groups)
        self.learner.open(self.data, table)

    def update(self) -> dict[str, float]:
        """Takes the optimiser steps.

        Returns:
            See `offline_pairs.PairLearner.train`; no reward is among them, because no video is sampled. data_device_s
            and the like are what making the data has cost.

        Raises:
            FloatingPointError: the gradient is not finite; this optimiser step was not taken.
        """
        return self.learner.train()

    def state_dict(self) -> dict[str, Any]:
        """See `offline_pairs.PairLearner.state_dict`; the policy's weights are saved with the policy."""
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment.

        Raises:
            ValueError: the state was taken with other pairs.
            CorruptWeightsError: the saved reference is of another policy.
        """
        self.learner.load_state_dict(state)
