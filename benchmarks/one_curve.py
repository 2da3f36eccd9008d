"""Whether runs that are drawn as one curve were made with the same settings. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_BUDGETS = ("budget_device_s", "budget_updates")
_OF_TASK = ("arm", "policy", "process", "num_envs", "group_size")


def settings(about: Mapping[str, Any]) -> dict[str, Any]:
    """{"config.learning_rate": ...} and the like of a run.json: how it was trained, without its seed."""
    task = about.get("task") or {}
    found = flat(
        {"config": about.get("config"), "env": about.get("env"), **{name: about.get(name) for name in _BUDGETS}}
    )
    found |= flat({name: task.get(name) for name in _OF_TASK})
    return {key: value for key, value in found.items() if key != "config.seed"}


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; empty mappings vanish."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}.{key}" if path else str(key))
    return found


def differing(abouts: Sequence[Mapping[str, Any]]) -> list[str]:
    """In what runs of one algorithm differ beside their seeds: ["config.learning_rate (0.001, 0.002)"].

    What is not there counts as None: an older run.json does not know every field. Texts that are the same but for
    the run's seed in them, such as the folders of their own data, and seeds that follow it are no differences.

    Args:
        abouts: their run.json.
    """
    every = [settings(about) for about in abouts]
    seeds = [int(about.get("seed") or 0) for about in abouts]
    found = []
    for key in dict.fromkeys(key for one in every for key in one):
        values = [one.get(key) for one in every]
        if set.intersection(*(_without_seed(key, value, seed) for value, seed in zip(values, seeds, strict=True))):
            continue
        told = dict.fromkeys(json.dumps(value) for value in values)
        if len(told) > 1:
            found.append(f"{key} ({', '.join(told)})")
    return found


def _without_seed(key: str, value: Any, seed: int) -> set[str]:
    """What a value is with its run's seed taken out, at one place or at all of them; nothing where it has none."""
    if key.endswith("seed"):
        return {"seed"} if value == seed else set()
    if not isinstance(value, str):
        return set()
    pattern = rf"(?<!\d){seed}(?!\d)"
    once = {f"{value[: at.start()]}\0{value[at.end() :]}" for at in re.finditer(pattern, value)}
    return once | ({re.sub(pattern, "\0", value)} if once else set())
