"""Loading diffusers and transformers folders safely: safetensors only, one clear error for what can go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

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
            f"no weights of {cls.__name__} in {folder}: expected config.json and *.safetensors there. If the package "
            "was installed from source, install it again; if you made this folder, save the module with save_pretrained"
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
        # Some classes draw their initial values first, even when a file replaces all of them.
        with _no_progress_bar(), torch.random.fork_rng(devices=[]):
            loaded = cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise CorruptWeightsError(
            f"{folder} does not hold a {cls.__name__} as its config.json describes: {error}"
        ) from error
    module, info = loaded
    wrong = {
        kind: info[kind]
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info.get(kind)
    }
    if wrong:
        raise CorruptWeightsError(
            f"{folder} does not fit {cls.__name__}: {wrong}. Expected exactly the tensors of its config.json"
        )
    # from_pretrained has set the type and kept some layers in float32 on purpose; float64 is for exactness tests.
    return frozen(module.to(device=device).double() if dtype == torch.float64 else module.to(device=device))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Transformers draws one for each of its models, on the error stream, however small it is."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
