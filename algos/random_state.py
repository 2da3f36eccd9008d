"""The global random states of Python, numpy and torch, as a checkpoint can hold them.

Nothing of this package draws from them; an algorithm of one's own, or a library under it, may.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def get_random_state(device: torch.device | str) -> dict[str, Any]:
    """All global random states: Python's, numpy's, torch's on the CPU and on a CUDA device.

    Args:
        device: of the run; its CUDA generator is included where it has one.
    """
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(torch.device(device))
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device | str) -> None:
    """Puts back what `get_random_state` returned; a CUDA state is left out where the run has moved to a CPU."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], torch.device(device))
