"""`vdm-env algos`: the table of algorithms, and the settings of one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import tyro

from benchmarks.arguments import one_line, parse, refuse
from benchmarks.configs import described, field_docs
from benchmarks.training import ENV_ID

_WIDTH = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class AlgosConfig:
    """List the algorithms there are, or the settings of one of them (for --set of train)."""

    name: tyro.conf.Positional[str | None] = None
    """of the algorithm whose settings are to be listed, such as vader"""
    model: str = ENV_ID.partition("-")[0]
    """whose preset is shown beside the defaults, as in environment ids"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    config = parse(AlgosConfig, arguments, "vdm-env algos")
    from algos.zoo import ZOO, load

    if config.name is None:
        print(zoo_table(ZOO), "", "vdm-env algos NAME lists the settings of one.", sep="\n")
        return 0
    try:
        print(settings(load(config.name)[1], config.name, config.model))
    except ValueError as error:
        refuse("vdm-env algos", one_line(error))
    return 0


def zoo_table(zoo: Any) -> str:
    """Name, what it learns from and one line about each algorithm."""
    width, kind = max(map(len, zoo)), max(len(entry.learns_from) for entry in zoo.values())
    indent = " " * (width + kind + 4)
    return "\n".join(
        textwrap.fill(
            f"{name:<{width}}  {entry.learns_from:<{kind}}  {entry.summary}", _WIDTH, subsequent_indent=indent
        )
        for name, entry in zoo.items()
    )


def settings(kind: type[Any], name: str, model: str) -> str:
    """The fields of a config: type, default, the preset's value where it is another one, and what they mean."""
    hints, docs, base = get_type_hints(kind), field_docs(kind), kind()
    try:
        preset = kind.preset(model)
        heading = f"the preset for {model} where it differs"
    except (ValueError, AttributeError):
        preset, heading = base, f"there is no preset for {model}"
    lines = [
        f"{name}: settings with their defaults; {heading}. Change one with",
        "  vdm-env train --set NAME=VALUE",
        "",
    ]
    for field in fields(kind):
        if field.name == "seed":  # an option of its own
            continue
        default, found = getattr(base, field.name), getattr(preset, field.name)
        other = "" if found == default else f"; preset: {found!r}"
        lines.append(f"{field.name}={default!r}{other}")
        about = f"{docs.get(field.name, '')} ({described(hints[field.name])})"
        lines.append(textwrap.fill(about, _WIDTH, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(lines)
