"""Loading diffusers and transformers folders safely: safetensors only, one clear error for what can go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.models.base import frozen


def load_folder(cls: Any, folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Loads a diffusers or transformers module from its folder, strictly.

    Args:
        cls: class with `from_pretrained`.
        folder: config.json and one or more safetensors files.

    Raises:
        MissingWeightsError: the folder or its weights are not there.
        CorruptWeightsError: a file is truncated or damaged, or its tensors are not the architecture's.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise MissingWeightsError(
            f"no weights of {cls.__name__} in {folder}: expected config.json and *.safetensors there. If the package was "
            "installed from source, install it again; if you made this folder, save the module with save_pretrained"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise CorruptWeightsError(
                f"{file} is damaged or truncated ({error}); expected a complete safetensors file. "
                "Restore it: fetch or copy it again, then retry"
            ) from error
    try:
        loaded = cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise CorruptWeightsError(f"{folder} does not hold a {cls.__name__} as its config.json describes: {error}") from error
    module, info = loaded
    wrong = {
        kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") if info.get(kind)
    }
    if wrong:
        raise CorruptWeightsError(f"{folder} does not fit {cls.__name__}: {wrong}. Expected exactly the tensors of its config.json")
    # from_pretrained has put the type in place and kept some layers in float32 on purpose; exactness tests want float64 throughout.
    return frozen(module.to(device=device).double() if dtype == torch.float64 else module.to(device=device))
