"""`vdm-env demo`: see `benchmarks.demo`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.arguments import parse
from benchmarks.demo import DemoConfig, demo


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    return demo(parse(DemoConfig, arguments, "vdm-env demo"))
