"""`vdm-env study`: see `benchmarks.study`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.arguments import parse, refuse
from benchmarks.study import StudyConfig, study


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    config = parse(StudyConfig, arguments, "vdm-env study")
    for folder in (config.run_a, config.run_b):
        if not (Path(folder) / "run.json").is_file():
            refuse("vdm-env study", f"{folder} is no run: it holds no run.json")
    return study(config)
