"""Reading the folder of reference vectors (VDM_GOLDEN, default ../shared/golden beside the repository)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


def golden(name: str) -> Path:
    """Folder of one set of reference vectors; skips the calling test where the set is absent."""
    folder = Path(os.environ.get("VDM_GOLDEN") or ROOT.parent / "shared" / "golden") / name
    if not folder.is_dir():
        pytest.skip(f"no reference vectors in {folder}; set VDM_GOLDEN to the folder that holds {name}")
    return folder


def golden_tensors(name: str, file: str) -> dict[str, Tensor]:
    """All tensors of ``<set>/<file>`` (safetensors)."""
    return load_file(golden(name) / file)


def golden_json(name: str, file: str) -> Any:
    """Content of ``<set>/<file>`` (JSON)."""
    return json.loads((golden(name) / file).read_text())


def comparable(frames: Tensor) -> Tensor:
    """Where gradients by frames in [-1,1] that are clamped can be compared with recorded ones, a mask of their shape.

    The clamp of the PyTorch that recorded them passes nothing on at its bounds; that of older releases passes all.
    """
    bound = torch.ones((), requires_grad=True)
    same = not torch.autograd.grad(bound.clamp(0, 1), bound)[0].any()
    return torch.full_like(frames, same, dtype=torch.bool) | (frames.detach().abs() != 1)


def nested(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group names like ``run.t`` by what stands before the first dot; names without a dot are left out."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if "." in name:
            head, tail = name.split(".", 1)
            groups.setdefault(head, {})[tail] = tensor
    return groups
