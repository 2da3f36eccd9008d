"""`vdm-env bench`: see `benchmarks.curves`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.arguments import parse
from benchmarks.curves import CurvesConfig, curves


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    return curves(parse(CurvesConfig, arguments, "vdm-env bench"))
