"""Loading diffusers and transformers folders safely: no code runs, one clear error for what can go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from vdm_env.checksums import check_file
from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.models.base import frozen


def load_folder(cls: Any, folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Loads a diffusers or transformers module from its folder, strictly.

    Args:
        cls: class with `from_pretrained`.
        folder: config.json and one or more safetensors files, or torch archives (`*.bin`) where there are none.

    Raises:
        MissingWeightsError: the folder or its weights are not there.
        CorruptWeightsError: a file is truncated, damaged or not the one that was fetched (see `vdm_env.checksums`), or
            its tensors are not the architecture's.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files or not (folder / "config.json").is_file():
        raise MissingWeightsError(
            f"no weights of {cls.__name__} in {folder}: expected config.json and *.safetensors there. If the package "
            "was installed from source, install it again; if you made this folder, save the module with save_pretrained"
        )
    for file in (folder / "config.json", *files):
        check_file(file)
    try:
        # Some classes draw their initial values first, even when a file replaces all of them.
        with _no_progress_bar(), torch.random.fork_rng(devices=[]):
            loaded = cls.from_pretrained(
                folder,
                torch_dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=files[0].suffix == ".safetensors",
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a damaged config.json makes a constructor raise can be anything
        reason = f"{type(error).__name__}: {error}".strip()
        raise CorruptWeightsError(
            f"{folder} does not hold a {cls.__name__} as its config.json describes ({reason}). One of config.json, "
            f"{', '.join(file.name for file in files)} is damaged or of another model: fetch or copy them again"
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
