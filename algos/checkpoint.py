"""Checkpoints without pickle: tensors in safetensors, the rest in JSON, checksums of all, put in place by one rename.

A checkpoint is a folder with `tensors.safetensors`, `state.json`, `policy/` (what `policy.save` writes) and
`manifest.json`, which lists size and SHA-256 of the others and is written last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vdm_env.checksums import file_sha256

MANIFEST = "manifest.json"
"""File of a checkpoint that lists size and SHA-256 of the others."""
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


class DamagedCheckpointError(ValueError):
    """A checkpoint is there, but its files are not the ones that were written."""


def split_tensors(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Takes the tensors out of nested dicts, lists and tuples, so that what is left can be written as JSON.

    Args:
        tree: nested dicts (any JSON-able keys), lists, tuples, numbers, strings, None and tensors.
        tensors: filled with the tensors, on the CPU.

    Returns:
        The tree with a reference in the place of each tensor.

    Raises:
        TypeError: the tree holds something else, a pickled object for instance.
    """
    if isinstance(tree, torch.Tensor):
        name = f"t{len(tensors)}"
        # A clone: safetensors refuses two names for one memory.
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(tree, Mapping):
        if all(isinstance(key, str) and not key.startswith("__") for key in tree):
            return {key: split_tensors(value, tensors) for key, value in tree.items()}
        # JSON would turn integer keys (those of an optimiser's state) into strings.
        return {_ITEMS: [[split_tensors(k, tensors), split_tensors(v, tensors)] for k, v in tree.items()]}
    if isinstance(tree, tuple):
        return {_TUPLE: [split_tensors(value, tensors) for value in tree]}
    if isinstance(tree, list):
        return [split_tensors(value, tensors) for value in tree]
    if tree is None or isinstance(tree, str | int | float):
        return tree
    raise TypeError(
        f"a state_dict may hold tensors, numbers, strings, None, dicts, lists and tuples; got {type(tree).__name__}: "
        "turn it into these in state_dict()"
    )


def join_tensors(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `split_tensors`; each tensor is a copy in memory of its own.

    What safetensors returns lies in a mapped file at any multiple of 8 bytes. An optimiser that keeps it would compute
    on memory aligned otherwise than in the run that was saved, and hold the file open.
    """
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]].clone()
        if _TUPLE in tree:
            return tuple(join_tensors(value, tensors) for value in tree[_TUPLE])
        if _ITEMS in tree:
            return {join_tensors(k, tensors): join_tensors(v, tensors) for k, v in tree[_ITEMS]}
        return {key: join_tensors(value, tensors) for key, value in tree.items()}
    return [join_tensors(value, tensors) for value in tree] if isinstance(tree, list) else tree


def save_checkpoint(folder: Path, state: Mapping[str, Any], policy: Any | None = None) -> None:
    """Writes a checkpoint so that a crash, also of the machine, leaves the old or the new one, never half of one.

    Args:
        folder: of the checkpoint; one that is there is replaced.
        state: see `split_tensors`.
        policy: has `save(folder)`; its adapter goes to `<folder>/policy`.

    Raises:
        TypeError: the state holds something that cannot be written.
        OSError, SafetensorError: a full disk, for instance; what was written is removed, the old one stays.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        tensors: dict[str, torch.Tensor] = {}
        tree = split_tensors(state, tensors)
        (new / "state.json").write_text(json.dumps(tree), encoding="utf-8")
        save_file(tensors, str(new / "tensors.safetensors"))
        if policy is not None:
            policy.save(new / "policy")
        _seal(new)
    except Exception:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote (the state; load the policy's adapter with `policy.load(folder / "policy")`).

    Raises:
        FileNotFoundError: there is no checkpoint.
        DamagedCheckpointError: a file is missing, or is not the one that was written.
    """
    if not folder.exists():
        # A crash between the two renames leaves only the old one.
        folder = folder.with_name(folder.name + ".old")
    if not folder.exists():
        raise FileNotFoundError(f"no checkpoint at {folder.with_suffix('')}")
    verify(folder)
    try:
        tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return join_tensors(tree, load_file(str(folder / "tensors.safetensors")))
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"checkpoint {folder} cannot be read: {error}") from error


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _seal(folder: Path) -> None:
    """Writes the manifest of all files, once they are on the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {}
    for path in paths:
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    sync(manifest)
    for inside in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(inside)


def verify(folder: Path) -> None:
    """Compares all files of a checkpoint with its manifest.

    Raises:
        DamagedCheckpointError: a file is missing, or is not the one that was written; the message names it.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise DamagedCheckpointError(f"checkpoint {folder} is not complete: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} cannot be read") from error
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
        if path.stat().st_size != size:
            raise DamagedCheckpointError(
                f"checkpoint {folder} is damaged: {name} has {path.stat().st_size} bytes instead of {size}"
            )
        if file_sha256(path) != digest:
            raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {name} has another checksum than its own")
