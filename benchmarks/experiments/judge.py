"""What our runs say about a paper's finding: it agrees, it differs, or nothing is decided. Needs numpy and scipy only.

The 95 % interval of a claim's number over seeds decides: above zero it agrees, below zero it differs (of `Close`:
within and outside the margin), otherwise nothing is decided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from benchmarks.aggregate import Interval, t_interval
from benchmarks.experiments.claims import Claim, Close
from benchmarks.records import Run

Word = Literal["agrees", "differs", "not decided"]

FEW = 3
"""below this many seeds nothing is decided"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What our runs say about one claim."""

    claim: str
    """the claim, one sentence"""
    word: Word
    """whether our runs agree with it"""
    interval: Interval | None
    """95 % interval over seeds of the number that decides; None without a run"""
    values: Mapping[str, float] = field(default_factory=dict)
    """the measure by label, means over the seeds compared"""
    note: str = ""
    """why nothing is decided, or what was left out"""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What our runs say about an experiment."""

    outcomes: Sequence[Outcome]

    @property
    def word(self) -> Word:
        """All claims agree, or one differs, or neither."""
        words = {outcome.word for outcome in self.outcomes}
        if "differs" in words:
            return "differs"
        return "agrees" if words == {"agrees"} else "not decided"


def judge(claims: Sequence[Claim], runs: Sequence[Run]) -> Verdict:
    """What runs say about claims; only runs that are done count, and seeds that all arms of a claim have."""
    return Verdict(outcomes=[_outcome(claim, runs) for claim in claims])


def _outcome(claim: Claim, runs: Sequence[Run]) -> Outcome:
    done: dict[str, dict[int, Run]] = {label: {} for label in claim.labels}
    for run in runs:
        if run.status == "DONE" and run.algo in done:
            done[run.algo][run.seed] = run
    seeds = sorted(set.intersection(*(set(of_arm) for of_arm in done.values())))
    if not seeds:
        missing = [label for label, of_arm in done.items() if not of_arm]
        note = f"no finished run of {', '.join(missing)}" if missing else "the arms share no seed"
        return Outcome(claim=claim.text, word="not decided", interval=None, note=note)
    limit = claim.measure.limit([of_arm[seed] for of_arm in done.values() for seed in seeds])
    by_seed = {seed: {label: of_arm[seed] for label, of_arm in done.items()} for seed in seeds}
    scores = {seed: claim.score(of_seed, limit) for seed, of_seed in by_seed.items()}
    finite = [seed for seed in seeds if math.isfinite(scores[seed])]
    left_out = f"; seeds {', '.join(str(s) for s in seeds if s not in finite)} have no value" if finite != seeds else ""
    if not finite:
        note = f"no run has a value of '{claim.measure.name}'"
        return Outcome(claim=claim.text, word="not decided", interval=None, note=note)
    interval = t_interval([scores[seed] for seed in finite])
    values = {
        label: float(np.mean([claim.measure.value(by_seed[seed][label], limit) for seed in finite]))
        for label in claim.labels
    }
    few = len(finite) < FEW
    return Outcome(
        claim=claim.text,
        word="not decided" if few else decide(claim, interval),
        interval=interval,
        values=values,
        note=(f"n = {len(finite)}, at least {FEW} seeds are needed" if few else f"n = {len(finite)}") + left_out,
    )


def decide(claim: Claim, interval: Interval) -> Word:
    """What an interval of a claim's scores says."""
    if isinstance(claim, Close):
        if -claim.margin < interval.low and interval.high < claim.margin:
            return "agrees"
        return "differs" if interval.low > claim.margin or interval.high < -claim.margin else "not decided"
    if interval.low > 0:
        return "agrees"
    return "differs" if interval.high < 0 else "not decided"
