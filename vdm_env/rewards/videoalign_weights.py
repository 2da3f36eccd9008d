"""The released weights of VideoAlign, under the names of `VideoAlignNetwork`, with their low-rank update folded in.

The release saved the whole network while it was wrapped for low-rank training: names begin with `base_model.model.`, an
adapted layer W has three tensors, and W + (alpha / rank) B A is what computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vdm_env.errors import CorruptWeightsError

_WRAPPED = "base_model.model."
# Names since transformers 4.52 and before it, to those of this package.
_MOVED = (
    ("model.visual.", "model.visual."),
    ("model.language_model.", "model.language_model."),
    ("visual.", "model.visual."),
    ("model.", "model.language_model."),
    ("rm_head.", "rm_head."),
)
# The language model's output layer is in the file and has no part in the score.
_UNUSED = ("lm_head.",)


def merged(tensors: Mapping[str, Tensor], lora: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Tensors of a release under this package's names; names that nobody knows stay, and are refused on loading.

    Args:
        tensors: of model.pth, wrapped or merged already.
        lora: `peft_lora_config` of the release: lora_r, lora_alpha, use_rslora.
        path: where they come from, for errors.

    Raises:
        CorruptWeightsError: half of an update is missing, it does not fit its layer, or its scale is not given.
    """
    plain: dict[str, Tensor] = {}
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(_WRAPPED)
        for side in (".lora_A", ".lora_B"):
            if side in name:
                halves.setdefault(name.split(side)[0], {})[side[-1]] = tensor
                break
        else:
            if ".original_module." in name:
                continue  # the untrained copy of a layer that was trained whole
            name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            plain[name] = tensor
    for layer, half in halves.items():
        plain[f"{layer}.weight"] = _updated(plain, layer, half, lora, path)
    return {_moved(name): tensor for name, tensor in plain.items() if not name.startswith(_UNUSED)}


def _moved(name: str) -> str:
    for old, new in _MOVED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _updated(
    plain: Mapping[str, Tensor], layer: str, half: Mapping[str, Tensor], lora: Mapping[str, Any], path: Path
) -> Tensor:
    weight = plain.get(f"{layer}.weight")
    if weight is None or set(half) != {"A", "B"}:
        raise CorruptWeightsError(f"{path}: the update of {layer} is incomplete; fetch the file again")
    try:
        rank, alpha = int(lora["lora_r"]), float(lora["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptWeightsError(
            f"{path} holds low-rank updates, but model_config.json does not give lora_r and lora_alpha; fetch it again"
        ) from error
    down, up = half["A"], half["B"]
    if len(down) != rank or (len(up), down.shape[1]) != tuple(weight.shape) or up.shape[1] != rank:
        raise CorruptWeightsError(
            f"{path}: the update of {layer} has shapes {list(up.shape)} and {list(down.shape)}, expected rank {rank} "
            f"for {list(weight.shape)}; fetch the file again"
        )
    scale = alpha / (math.sqrt(rank) if lora.get("use_rslora") else rank)
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)
