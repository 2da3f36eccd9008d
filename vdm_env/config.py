"""What an environment is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from vdm_env.compiled import CompileOptions
from vdm_env.guidance import Interval, as_interval, check_guidance
from vdm_env.models.base import VideoModel
from vdm_env.prompts import PromptBook
from vdm_env.rewards import RewardContext
from vdm_env.rewards.base import FramePolicy, Reward


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Everything an environment is made of; `derive` makes another one with some of it changed."""

    id: str
    model: VideoModel
    reward: Reward
    prompts: PromptBook
    split: str
    num_envs: int
    group_size: int
    num_steps: int
    sampler: str
    noise_level: float | Sequence[float] | None
    guidance_scale: float
    size: tuple[int, int, int]
    decode_frames: FramePolicy | None
    device: torch.device | str
    dtype: torch.dtype
    seed: int
    gold: Any = None
    observe_embedding: bool = False
    context: RewardContext | None = None
    """what rewards given by name are built in"""
    guidance_interval: Interval | None = None
    """noise levels (lo, hi] at which policies are guided, see `vdm_env.guidance`; None: all"""
    compile: CompileOptions | None = None
    """how the network's blocks were compiled; None: they were not"""

    def __post_init__(self) -> None:
        for name in ("num_envs", "group_size", "num_steps"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
        if not isinstance(self.seed, Integral):
            raise ValueError(f"seed={self.seed!r}: expected an int")
        check_guidance(self.guidance_scale)
        object.__setattr__(self, "guidance_interval", as_interval(self.guidance_interval))
        levels = self.noise_level if isinstance(self.noise_level, Sequence) else [self.noise_level]
        if isinstance(levels, str) or not all(level is None or isinstance(level, Real) for level in levels):
            raise ValueError(f"noise_level={self.noise_level!r}: expected a number, or one for each denoising step")
        if self.num_envs % self.group_size:
            near = max(1, round(self.num_envs / self.group_size)) * self.group_size
            raise ValueError(
                f"num_envs={self.num_envs} is not a multiple of group_size={self.group_size}; try num_envs={near}"
            )
