"""Optimiser steps on preference pairs that are on disk; what the offline preference algorithms share.

Data that were found have been paid for by whoever made them. `PairLearner.data_cost` is what they cost
(`preference_files.COSTS`); every update reports it as data_device_s, data_videos_sampled, data_reward_queries and
data_denoiser_forwards, the same numbers each time: a run's start, which a comparison by cost adds to the run's own.
Data that do not say what they cost (videos from elsewhere) leave the four out.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from algos.pairs import Pairs, draw_noise, epoch_rows, mean_rows, pair_step, paired_loss, warmed_up
from algos.preference_data import PairTable, PreferenceData
from algos.preference_files import COSTS
from algos.training import adamw


class PairLearner:
    """AdamW on the paired loss, over pairs drawn in passes of random order.

    Args:
        env: its MDP noises latents and knows the prompts; no episode is run.
        policy: its trainable parameters are the ones that move, its reference is the model to stay close to: the
            untrained one unless it was refreshed.
        config: has learning_rate, betas, weight_decay, eps, max_grad_norm, warmup_steps, beta, optimiser_steps,
            pairs_per_step, micro_batch and seed.

    Attributes:
        data_cost: see the module; 0 of everything until an algorithm says otherwise, None: not known.
    """

    def __init__(self, env: Any, policy: Any, config: Any) -> None:
        self.env, self.policy, self.config = env, policy, config
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.order_seed = config.seed
        self.steps_taken = self.drawn = 0  # optimiser steps, and rows of the passes over the pairs
        self.data_cost: dict[str, float] | None = dict.fromkeys(COSTS, 0.0)
        self.digest = ""
        self._saved_digest = ""
        self.weight: Tensor | None = None

    def open(self, data: PreferenceData, table: PairTable, weight: Tensor | None = None) -> None:
        """From here on it learns from these pairs.

        Args:
            data: where the latents are.
            table: P >= 1 pairs.
            weight: [P] of the pairs; None: all alike.

        Raises:
            ValueError: data that do not fit the env, no pairs, or other pairs than those of the state that was loaded.
        """
        if not len(table):
            raise ValueError(
                f"{data.folder} makes no pairs: in each of its {len(data)} groups all rewards are equal; rank by "
                f"another score, or look at the reward"
            )
        self.prompt_ids = data.prompt_ids(self.env)
        self.data, self.table, self.weight = data, table, None if weight is None else weight.float()
        found = hashlib.sha256(data.identity(int(table.group.max()) + 1).encode())
        columns = (table.group, table.winner, table.loser, *(() if self.weight is None else (self.weight,)))
        for column in columns:
            found.update(column.numpy().tobytes())
        self.digest = found.hexdigest()
        self._check_digest()

    def close(self) -> None:
        """From here on it has no pairs."""
        self.digest, self.weight = "", None

    @property
    def ready(self) -> bool:
        """Whether there are pairs to learn from."""
        return bool(self.digest)

    def train(self) -> dict[str, float]:
        """Takes `optimiser_steps` steps.

        Returns:
            pairs (of the data), epoch (passes over them so far); loss, implicit_accuracy, margin, winner_error_change,
            loser_error_change (see `losses.dpo_loss`) and grad_norm (before clipping) as means over the steps;
            learning_rate of the last step; optimiser_steps; where the data say it data_device_s, data_videos_sampled,
            data_reward_queries, data_denoiser_forwards (see the module).

        Raises:
            FloatingPointError: the gradient is not finite; this optimiser step was not taken.
            DamagedDataError: a file of the data is damaged.
        """
        return self._metrics([self._step() for _ in range(self.config.optimiser_steps)])

    def idle(self) -> dict[str, float]:
        """The numbers of `train` for an update without optimiser steps."""
        return self._metrics([])

    def _metrics(self, rows: list[dict[str, float]]) -> dict[str, float]:
        pairs = len(self.table) if self.ready else 0
        return {
            "pairs": float(pairs),
            "epoch": self.drawn / pairs if pairs else 0.0,
            **mean_rows(rows),
            "learning_rate": self._learning_rate(max(self.steps_taken - 1, 0)),
            "optimiser_steps": float(len(rows)),
            **{f"data_{name}": value for name, value in (self.data_cost or {}).items()},
        }

    def _step(self) -> dict[str, float]:
        c = self.config
        rows = epoch_rows(len(self.table), self.drawn, c.pairs_per_step, self.order_seed)
        row = pair_step(
            self.optimizer,
            self.parameters,
            {"row": rows, **draw_noise(len(rows), self.env.mdp, self.generator)},  # latents are read part by part
            self._loss,
            micro_batch=c.micro_batch,
            learning_rate=self._learning_rate(self.steps_taken),
            max_grad_norm=c.max_grad_norm,
        )
        self.steps_taken += 1
        self.drawn += len(rows)
        return row

    def _loss(self, rows: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = self.data.load(self.table, rows["row"], self.prompt_ids, self.weight)
        pairs |= {name: value for name, value in rows.items() if name != "row"}
        return paired_loss(self.env.mdp, self.policy, pairs, self.config.beta, self.generator)

    def _learning_rate(self, step: int) -> float:
        return warmed_up(self.config.learning_rate, step, self.config.warmup_steps)

    def state_dict(self) -> dict[str, Any]:
        """All but the data and the policy's weights: optimiser, place in the passes over the pairs, a hash of them."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps_taken": self.steps_taken,
            "drawn": self.drawn,
            "order_seed": self.order_seed,
            "generator": self.generator.get_state(),
            "reference": self.policy.reference_state_dict(),
            "pairs": self.digest,
            "data_cost": self.data_cost,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment.

        The seed is the saved one, and so is the cost of the data.

        Raises:
            ValueError: the state was taken with other pairs.
            CorruptWeightsError: the saved reference is of another policy. Nothing was changed in either case.
        """
        before, self._saved_digest = self._saved_digest, str(state["pairs"])
        try:
            self._check_digest()
            self.policy.load_reference_state_dict(state["reference"])
        except ValueError:
            self._saved_digest = before
            raise
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_taken, self.drawn = int(state["steps_taken"]), int(state["drawn"])
        self.order_seed = int(state["order_seed"])
        self.data_cost = None if state["data_cost"] is None else dict(state["data_cost"])
        self.generator.set_state(state["generator"].cpu())

    def _check_digest(self) -> None:
        if self._saved_digest and self.digest and self._saved_digest != self.digest:
            raise ValueError(
                f"the state was saved while learning from other pairs than those of {self.data.folder}; continue with "
                f"the data, number of groups, strategy, weights and (of random pairs) seed it was saved with"
            )
