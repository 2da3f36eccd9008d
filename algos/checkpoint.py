"""Checkpoints without pickle: tensors in safetensors, everything else in JSON, put in place in one rename.

A folder `checkpoint/` holds `tensors.safetensors`, `state.json` and `policy/` (what `policy.save` writes).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


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
    """The inverse of `split_tensors`."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        if _TUPLE in tree:
            return tuple(join_tensors(value, tensors) for value in tree[_TUPLE])
        if _ITEMS in tree:
            return {join_tensors(k, tensors): join_tensors(v, tensors) for k, v in tree[_ITEMS]}
        return {key: join_tensors(value, tensors) for key, value in tree.items()}
    return [join_tensors(value, tensors) for value in tree] if isinstance(tree, list) else tree


def save_checkpoint(folder: Path, state: Mapping[str, Any], policy: Any | None = None) -> None:
    """Writes a checkpoint so that a crash leaves either the old or the new one, never half of one.

    Args:
        folder: usually `<run>/checkpoint`.
        state: see `split_tensors`.
        policy: has `save(folder)`; its adapter goes to `<folder>/policy`.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    tree = split_tensors(state, tensors)
    (new / "state.json").write_text(json.dumps(tree), encoding="utf-8")
    save_file(tensors, str(new / "tensors.safetensors"))
    if policy is not None:
        policy.save(new / "policy")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote (the state; load the policy's adapter with `policy.load(folder / "policy")`).

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    if not folder.exists():
        # A crash between the two renames leaves only the old one.
        folder = folder.with_name(folder.name + ".old")
    if not (folder / "state.json").exists():
        raise FileNotFoundError(f"no checkpoint at {folder.with_suffix('')}: it holds no state.json")
    tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return join_tensors(tree, load_file(str(folder / "tensors.safetensors")))
