"""What a benchmark consists of: arms (an algorithm with its settings) times seeds, on one task, with one budget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of a figure: an algorithm, or one algorithm with other settings than the next arm."""

    label: str
    """name in reports and of the arm's folder, such as "vader" or "vader K=10" """
    algo: str
    """name in the zoo, or package.module:Class of a class of one's own"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """fields of the algorithm's config that differ from its preset"""
    env: Mapping[str, Any] = field(default_factory=dict)
    """options of `vdm_env.make` for training that differ from the benchmark's `sampling`"""
    policy: Mapping[str, Any] = field(default_factory=dict)
    """options of `env.make_policy`"""
    evaluate_as_trained: bool = False
    """evaluate with `env` too (another resolution, say); then the arm's curve is a measurement of its own, which
    reports do not draw with the others"""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Everything that is the same for all arms, and the arms."""

    name: str
    """folder of the benchmark below the folder of runs"""
    arms: Sequence[Arm]
    env_id: str = "MovingShapes-HPS"
    """environment, <Model>-<Reward>"""
    sampling: Mapping[str, Any] | None = None
    """options of `vdm_env.make` for training and evaluation; None: `benchmarks.training.SAMPLING`"""
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    """training seeds, the same for every arm"""
    budget: str | None = None
    """device time of each run, such as 60s"""
    updates: int | None = None
    """updates of each run, instead of a budget or beside it"""
    evals: int = 6
    """evaluations after the first one"""
    splits: Sequence[str] = ("test",)
    """prompts of the evaluations; the first is the main one, others stand beside it ("train")"""
    eval_prompts: int = 16
    """prompts of each split, spread over it"""
    noise_seeds: int = 4
    """videos of each prompt in an evaluation"""
    heldout: Sequence[str] = ()
    """rewards that are evaluated and never optimised, such as Aesthetic"""
    question: str = ""
    """what the runs are to answer"""
    hypothesis: str = ""
    """what was expected, written down before the runs"""
    expected_ahead: Sequence[tuple[str, str]] = ()
    """(label, label) pairs of the hypothesis: the first is expected above the second at equal cost"""
    tuning: str = ""
    """how much tuning each arm had, and where it is logged"""
    limits: Sequence[str] = ()
    """what the runs do not show"""
    experiment: str = ""
    """name in `benchmarks.experiments` of the finding of a paper that the report sets beside the runs"""


def folder_name(label: str) -> str:
    """A label made safe for the name of a folder: "vader K=10" gives "vader_K=10"."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", label).strip("._") or "arm"


def run_folder(root: str | Path, label: str, env_id: str, seed: int) -> Path:
    """Where a run of an arm belongs, below the folder of its benchmark: <arm>/<env_id>/seed_<n>."""
    return Path(root) / folder_name(label) / env_id / f"seed_{seed}"


def check(benchmark: Benchmark) -> None:
    """Refuses what can be seen without building anything.

    Raises:
        ValueError: a bad name, no arms or two in one folder, no budget, a number below one, bad seeds, a held-out
            reward or split twice, or an expectation about an arm that there is not.
    """
    if folder_name(benchmark.name) != benchmark.name:
        raise ValueError(f"--name {benchmark.name!r}: expected letters, digits and . _ = + - without spaces")
    labels = [arm.label for arm in benchmark.arms]
    folders = [folder_name(label) for label in labels]
    if not labels:
        raise ValueError("a benchmark needs an algorithm: give --algo vader")
    for name, values in (
        ("algorithms", folders),
        ("--seeds", benchmark.seeds),
        ("--splits", benchmark.splits),
        ("--heldout", benchmark.heldout),
    ):
        if len(set(values)) < len(values):
            raise ValueError(f"{name}: expected different ones, got {' '.join(map(str, values))}")
    if not benchmark.seeds or min(benchmark.seeds) < 0:
        raise ValueError(f"--seeds must be numbers from 0 on, got {' '.join(map(str, benchmark.seeds)) or 'none'}")
    if not benchmark.splits:
        raise ValueError("--splits: expected test, validation or train, and others behind it")
    if benchmark.budget is None and benchmark.updates is None:
        raise ValueError("a run needs an end: give --budget 60s (device-seconds), --updates 40, or both")
    for name in ("updates", "evals", "eval_prompts", "noise_seeds"):
        value = getattr(benchmark, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for pair in benchmark.expected_ahead:
        for label in pair:
            if label not in labels:
                raise ValueError(f"--ahead names {label!r}, but the arms are {', '.join(labels)}")


def record(benchmark: Benchmark) -> dict[str, Any]:
    """A benchmark as JSON can hold it."""
    found = asdict(benchmark)
    found["expected_ahead"] = [list(pair) for pair in benchmark.expected_ahead]
    return {key: list(value) if isinstance(value, tuple | range) else value for key, value in found.items()}
