"""One experiment of a paper: what it found, the runs that repeat it on MovingShapes, and the claims they decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.experiments.claims import Claim
from benchmarks.experiments.judge import Verdict, judge
from benchmarks.plan import Benchmark
from benchmarks.records import Run


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment that is one command: `vdm-env bench --preset <name>`."""

    name: str
    """of the preset"""
    paper: str
    """short name of the paper; "" for one of this package's own"""
    arxiv: str = ""
    """number of its preprint"""
    figure: str = ""
    """figure or table of the preprint"""
    published: str = ""
    """figure or table of the published version"""
    finding: str
    """what the paper found, in our words"""
    known: Literal["numbers", "direction", "ours"]
    """whether the finding's numbers are at hand ("numbers") or its direction alone ("direction"); "ours": an
    expectation of this package"""
    claims: Sequence[Claim]
    """the finding as claims that runs can decide"""
    benchmark: Benchmark
    """the runs"""
    deviation: str = ""
    """what is not as in the paper"""
    cpu_minutes: float
    """of one run, evaluations included, at most; all runs: times arms times seeds"""

    def judge(self, runs: Sequence[Run]) -> Verdict:
        """What runs of this benchmark say. Runs with other labels are left out."""
        return judge(self.claims, runs)

    @property
    def place(self) -> str:
        """Where the paper says it."""
        parts = [self.figure and f"preprint {self.figure}", self.published and f"published version {self.published}"]
        return ", ".join(part for part in parts if part)

    @property
    def command(self) -> str:
        """What runs it and writes its report."""
        return f"python -m benchmarks.reward_vs_gpu_hours run --preset {self.name}"
