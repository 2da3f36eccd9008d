"""Diffusion-KTO: learning from videos that are good or bad, each on its own (Li et al. 2024, arXiv:2404.04465).

    L = mean over videos of w (1 - U(z)),   z = +-beta (-(m - r) - q)   (+ desirable, - undesirable)

m and r are denoising errors of the policy and of the reference on the noised video, q >= 0 is a crude KL between them,
and U is a utility, Kahneman and Tversky's sigmoid as published (`losses.kto_loss`). No pairs are needed, neither
gradients of the reward nor noise of the sampler. The reference is the policy's, the untrained model unless it was
refreshed.

Deviation: the published method learns from a fixed set of labelled images. Here an update samples videos and labels
them by their rewards (`desirability`): better than the mean of their group, or of the update, or a threshold. So labels
are relative to what the policy does now, except with a threshold, which a good policy leaves all its videos above. Only
"group" compares like with like: with the others, videos of a prompt that always scores low are all undesirable, and the
policy is pushed away from them without being told where to. Of equal rewards nothing is learned. The network is trained
without guidance, videos are sampled with it.

Deviation: q is of all videos of an optimiser step, whatever the memory; released is one for each backward pass. If a
step takes more than one backward pass, q costs each video another forward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from algos import distributed
from algos.losses import error_change, kto_loss, kto_offset
from algos.losses.preference import Offset, Utility
from algos.pairs import draw_noise, noise_of, warmed_up
from algos.preferences import check_vector
from algos.rollout import sample_videos
from algos.training import (
    adamw,
    check_choice,
    check_groups,
    check_not_negative,
    check_positive,
    num_batches,
    optimiser_step,
    pick_preset,
    reward_metrics,
    start_stream,
)
from vdm_env.host import shared, upload

Comparison = Literal["group", "update", "threshold"]
METRICS = ("loss", "implicit_accuracy", "desirable_change", "undesirable_change")
Noised = tuple[Tensor, Tensor, Tensor, Tensor]
"""Noised latents [b,C,F,H,W], timesteps [b], prompt ids [b] and what the output should be [b,C,F,H,W]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionKTOConfig:
    """Defaults: the released Stable Diffusion 1.5 launcher's where it has such a setting, full fine-tuning."""

    learning_rate: float = 1e-7
    """of AdamW after the warm-up; for training all weights, LoRA takes about 1e-4"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-2
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    warmup_steps: int = 200
    """optimiser steps over which the learning rate grows linearly; 0: none"""
    beta: float = 1000.0
    """of the loss, for errors that are means over latent elements; larger saturates sooner"""
    utility: Utility = "kto"
    """U: "kto", "loss_averse" or "risk_seeking", see `losses.kto_loss`"""
    offset: Offset = "batch"
    """q: "batch", "labels" or "none", see `losses.kto_offset`"""
    desirable_weight: float = 1.0
    """w of desirable videos, >= 0"""
    undesirable_weight: float = 1.0
    """w of undesirable videos, >= 0; 0 learns from desirable ones alone"""
    labels: Comparison = "group"
    """a video is desirable if its reward is above the mean of its "group", of the "update", or the "threshold" """
    threshold: float | None = None
    """of labels="threshold", in units of the reward"""
    videos_per_update: int = 64
    """videos sampled before the policy changes; a multiple of env.num_envs"""
    num_inner_epochs: int = 1
    """passes over the videos, each with new timesteps and noise"""
    videos_per_step: int = 32
    """videos of one optimiser step at most, drawn without replacement; all steps get as many, give or take one
    (published: 8 on 4 devices)"""
    micro_batch: int = 16
    """videos per backward pass, the knob for memory; changes results by rounding alone"""
    seed: int = 0
    """of the env's stream of prompts and noise, of shuffling, timesteps and training noise"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "beta")
        check_positive(self, "videos_per_update", "num_inner_epochs", "videos_per_step", "micro_batch")
        check_not_negative(self, "weight_decay", "warmup_steps", "desirable_weight", "undesirable_weight")
        check_choice(self, "utility", Utility)
        check_choice(self, "offset", Offset)
        check_choice(self, "labels", Comparison)
        if not self.desirable_weight + self.undesirable_weight > 0:
            raise ValueError(
                "DiffusionKTOConfig.desirable_weight and undesirable_weight are both 0, and no video would be learned "
                "from; set one of them to 1"
            )
        if (self.labels == "threshold") != (self.threshold is not None) or self.threshold != self.threshold:
            raise ValueError(
                f"DiffusionKTOConfig.labels is {self.labels!r} and threshold {self.threshold}; a threshold is a number "
                f"and belongs to labels='threshold', and to no other"
            )

    @classmethod
    def preset(cls, model: str) -> DiffusionKTOConfig:
        """Settings for a model by name, for an env with group_size=8; a starting point that was not tuned.

        Raises:
            ValueError: there are none for this model.
        """
        settings = cls(learning_rate=1e-3, warmup_steps=0, num_inner_epochs=2)
        presets = {"MovingShapes": settings, "MovingShapesUNet": settings}
        return pick_preset(presets, model)


