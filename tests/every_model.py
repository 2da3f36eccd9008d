"""Every registered model, as small as it goes; models that are registered later join by themselves."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from vdm_env import make
from vdm_env.models import MODELS, VideoModel

NAMES = list(MODELS)


def load(name: str, dtype: torch.dtype = torch.float32) -> VideoModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights, as meant
        return MODELS[name].load(weights="random", scale="tiny", device="cpu", dtype=dtype, seed=0)


def small_env(env_id: str, **options: Any) -> Any:
    """`make` by name with random weights of the tiny architectures, one video and two steps."""
    options = {"num_envs": 1, "num_steps": 2} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(env_id, weights="random", scale="tiny", **options)
