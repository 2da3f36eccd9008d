"""`vdm-env bench`: one algorithm, see `benchmarks.curves`, or several, see `benchmarks.reward_vs_gpu_hours`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.arguments import parse
from benchmarks.bench_options import Options
from benchmarks.curves import CurvesConfig, curves
from benchmarks.reward_vs_gpu_hours import run

PROGRAM = "vdm-env bench"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig(CurvesConfig):
    """Train one algorithm with several seeds and write its curves, or compare several algorithms with --preset.

    With --preset the other options are those of python -m benchmarks.reward_vs_gpu_hours run, which
    vdm-env bench --preset quick --help lists.
    """

    preset: str | None = None
    """a whole benchmark by name, such as quick: four algorithms, three seeds, a CPU-minute each; a wrong name lists the
    others"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if any(given.partition("=")[0] == "--preset" for given in arguments):
        return run(parse(Options, arguments, PROGRAM), shlex.join([*PROGRAM.split(), *arguments]), PROGRAM)
    return curves(parse(BenchConfig, arguments, PROGRAM), PROGRAM)
