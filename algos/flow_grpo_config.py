"""Settings of Flow-GRPO, and those published under other names: DanceGRPO, MixGRPO, Flow-GRPO-Fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from algos.sde_window import Strategy
from algos.training import check_choice, check_not_negative, check_positive, pick_preset

Std = Literal["population", "unbiased"]
KL = Literal["auto", "published", "exact"]
Choice = Literal["first", "random"]
Normalised = Literal["reward", "parts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowGRPOConfig:
    """Defaults: Flow-GRPO's for Stable Diffusion 3.5 (there 48 groups of 24, two optimiser steps for each rollout)."""

    learning_rate: float = 3e-4
    """of AdamW, constant"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-4
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    clip_range: float = 1e-4
    """c, on the exponential of the difference of mean log-probabilities"""
    adv_clip_max: float = 5.0
    """advantages are clipped to this magnitude"""
    advantage: Normalised = "reward"
    """what is normalised: the "reward", or each of its "parts" by itself, which are then added up (MixGRPO; DanceGRPO
    adds up losses instead, whose gradient is the same until a ratio is clipped)"""
    part_weights: Mapping[str, float] | None = None
    """weights of advantage="parts", one for each part by name; None: all 1. The weights of the env's reward are then
    not used for learning"""
    std: Std = "population"
    """estimator of the rewards' spread; DanceGRPO and MixGRPO: "unbiased" """
    global_std: bool = True
    """spread of the whole rollout; False: of each group"""
    std_eps: float = 1e-4
    """added to the spread; DanceGRPO and MixGRPO: 1e-8"""
    filter_equal_groups: bool = True
    """leave out groups whose rewards are all equal (advantage 0); False: they still feel the KL"""
    best_of_n: int | None = None
    """videos of each group that are trained on, half the best and half the worst; an even number; None: all"""
    kl_coefficient: float = 0.04
    """beta of the KL to the reference; 0 saves the reference's forward pass. Published 0.04, which belongs to the
    published form; of the exact one about 0.04 / S pulls as hard over S steps"""
    kl: KL = "auto"
    """"published": Flow-GRPO's form, for flow samplers only; "exact": KL per element, 1 / -dt times that; "auto": the
    published form on flow samplers, the exact one on others, which have no published beta either"""
    old_kl_coefficient: float = 0.0
    """of 0.5 (log r)^2, a pull to the policy that sampled (MixGRPO's kl_coeff); 0 at the first optimiser step"""
    timestep_fraction: float = 0.99
    """fraction of the noisy steps that is trained on, rounded down, at least one; a window is trained whole"""
    timestep_choice: Choice = "first"
    """which these are: the "first" (0.99: all but the last), or "random" ones, drawn anew for each optimiser step"""
    drop_last_step: bool = False
    """without a window, never train on the grid's last step (DanceGRPO); it keeps its noise"""
    window_size: int | None = None
    """denoising steps with noise; None: all that the env has"""
    window_strategy: Strategy = "progressive"
    """how it moves between updates: "progressive", "decay", "exp_decay", "random" or "fixed", see `sde_window`"""
    window_start: int = 0
    """first step that a window may hold"""
    window_end: int | None = None
    """one past the last step that a window may hold (Flow-GRPO-Fast: half of them); None: past the last noisy one"""
    window_shift: int = 1
    """steps that "progressive" moves on by; less than window_size makes windows overlap"""
    window_iterations: int = 25
    """updates at each place; with the two decays at the first one"""
    window_min_iterations: int = 1
    """of "decay": updates at the last place (MixGRPO: a quarter of window_iterations)"""
    window_decay_after: int = 13
    """of "exp_decay": places up to this step keep all their updates (published for 25 steps)"""
    window_decay_rate: float = 0.1
    """of "exp_decay", per step"""
    shared_initial_noise: bool = False
    """videos of a group start from the noise of its first (DanceGRPO, MixGRPO)"""
    videos_per_rollout: int = 1152
    """videos sampled before the policy changes; a multiple of env.num_envs"""
    updates_per_rollout: int = 1
    """parts the rollout's batches are dealt into, each with an optimiser step of its own; a divisor of their number"""
    num_inner_epochs: int = 1
    """passes over a rollout"""
    micro_batch: int | None = None
    """videos per backward pass, the knob for memory; None: env.num_envs"""
    seed: int = 0
    """of the env's stream of prompts and noise, of shuffling and of random windows"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "clip_range", "adv_clip_max", "std_eps")
        check_positive(self, "timestep_fraction", "videos_per_rollout", "updates_per_rollout", "num_inner_epochs")
        check_positive(self, "window_shift", "window_iterations", "window_min_iterations")
        check_not_negative(self, "weight_decay", "kl_coefficient", "old_kl_coefficient")
        check_not_negative(self, "window_start", "window_decay_after", "window_decay_rate")
        for name, choices in (("std", Std), ("kl", KL), ("timestep_choice", Choice), ("window_strategy", Strategy)):
            check_choice(self, name, choices)
        check_choice(self, "advantage", Normalised)
        for name in ("micro_batch", "window_size", "window_end", "best_of_n"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        if self.timestep_fraction > 1 or self.clip_range >= 1:
            raise ValueError(
                f"FlowGRPOConfig.timestep_fraction is {self.timestep_fraction} and clip_range {self.clip_range}, "
                f"expected at most 1 and less than 1"
            )
        if self.window_min_iterations > self.window_iterations and self.window_strategy == "decay":
            raise ValueError(
                f"FlowGRPOConfig.window_min_iterations is {self.window_min_iterations}, more than "
                f"window_iterations={self.window_iterations}; window_strategy='decay' goes down from one to the other"
            )
        if self.part_weights is not None and self.advantage != "parts":
            raise ValueError(
                "FlowGRPOConfig.part_weights has no effect with advantage='reward'; set advantage='parts', or weigh "
                "the parts in the env's reward"
            )
        if self.best_of_n is not None and self.best_of_n % 2:
            raise ValueError(
                f"FlowGRPOConfig.best_of_n is {self.best_of_n}, expected an even number: half are a group's best "
                f"videos and half its worst (DanceGRPO: 8); None trains on all"
            )

    @classmethod
    def preset(cls, model: str) -> FlowGRPOConfig:
        """Settings for a model by name; "MovingShapes" wants an env with group_size=8.

        Raises:
            ValueError: there are none for this model.
        """
        settings = cls(learning_rate=1e-3, videos_per_rollout=64, kl_coefficient=0.0)
        presets = {"MovingShapes": settings, "MovingShapesUNet": settings}
        return pick_preset(presets, model)

    @classmethod
    def dance(cls, **changes: Any) -> FlowGRPOConfig:
        """DanceGRPO's for HunyuanVideo, for an env with sampler="dance", 16 steps and group_size=24."""
        settings = cls(
            learning_rate=1e-5,
            std="unbiased",
            global_std=False,
            std_eps=1e-8,
            best_of_n=8,
            kl_coefficient=0.0,
            timestep_fraction=0.6,
            timestep_choice="random",
            drop_last_step=True,
            shared_initial_noise=True,
        )
        return replace(settings, **changes)

    @classmethod
    def mix(cls, **changes: Any) -> FlowGRPOConfig:
        """MixGRPO's for FLUX, for an env with sampler="flow_grpo", 25 steps and group_size=12.

        Several rewards: MixGRPO has advantage="parts" by default, for an env whose reward is a `WeightedSum`.
        """
        settings = cls(
            learning_rate=1e-5,
            std="unbiased",
            global_std=False,
            std_eps=1e-8,
            kl_coefficient=0.0,
            window_size=4,
            shared_initial_noise=True,
        )
        return replace(settings, **changes)

    @classmethod
    def fast(cls, **changes: Any) -> FlowGRPOConfig:
        """Flow-GRPO-Fast's, for an env with sampler="cps", noise_level=0.8 and 10 steps; window_end is half of them.

        The clip range is published for CPS scores without the density's 1 / (2 sigma^2), see `algos.flow_grpo`.
        """
        settings = cls(
            clip_range=1e-5,
            kl_coefficient=0.0,
            window_size=2,
            window_strategy="random",
            window_iterations=1,
            window_end=5,
        )
        return replace(settings, **changes)
