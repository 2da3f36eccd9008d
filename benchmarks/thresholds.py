"""How long each run took to reach one level of the reward. Runs that never reached it are censored, not dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.aggregate import Interval, Reached, time_to_threshold
from benchmarks.records import PROXY, Run
from benchmarks.summary import Summary, over_runs


@dataclass(frozen=True)
class Threshold:
    """A level of the reward, and in words where it comes from."""

    value: float
    rule: str


def default_threshold(summaries: Sequence[Summary]) -> Threshold | None:
    """The untrained model's reward plus half of the best algorithm's mean gain at the cost compared.

    None where no algorithm gained: then there is no level worth waiting for.
    """
    known = [s.changes[PROXY] for s in summaries if PROXY in s.changes and s.measured]
    finite = [change for change in known if np.isfinite(change.difference.centre)]
    best = max(finite, key=lambda change: change.difference.centre, default=None)
    if best is None or best.difference.centre <= 0:
        return None
    base = float(np.mean([change.before for change in finite]))
    value = base + best.difference.centre / 2
    return Threshold(
        value,
        f"{value:.3g}: the untrained model's {base:.3g} plus half of the best algorithm's mean gain "
        f"({best.difference.centre:+.3g} at the cost compared)",
    )


def given_threshold(value: float) -> Threshold:
    """A level someone asked for."""
    return Threshold(value, f"{value:.3g}, as given on the command line")


def times(runs: Sequence[Run], threshold: Threshold, x: str = "device_s", scale: float = 1.0) -> list[Reached]:
    """When each run reached the threshold, in units of `scale` * x; censored at its end where it did not."""
    found = []
    for run in runs:
        cost, value = run.curve(PROXY, x)
        found.append(time_to_threshold(cost * scale, value, threshold.value))
    return found


def centre(reached: Sequence[Reached]) -> Interval | None:
    """Mean time with its t-interval over runs; None if any run is censored: a mean without it would be too short."""
    return None if any(one.censored for one in reached) else over_runs([one.x for one in reached])


def show_times(reached: Sequence[Reached]) -> str:
    """The times of an algorithm's runs as text: "0.01 [0.008, 0.012]", "> 0.02", or "2 of 3 seeds, others > 0.02"."""
    mean = centre(reached)
    if mean is not None:
        if np.isnan(mean.low):
            return f"{mean.centre:.3g}"
        return f"{mean.centre:.3g} [{max(mean.low, 0.0):.3g}, {mean.high:.3g}]"
    shortest = min(one.x for one in reached if one.censored)
    hits = sum(not one.censored for one in reached)
    return f"{hits} of {len(reached)} seeds, others > {shortest:.3g}" if hits else f"> {shortest:.3g}"
