"""Gymnasium spaces of one video: what an observation and an action are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Space
from torch import Tensor

from vdm_env.mdp import DenoisingMDP
from vdm_env.starts import MAX_SEED


def observation_space(mdp: DenoisingMDP, observe_embedding: bool) -> Dict:
    """The table of `vdm_env.env` without the batch axis; with the tensors of the prompt's condition if asked for."""
    number = _float_type(mdp)
    spaces: dict[str, Space[Any]] = {
        "latents": Box(-np.inf, np.inf, mdp.latent_shape, number),
        "timestep": Box(-np.inf, np.inf, (), number),
        "step": Box(0, mdp.num_steps, (), np.int64),
        "action_std": Box(0, np.inf, (), number),
        "stochastic": Box(0, 1, (), np.bool_),
        "prompt_id": Box(0, MAX_SEED, (), np.int64),
        "video_seed": Box(0, MAX_SEED, (), np.int64),
    }
    if observe_embedding:
        spaces |= {name: _space_of(value[0]) for name, value in mdp.unconditional(1).items()}
    return Dict(spaces)


def action_space(mdp: DenoisingMDP) -> Box:
    """What the network emits: unbounded."""
    return Box(-np.inf, np.inf, mdp.latent_shape, _float_type(mdp))


def _float_type(mdp: DenoisingMDP) -> Any:
    return np.float64 if mdp.dtype == torch.float64 else np.float32


def _space_of(value: Tensor) -> Box:
    """The space of one prompt's entry of a condition."""
    shape = tuple(value.shape)
    kind: Any = np.dtype(str(value.dtype).removeprefix("torch.")).type
    if value.dtype == torch.bool:
        return Box(0, 1, shape, kind)
    return Box(-np.inf, np.inf, shape, kind) if value.is_floating_point() else Box(0, MAX_SEED, shape, kind)
