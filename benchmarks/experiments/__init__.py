"""The papers' experiments as presets: each one command on MovingShapes, the finding as claims that runs decide.

    python -m benchmarks.reward_vs_gpu_hours run --preset vader-efficiency

`EXPERIMENTS` maps names to `experiment.Experiment`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from benchmarks.experiments import online_vpo, overopt, vader, videodpo
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.judge import Outcome, Verdict, judge
from benchmarks.experiments.section import section

EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType(
    {
        experiment.name: experiment
        for module in (vader, online_vpo, videodpo, overopt)
        for experiment in module.EXPERIMENTS
    }
)
"""By name of the preset."""

__all__ = ["EXPERIMENTS", "Experiment", "Outcome", "Verdict", "judge", "section"]
