"""Every registered model, as small as it goes; models that are registered later join by themselves."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch

from vdm_env import make
from vdm_env.models import MODELS, VideoModel

NAMES = list(MODELS)
SIDE, FRAMES = 64, 2
"""Of models whose tiny version keeps the release's size: its networks are small, but would be given large videos."""


def load(name: str, dtype: torch.dtype = torch.float32) -> VideoModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights, as meant
        return MODELS[name].load(weights="random", scale="tiny", device="cpu", dtype=dtype, seed=0)


@cache
def small_size(name: str) -> dict[str, int]:
    """Arguments of `make` for a video that every part of the tiny model can make quickly."""
    spec = load(name).spec
    if spec.height <= SIDE and spec.width <= SIDE:
        return {}
    return {"height": SIDE, "width": SIDE, "num_frames": FRAMES if spec.temporal_stride == 1 else spec.num_frames}


def small_env(env_id: str, **options: Any) -> Any:
    """`make` by name with random weights of the tiny architectures, one video and two steps."""
    options = small_size(env_id.partition("-")[0]) | {"num_envs": 1, "num_steps": 2} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(env_id, weights="random", scale="tiny", **options)
