"""VideoDPO: Diffusion-DPO on pairs built from the model's own videos, rare pairs first (arXiv:2412.14167).

    L = mean over pairs of -w log sigmoid( -beta/2 [ (m_w - m_l) - (r_w - r_l) ] ),   w = (alpha / p)^gamma

For each prompt the reference (the untrained model, unless the policy's was refreshed) makes N videos; the env's reward
ranks them (make the env with "OmniScore" for the paper's), and the best and the worst make a pair. A pair counts the
more, the rarer its p. All videos with all their scores are kept in a folder: where it holds them already nothing is
sampled, so that another strategy, another weight or, with `data_seed`, another seed costs no rollout.

The first updates sample, and the ones after that learn: what a run builds is part of its cost. What it finds was paid
for by another run; that cost is stored with the data and reported by every update (data_device_s and others, see
`offline_pairs`), so that a comparison can add it. A run that goes on from a checkpoint samples again what it had built
after the checkpoint, as it redoes its other updates: it is then the run that was never interrupted.

Deviation: winner and loser share noise and timestep and a pair has one margin, as in Diffusion-DPO; the released code
draws both independently and has a margin for each column of the frame (`losses.videodpo_column_loss`).
Deviation: the released configuration switches the weights off (exponent 0); the paper's exponent 1 is the default here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from algos.offline_pairs import PairLearner
from algos.preference_data import PairTable, PreferenceData
from algos.preference_files import PreferenceWriter
from algos.preference_sampling import check_scores, sample_groups, sampling_settings
from algos.preferences import Strategy, histogram_probabilities, pair_weights
from algos.training import check_choice, check_not_negative, check_positive, pick_preset, reward_metrics

Probability = Literal["difference", "product"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoDPOConfig:
    """Defaults: the paper's and, where it says nothing, the released VideoCrafter2 configuration's; 3000 steps."""

    folder: str = "runs/videodpo"
    """of the preference data; built here unless they are there"""
    prompts: int = 10000
    """groups to build: prompts of the env's split in turn, from the beginning again where there are fewer"""
    candidates: int = 4
    """N, videos of one prompt"""
    videos_per_update: int = 64
    """while building: sampled and written in one update; a multiple of `candidates`"""
    pairs: Strategy = "best_vs_worst"
    """which videos of a group make pairs, see `preferences.preference_pairs`"""
    probability: Probability = "difference"
    """p of a pair, from histograms: of the pairs' differences of rewards; or the product of the winner's and the
    loser's own, among all videos"""
    bins: int = 10
    """of the histograms"""
    weight_base: float = 0.72
    """alpha > 0, the p of a pair that counts 1"""
    weight_exponent: float = 1.0
    """gamma >= 0; 0 switches the weights off"""
    learning_rate: float = 6e-6
    """of AdamW after the warm-up"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-2
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    warmup_steps: int = 0
    """optimiser steps over which the learning rate grows linearly; 0: none"""
    beta: float = 5000.0
    """of the loss, for errors that are means over latent elements; larger stays closer to the reference"""
    optimiser_steps: int = 1
    """per update once the data are there"""
    pairs_per_step: int = 4
    """pairs of one optimiser step (published: 1 on each of 4 GPUs); drawn in passes, each in a new order"""
    micro_batch: int = 1
    """pairs per backward pass (twice as many videos), the knob for memory; changes results by rounding alone"""
    seed: int = 0
    """of random pairs, the order of pairs, timesteps and training noise"""
    data_seed: int | None = None
    """of the videos' noise; None: `seed`. One number here lets runs of different seeds learn from the same videos"""

    def __post_init__(self) -> None:
        check_positive(self, "prompts", "videos_per_update", "bins", "weight_base", "learning_rate", "eps")
        check_positive(self, "max_grad_norm", "beta", "optimiser_steps", "pairs_per_step", "micro_batch")
        check_not_negative(self, "weight_decay", "warmup_steps", "weight_exponent")
        check_choice(self, "pairs", Strategy)
        check_choice(self, "probability", Probability)
        if self.candidates < 2 or self.videos_per_update % self.candidates:
            near = max(1, round(self.videos_per_update / max(self.candidates, 1))) * max(self.candidates, 2)
            raise ValueError(
                f"VideoDPOConfig.candidates is {self.candidates} and videos_per_update {self.videos_per_update}: "
                f"expected 2 or more candidates, and whole groups of them in an update, such as "
                f"videos_per_update={near}"
            )

    @classmethod
    def preset(cls, model: str) -> VideoDPOConfig:
        """Settings for a model by name.

        Raises:
            ValueError: there are none for this model.
        """
        moving_shapes = cls(
            prompts=320, learning_rate=5e-4, beta=500.0, optimiser_steps=4, pairs_per_step=32, micro_batch=8
        )
        presets = {"MovingShapes": moving_shapes, "MovingShapesUNet": moving_shapes}
        return pick_preset(presets, model)


