"""Algorithms over several environments at once: interquartile mean of normalised rewards, probability of improvement.

Source: Agarwal et al. 2021 (arXiv:2108.13264). Only with two environments or more; one has its t-intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.aggregate import Interval, probability_of_improvement, stratified_bootstrap
from benchmarks.records import PROXY
from benchmarks.summary import FEW, Summary


@dataclass(frozen=True)
class Scale:
    """What is 0 and what is 1 in an environment: the untrained model, and the best mean of any algorithm here."""

    env_id: str
    base: float
    best: float
    best_algo: str


@dataclass(frozen=True)
class Pooled:
    """The algorithms that were run in every environment.

    scores: {algorithm: [runs] normalised rewards per environment}; iqm: with its 95 % interval; improvement:
    {(a, b): probability that a run of a ends above one of b, in the mean over environments}.
    """

    scales: Sequence[Scale]
    scores: Mapping[str, Sequence[np.ndarray]]
    iqm: Mapping[str, Interval]
    improvement: Mapping[tuple[str, str], Interval]


def _scale(env_id: str, summaries: Sequence[Summary]) -> Scale | None:
    known = {s.algo: s.changes[PROXY] for s in summaries if PROXY in s.changes and s.measured}
    finite = {algo: change for algo, change in known.items() if np.isfinite([change.before, change.after]).all()}
    if not finite:
        return None
    best = max(finite, key=lambda algo: finite[algo].after)
    base = float(np.mean([change.before for change in finite.values()]))
    return Scale(env_id, base, finite[best].after, best) if finite[best].after > base else None


def pool(tasks: Mapping[str, Sequence[Summary]]) -> Pooled | None:
    """Pools environments, each at its own common cost.

    Args:
        tasks: {environment: its summaries}.

    Returns:
        None with fewer than two environments, with none where an algorithm gained, or without an algorithm that was
        evaluated in all of them.
    """
    scales = [scale for env_id, summaries in tasks.items() if (scale := _scale(env_id, summaries))]
    if len(tasks) < 2 or len(scales) < len(tasks):
        return None
    scores: dict[str, list[np.ndarray]] = {}
    for scale in scales:
        for summary in tasks[scale.env_id]:
            ends = [run.mean(PROXY, update) for run, update in zip(summary.runs, summary.at, strict=True)]
            if summary.measured and np.isfinite(ends).all():
                normal = (np.array(ends) - scale.base) / (scale.best - scale.base)
                scores.setdefault(summary.algo, []).append(normal)
    full = {algo: parts for algo, parts in scores.items() if len(parts) == len(scales)}
    if not full:
        return None
    iqm = {algo: _enough(stratified_bootstrap(parts), parts) for algo, parts in full.items()}
    improvement = {
        (a, b): _enough(probability_of_improvement(full[a], full[b]), [*full[a], *full[b]])
        for a in full
        for b in full
        if a != b
    }
    return Pooled(scales, full, iqm, improvement)


def _enough(found: Interval, parts: Sequence[np.ndarray]) -> Interval:
    """The interval, or only its centre where an environment has fewer than three runs: resampling one shows nothing."""
    return found if min(map(len, parts)) >= FEW else replace(found, low=float("nan"), high=float("nan"))
