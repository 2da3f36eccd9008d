"""`vdm-env report`: see `benchmarks.report`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from benchmarks.arguments import parse, refuse

PROGRAM = "vdm-env report"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Write report.html and report.md again from the files of earlier runs."""

    folder: tyro.conf.Positional[str]
    """folder with runs, such as runs/demo"""
    threshold: float | None = None
    """reward whose time is measured; without it: the untrained model's plus half of the best mean gain"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code.

    Raises:
        SystemExit: code 2 for wrong usage.
    """
    config = parse(ReportConfig, arguments, PROGRAM)
    if config.threshold is not None and not math.isfinite(config.threshold):
        refuse(PROGRAM, f"--threshold must be a finite reward, got {config.threshold}")
    from benchmarks.report import report

    return report(config.folder, config.threshold)
