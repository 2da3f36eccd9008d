"""Alignment algorithms for `vdm_env`, and what runs and evaluates them.

`run` and `Evaluator` are here at once, the algorithms when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from algos.evaluate import Evaluator
from algos.run import (
    run,  # from here on `algos.run` is the function; `from algos.run import ...` still finds the module
)

if TYPE_CHECKING:
    from algos.ddpo import DDPO, DDPOConfig
    from algos.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
    from algos.diffusion_nft import DiffusionNFT, DiffusionNFTConfig
    from algos.flow_grpo import FlowGRPO, FlowGRPOConfig
    from algos.rwr import RWR, RWRConfig
    from algos.vader import VADER, VADERConfig

_HOME = {
    "DDPO": "algos.ddpo",
    "DDPOConfig": "algos.ddpo",
    "DiffusionDPO": "algos.diffusion_dpo",
    "DiffusionDPOConfig": "algos.diffusion_dpo",
    "DiffusionNFT": "algos.diffusion_nft",
    "DiffusionNFTConfig": "algos.diffusion_nft",
    "FlowGRPO": "algos.flow_grpo",
    "FlowGRPOConfig": "algos.flow_grpo",
    "RWR": "algos.rwr",
    "RWRConfig": "algos.rwr",
    "VADER": "algos.vader",
    "VADERConfig": "algos.vader",
}

__all__ = [
    "DDPO",
    "DDPOConfig",
    "DiffusionDPO",
    "DiffusionDPOConfig",
    "DiffusionNFT",
    "DiffusionNFTConfig",
    "FlowGRPO",
    "FlowGRPOConfig",
    "RWR",
    "RWRConfig",
    "VADER",
    "VADERConfig",
    "Evaluator",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'algos' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