def desirability(
    reward: Tensor, labels: Comparison, *, group_size: int = 1, threshold: float | None = None
) -> tuple[Tensor, Tensor]:
    """Labels of videos by comparison.

    "group" and "update" compare with the mean reward, "threshold" with a given number; a reward that is not above is
    undesirable. Where all rewards compared with each other are equal they state no preference, and get no label.

    Args:
        reward: [N], finite; groups are neighbours, as the env's slots are.
        labels: see above.
        group_size: of labels="group", a divisor of N.
        threshold: of labels="threshold".

    Returns:
        desirable and labelled, bool [N] each.

    Raises:
        TypeError, ValueError: bad rewards (NaN too), unknown labels, labels="threshold" without a threshold, or a
            group_size that does not divide N.
    """
    check_vector(reward, "reward")
    if labels not in get_args(Comparison):
        raise ValueError(f"labels is {labels!r}, expected one of {', '.join(get_args(Comparison))}")
    if labels == "threshold":
        if threshold is None:
            raise ValueError(
                "labels='threshold' needs a threshold, a number in units of the reward; pass threshold=..."
            )
        return reward > threshold, torch.ones_like(reward, dtype=torch.bool)
    if labels == "group" and (group_size < 1 or reward.numel() % group_size):
        raise ValueError(
            f"group_size is {group_size} for {reward.numel()} rewards, expected a divisor: the videos of one prompt "
            f"are neighbours; pass the env's group_size"
        )
    groups = reward.reshape(-1, group_size if labels == "group" else len(reward))
    # Not "differs from the mean": the mean of equal numbers need not be that number to the last bit.
    differ = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)
    desirable = (groups > groups.mean(1, keepdim=True)) & differ
    return desirable.reshape(-1), differ.expand_as(groups).reshape(-1)


