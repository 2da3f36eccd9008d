"""Reading torch checkpoints and safetensors files without running anything that is in them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vdm_env.checksums import check_file
from vdm_env.errors import CorruptWeightsError


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their LVDM names; nothing in the file is executed.

    Args:
        path: a torch checkpoint (its `state_dict` entry is taken where it has one) or a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        CorruptWeightsError: truncated, damaged, not the file that was fetched (see `vdm_env.checksums`), not a
            dictionary of tensors, or a pickle that would have to run code.
    """
    path = Path(path)
    return tensors_of(unpickle(path), path)


def tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's content; see `read_checkpoint`."""
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CorruptWeightsError(
            f"{path} holds {type(content).__name__} with other things than tensors; expected the dictionary of tensors "
            "of a checkpoint, or one under 'state_dict'. Fetch the file again"
        )
    return content


def unpickle(path: Path) -> Any:
    """Content of a torch or safetensors file, on the CPU; a torch file is mapped into memory where its format allows.

    Raises:
        FileNotFoundError, CorruptWeightsError: see `read_checkpoint`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    check_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CorruptWeightsError(
            f"{path} ({path.stat().st_size} bytes) is truncated, damaged, or cannot be read without running code from "
            f"it ({reason}); delete it and fetch or copy it again"
        ) from error
