"""Settings of algorithms: from texts such as "beta=500" to the config, or keyword arguments, of a class."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, get_type_hints

from benchmarks.configs import check_names, converted


def overrides(given: Sequence[str], seed: int) -> dict[str, Any]:
    """Config fields from texts such as "beta=500", "pairs=all_pairs" or "folder=runs/pairs_{seed}".

    Args:
        given: name=value; values are Python literals, anything else is taken as text.
        seed: replaces {seed}.

    Raises:
        ValueError: a text without "=".
    """
    found: dict[str, Any] = {}
    for text in given:
        name, value = parse_setting(text)
        found[name] = value.replace("{seed}", str(seed)) if isinstance(value, str) else value
    return found


def parse_setting(text: str) -> tuple[str, Any]:
    """Name and value of a text such as "beta=500".

    Raises:
        ValueError: a text without "=".
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set {text!r}: expected name=value, such as beta=500")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def algorithm_config(
    kind: type[Any], model: str, settings: Mapping[str, Any], seed: int, *, strict: bool = False
) -> tuple[Any, str]:
    """An algorithm's config and where it comes from: the model's preset, or else the paper's settings.

    Args:
        kind: the config's class.
        model: `env.model.spec.name`.
        settings: fields that differ, as a file or `--set` gives them.
        seed: of the run.
        strict: refuse a model without a preset.

    Raises:
        ValueError: an unknown field (the nearest is named), a value it refuses, or no preset.
    """
    names = [field.name for field in fields(kind) if field.name != "seed"]
    if "seed" in settings:
        raise ValueError(f"{kind.__name__}.seed is the seed of the run: give --seed {settings['seed']}")
    try:
        base, note = kind.preset(model), f"preset for {model}"
    except (ValueError, AttributeError):
        if strict and hasattr(kind, "preset"):
            raise
        base, note = kind(), f"no preset for {model}: the defaults of {kind.__name__}, which are the paper's"
    check_names(settings, names, kind.__name__)
    hints = get_type_hints(kind)
    changes = {k: converted(v, hints[k], f"{kind.__name__}.{k}") for k, v in settings.items()}
    seeded = {"seed": seed} if any(field.name == "seed" for field in fields(kind)) else {}
    return replace(base, **{**changes, **seeded}), note


def keyword_settings(kind: type[Any], settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Keyword arguments of a class without a config: the settings, and the seed if it takes one.

    Raises:
        ValueError: the class takes no such argument.
    """
    taken = inspect.signature(kind).parameters
    names = [name for name in list(taken)[2:] if taken[name].kind is not inspect.Parameter.VAR_KEYWORD]
    if "seed" in settings:
        raise ValueError(f"seed of {kind.__name__} is the seed of the run: give --seed {settings['seed']}")
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
        check_names(settings, names, kind.__name__)
    return {**settings, **({"seed": seed} if "seed" in names else {})}
