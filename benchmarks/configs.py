"""Typed configs from files: frozen dataclasses out of YAML, TOML or JSON, with errors that name the key. No torch.

A file is flat: every field of the dataclasses inside a config stands at the top, under the name of its command-line
option ("-" and "_" are the same). Numbers that YAML takes for text, such as 1e-3, are numbers all the same.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Config = TypeVar("Config")
SUFFIXES = (".yaml", ".yml", ".toml", ".json")


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The keys and values of a config file.

    Raises:
        ValueError: it is not there, cannot be parsed, or holds something else; the message names the file.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a config file ends in {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
        parsers = {".toml": tomllib.loads, ".json": json.loads}
        found = parsers.get(path.suffix, yaml.safe_load)(text)
    except OSError as error:
        raise ValueError(f"cannot read the config file {path}: {error.strerror or error}") from error
    except (ValueError, yaml.YAMLError) as error:  # TOML's, JSON's and text's errors are ValueErrors
        raise ValueError(f"the config file {path} is broken: {' '.join(str(error).split())}") from error
    if found is None:
        raise ValueError(f"the config file {path} is empty; expected names with values, such as algo: vader")
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"the config file {path} holds a {type(found).__name__}; expected names with values")
    return {key.replace("-", "_"): value for key, value in found.items()}


def write_yaml(path: Path, values: Mapping[str, Any], heading: str) -> None:
    """Writes values in the given order, below comment lines."""
    comment = "".join(f"# {line}\n" for line in heading.splitlines())
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(comment + text, encoding="utf-8")


def flat_names(kind: type[Any]) -> list[str]:
    """Names of all fields, those of dataclasses inside included."""
    hints = get_type_hints(kind)
    return [
        name
        for field in fields(kind)
        for name in (flat_names(hints[field.name]) if is_dataclass(hints[field.name]) else [field.name])
    ]


def from_mapping(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """A config from flat names and values; what is not given keeps its default.

    Args:
        kind: a dataclass, with dataclasses inside perhaps; all fields have defaults.
        values: by flat name.
        where: stands in front of messages, such as the file's name.

    Raises:
        ValueError: an unknown name (the nearest is named), or a value of another type.
    """
    check_names(values, flat_names(kind), where)
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]  # a dataclass
        hint = hints[field.name]
        if is_dataclass(hint):
            own = flat_names(hint)  # type: ignore[arg-type]
            given[field.name] = from_mapping(hint, {k: v for k, v in values.items() if k in own}, where)  # type: ignore[type-var, arg-type]
        elif field.name in values:
            given[field.name] = converted(values[field.name], hint, f"{where}: {field.name}")
    return kind(**given)


def to_mapping(config: Any) -> dict[str, Any]:
    """The inverse of `from_mapping`."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        found |= to_mapping(value) if is_dataclass(value) else {field.name: value}
    return found


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ValueError for the first name that is not known, with the nearest that is."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: unknown key {name!r}; {nearest(name, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the nearest ones, or all."""
    known = list(known)
    near = get_close_matches(name, known, n=2)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"


def converted(value: Any, hint: Any, where: str) -> Any:
    """A value of a file or of `--set` as its field wants it.

    Args:
        value: None, a bool, number or text, or a list or mapping of these.
        hint: the field's type: bool, int, float, str, a Literal, a tuple, a Mapping or a union of these.
        where: the field, for the message.

    Raises:
        ValueError: a value of another type.
    """
    try:
        return _converted(value, hint)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {value!r}, expected {described(hint)}") from None


def _converted(value: Any, hint: Any) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _converted(value, inner[0])
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        for kind in (kind for kind in inner if kind is not NoneType):
            try:
                return _converted(value, kind)
            except (TypeError, ValueError):
                continue
        raise ValueError
    if origin is Literal:
        if value in inner:
            return value
        raise ValueError
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise TypeError
        kinds = [inner[0]] * len(value) if inner[1:] == (...,) else list(inner)
        return tuple(_converted(one, kind) for one, kind in zip(value, kinds, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError
        return {_converted(k, inner[0]): _converted(v, inner[1]) for k, v in value.items()}
    return _number_or_text(value, hint)


def _number_or_text(value: Any, hint: Any) -> Any:
    if hint is bool or isinstance(value, bool) or value is None:
        if hint is bool and isinstance(value, bool):
            return value
    elif hint is float and isinstance(value, int | float | str):
        return float(value)
    elif hint is int and isinstance(value, int):
        return value
    elif hint is str and isinstance(value, str | int | float):
        return str(value)  # a budget of 60 is the text "60"
    raise TypeError


def described(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return described(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(described(kind) for kind in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple:
        if inner[1:] == (...,):
            return f"a list, each {described(inner[0])}"
        return "(" + ", ".join(map(described, inner)) + ")"
    if origin is not None and issubclass(origin, Mapping):
        return f"names, each with {described(inner[1])}"
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", NoneType: "None"}
    return words.get(hint, str(hint))


def field_docs(kind: type[Any]) -> dict[str, str]:
    """The attribute docstrings of a dataclass by field, each as one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(told, str):
            found[before.target.id] = " ".join(told.split())
    return found


def finite(value: Any) -> Any:
    """Numbers as JSON can hold them, in nested lists and mappings: None instead of NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
