"""A tiny Stable Video Diffusion with random weights, and pictures for it."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from tests.models import brightness
from vdm_env import make
from vdm_env.models import svd


def tiny_svd(seed: int = 0) -> svd.SVDModel:
    """4 frames of 64x64, latents [4,4,8,8]; the same weights each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return svd.load(weights="random", scale="tiny", device="cpu", dtype=torch.float32, seed=seed)


def pictures(number: int = 4, side: int = 64) -> list[torch.Tensor]:
    """Different smooth pictures [3,side,side]."""
    ramp = torch.linspace(0, 1, side)
    wave = torch.stack([(ramp[:, None] * (1 + n) + ramp[None] * (number - n)).sin().abs() for n in range(number)])
    return [torch.stack([wave[n], wave[n].flip(0), wave[n - 1]]) for n in range(number)]


def svd_env(model: svd.SVDModel, **options: Any) -> Any:
    """`make` with the brightness reward and four pictures."""
    options = {"reward": brightness, "images": pictures(), "num_envs": 2, "num_steps": 2} | options
    return make(model=model, **options)