def pair_probabilities(table: PairTable, reward: Tensor, kind: Probability = "difference", bins: int = 10) -> Tensor:
    """How common each pair is, by histograms of equally wide bins, see `preferences.histogram_probabilities`.

    "difference": the fraction of pairs whose two rewards differ as much. "product": p_w p_l, fractions of all videos
    whose reward is like the winner's and like the loser's.

    Source: VideoDPO (arXiv:2412.14167). Deviation: how p was counted is not public beyond a disabled script in the
    released code, which multiplies the probabilities of the two videos' scores; that is "product".

    Args:
        table: P >= 1 pairs.
        reward: [G,N] of the groups the pairs are of.
        kind: see above.
        bins: >= 1.

    Returns:
        [P] in (0, 1].
    """
    if kind == "difference":
        return histogram_probabilities(table.winner_reward - table.loser_reward, bins)
    of_video = histogram_probabilities(reward.flatten(), bins).reshape(reward.shape)
    return of_video[table.group, table.winner] * of_video[table.group, table.loser]


class VideoDPO:
    """Builds preference data, or takes what is in the folder, and learns from weighted pairs.

    Args:
        env: vector env whose reward ranks the videos; its own episode and stream are left alone.
        policy: from `env.make_policy`; its trainable parameters are the ones that move. The videos are its
            reference's, with its guidance scale.
        config: see `VideoDPOConfig`.

    Raises:
        ValueError: the folder holds data made differently (the message names the settings), or whose first group the
            env's reward scores otherwise (`preference_sampling.check_scores`), or that make no pairs.
        preference_files.DamagedDataError: it holds damaged data.
    """

    def __init__(self, env: Any, policy: Any, config: VideoDPOConfig) -> None:
        self.env, self.policy, self.config = env, policy, config
        self.data_seed = config.seed if config.data_seed is None else config.data_seed
        settings = sampling_settings(env, policy, candidates=config.candidates, seed=self.data_seed)
        self.writer = PreferenceWriter(config.folder, settings)
        if self.writer.groups:
            check_scores(env, PreferenceData(config.folder), env.prompt_ids(), seed=self.data_seed)
        self.built = min(self.writer.groups, config.prompts)  # groups this run has, found or sampled
        self.learner = PairLearner(env, policy, config)
        self.learner.data_cost = self.writer.cost(self.built)
        self._open_if_complete()

    def update(self) -> dict[str, float]:
        """Samples and writes `videos_per_update` videos while the data are incomplete; takes optimiser steps after.

        Returns:
            groups_built; while sampling reward_mean, reward_std, reward_group_std_mean, zero_std_fraction of the new
            videos; the numbers of `offline_pairs.PairLearner.train`, 0 while sampling, of which data_device_s and the
            like are the cost of the groups that were there when the run began; weight_mean and weight_max of the pairs.

        Raises:
            FloatingPointError: the gradient is not finite; this optimiser step was not taken.
        """
        c, sampled = self.config, {}
        if self.learner.ready:
            row = self.learner.train()
        else:
            stop = min(self.built + c.videos_per_update // c.candidates, c.prompts)
            wanted, ids = range(self.built, stop), self.env.prompt_ids()
            new = sample_groups(self.env, self.policy, ids, wanted, candidates=c.candidates, seed=self.data_seed)
            # Some are there already where the run was killed after the checkpoint that it goes on from.
            if self.writer.groups < stop:
                new.after(self.writer.groups - self.built).append_to(self.writer)
            self.built = stop
            sampled = reward_metrics(new.reward.flatten(), c.candidates)
            self._open_if_complete()
            row = self.learner.idle()
        weight = torch.zeros(1) if self.learner.weight is None else self.learner.weight
        return {
            "groups_built": float(self.built),
            **sampled,
            **row,
            "weight_mean": float(weight.mean()),
            "weight_max": float(weight.max()),
        }

    def _open_if_complete(self) -> None:
        c = self.config
        if self.built < c.prompts:
            return
        data = PreferenceData(c.folder)
        table = data.pairs(c.pairs, torch.Generator().manual_seed(c.seed), groups=c.prompts)
        weight = None
        if len(table):
            probability = pair_probabilities(table, data.reward[: c.prompts], c.probability, c.bins)
            weight = pair_weights(probability, base=c.weight_base, beta=c.weight_exponent)
        self.learner.open(data, table, weight)

    def state_dict(self) -> dict[str, Any]:
        """That of `offline_pairs.PairLearner`, and how many groups the run has; the data stay in their folder."""
        return {**self.learner.state_dict(), "built": self.built}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment and the folder.

        Groups that were written after the state was taken are sampled again, so that updates and costs are those of the
        run that went on; they are not written again.

        Raises:
            ValueError: the state was taken with other pairs, or the folder lacks groups that the run had.
            CorruptWeightsError: the saved reference is of another policy.
        """
        built, there = int(state["built"]), self.writer.groups
        if built > there:
            raise ValueError(
                f"the state was saved when {built} groups were built, but {self.config.folder} holds {there}; put the "
                f"folder back as it was, or begin the run anew"
            )
        self.built = min(built, self.config.prompts)
        if self.built < self.config.prompts:
            self.learner.close()
        elif not self.learner.ready:
            self._open_if_complete()
        self.learner.load_state_dict(state)
