"""The papers' experiments as presets: each one command on MovingShapes, the finding as claims that runs decide.

    python -m benchmarks.reward_vs_gpu_hours run --preset vader-efficiency

`EXPERIMENTS` maps names to `experiment.Experiment`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from benchmarks.experiments import online_vpo, overopt, vader, videodpo
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.finding_section import section
from benchmarks.experiments.judge import Outcome, Verdict
from benchmarks.page import Section
from benchmarks.records import Run

EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType(
    {
        experiment.name: experiment
        for module in (vader, online_vpo, videodpo, overopt)
        for experiment in module.EXPERIMENTS
    }
)
"""By name of the preset."""


def sections(name: str, runs: Sequence[Run]) -> list[Section]:
    """What a report on a benchmark's runs says about a paper's finding; nothing for benchmarks that are no experiment.

    Args:
        name: of the benchmark.
        runs: that are in its folder.
    """
    return [section(EXPERIMENTS[name], runs)] if name in EXPERIMENTS else []


__all__ = ["EXPERIMENTS", "Experiment", "Outcome", "Verdict", "section", "sections"]
