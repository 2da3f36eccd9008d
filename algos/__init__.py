"""Alignment algorithms for `vdm_env`, and what runs and evaluates them.

`run`, `Evaluator` and the table of algorithms `ZOO` are here at once, the algorithms when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from algos.evaluate import Evaluator
from algos.run import (
    run,  # from here on `algos.run` is the function; `from algos.run import ...` still finds the module
)
from algos.zoo import ZOO, load

_HOME = {name: entry.module for entry in ZOO.values() for name in (entry.algorithm, f"{entry.algorithm}Config")}
_HOME["check_algorithm"] = "algos.sanity"
_HOME["Alarm"] = "algos.alarm"
_HOME |= dict.fromkeys(("Features", "default_features", "heldout_rewards"), "algos.measures")

__all__ = ["ZOO", "Evaluator", "load", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'algos' has no attribute {name!r}; it has {', '.join(__dir__())}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOME})