class DiffusionKTO:
    """Learning from an env's own videos, labelled good or bad.

    Args:
        env: vector env; any sampler, any noise level; groups for labels="group".
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `DiffusionKTOConfig`.

    Raises:
        ValueError: an env without groups where videos are compared within them, a single video per update to compare
            with itself, or a number of videos that the env's batch does not divide.
    """

    def __init__(self, env: Any, policy: Any, config: DiffusionKTOConfig) -> None:
        if config.labels == "group":
            check_groups(env, "labels='group'", "set labels='update' or 'threshold'")
        if config.labels == "update" and config.videos_per_update < 2:
            raise ValueError("videos_per_update is 1: a video is not better than itself; sample at least 2")
        self.env, self.policy, self.config = env, policy, config
        self.batches = num_batches(config.videos_per_update, env, "videos_per_update")
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.steps_taken = 0
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Samples `videos_per_update` videos, labels them and takes the optimiser steps of the passes over them.

        Where no video has a label (all rewards tied) there is no optimiser step.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction; videos_labelled, desirable_fraction (of
            these, 0 if there is none); loss, implicit_accuracy, desirable_change, undesirable_change (see
            `losses.kto_loss`), offset (q) and grad_norm (before clipping) as means over the optimiser steps, 0 if there
            was none; learning_rate of the last optimiser step; optimiser_steps.

        Raises:
            FloatingPointError: the gradient is not finite; this optimiser step was not taken.
        """
        c, size = self.config, self.env.group_size
        clean, prompt_id, reward = sample_videos(self.env, self.policy, self.batches)
        desirable, labelled = desirability(reward, c.labels, group_size=size, threshold=c.threshold)
        kept = labelled.nonzero().flatten()
        rows = []
        for _ in range(c.num_inner_epochs if len(kept) else 0):
            order = kept[torch.randperm(len(kept), generator=self.generator)]
            # not split(): its last step could be a single video, whose reference point would be its own change
            steps = order.tensor_split(math.ceil(len(order) / c.videos_per_step))
            rows += [self._step(clean[i], prompt_id[i], desirable[i]) for i in steps]
        return {
            **reward_metrics(reward, size),
            "videos_labelled": float(len(kept)),
            "desirable_fraction": float(desirable.sum()) / max(len(kept), 1),
            **{name: sum(r[name] for r in rows) / max(len(rows), 1) for name in (*METRICS, "offset", "grad_norm")},
            "learning_rate": self._learning_rate(max(self.steps_taken - 1, 0)),
            "optimiser_steps": float(len(rows)),
        }

    def _step(self, clean: Tensor, prompt_id: Tensor, desirable: Tensor) -> dict[str, float]:
        """One optimiser step on some videos, at timesteps and noise drawn anew; metrics are means over them."""
        c, ranks = self.config, distributed.current()
        width = c.micro_batch
        self.optimizer.zero_grad(set_to_none=True)  # of a step that failed half-way, out of memory for instance
        drawn = draw_noise(len(clean), self.env.mdp, self.generator)
        mine = ranks.rows(len(clean))
        columns = [column[mine] for column in (clean, prompt_id, drawn["noise_seed"], drawn["t"])]
        chunks = zip(*(column.split(width) for column in columns), strict=True)
        parts = [self._noised(*chunk) for chunk in chunks if len(chunk[0])]  # none where there are more processes
        desirable = desirable.to(self.env.device)
        labels = desirable[mine].split(width)
        references = [self._reference(part) for part in parts]
        # The offset is of all videos, so they come first; the graph of a single part is kept and used.
        with torch.set_grad_enabled(len(parts) == 1):
            changes = [self._change(part, r) for part, r in zip(parts, references, strict=True)]
        of_all = ranks.gather(torch.cat(changes) if changes else clean[:0, 0, 0, 0, 0].to(self.env.device))
        offset = kto_offset(of_all, desirable, c.offset)
        for i, part in enumerate(parts):
            change = changes[i] if len(parts) == 1 else self._change(part, references[i])
            loss, _ = self._utility_loss(change, labels[i], offset)
            (loss * (len(change) / len(clean))).backward()
        with torch.no_grad():
            loss, metrics = self._utility_loss(of_all.detach(), desirable, offset)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.steps_taken)
        norm = optimiser_step(self.optimizer, self.parameters, c.max_grad_norm)
        self.steps_taken += 1
        values = {"loss": loss, **metrics, "offset": offset, "grad_norm": norm}
        return {name: float(value) for name, value in values.items()}

    def _noised(self, clean: Tensor, prompt_id: Tensor, noise_seed: Tensor, t: Tensor) -> Noised:
        mdp = self.env.mdp
        x0 = upload(clean, self.env.device)
        noise = upload(noise_of(noise_seed, clean.shape[1:]), self.env.device, x0.dtype)
        t = shared(t, self.env.device)
        return mdp.add_noise(x0, noise, t), t, prompt_id, mdp.target(x0, noise, t)

    def _reference(self, part: Noised) -> Tensor:
        """The reference model's output."""
        noised, t, prompts, _ = part
        with torch.no_grad(), self.policy.reference():
            return self.policy.predict(noised, t, prompts)

    def _change(self, part: Noised, reference: Tensor) -> Tensor:
        """By how much the policy's error is above the reference's, m - r, [b]."""
        noised, t, prompts, target = part
        return error_change(self.policy.predict(noised, t, prompts), reference, target)

    def _utility_loss(self, change: Tensor, desirable: Tensor, offset: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        weights = {"desirable_weight": c.desirable_weight, "undesirable_weight": c.undesirable_weight}
        return kto_loss(change, desirable, offset, beta=c.beta, utility=c.utility, **weights)

    def _learning_rate(self, step: int) -> float:
        """Of optimiser step 0, 1, ..."""
        return warmed_up(self.config.learning_rate, step, self.config.warmup_steps)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, its steps, generator, env's stream, reference; the policy's weights are saved with the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps_taken": self.steps_taken,
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
            "reference": self.policy.reference_state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment.

        Raises:
            CorruptWeightsError: the saved reference is of another policy; nothing was changed.
        """
        self.policy.load_reference_state_dict(state["reference"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_taken = int(state["steps_taken"])
        self.generator.set_state(state["generator"].cpu())
        self.env.load_state_dict(state["env"])
