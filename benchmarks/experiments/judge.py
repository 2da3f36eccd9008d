"""What a paper found, as claims that runs can decide. Needs numpy and scipy only, no torch.

A claim turns the runs of one seed into one number that is positive where our runs are as the paper says. The 95 %
interval of that number over seeds decides: above zero it agrees, below zero it differs, otherwise nothing is decided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from benchmarks.aggregate import Interval, t_interval
from benchmarks.records import GOLD, PROXY, Run

Word = Literal["agrees", "differs", "not decided"]
At = Literal["budget", "queries", "updates", "end"]
Runs = Mapping[str, Run]
"""the runs of one seed, by label"""

FEW = 3
"""below this many seeds nothing is decided"""
TRAIN = "train/"
"""in front of the name of a column of train.jsonl"""
_COLUMN = {"budget": "device_s", "queries": "reward_queries", "updates": "update", "end": "update"}
_AT = {
    "budget": "at equal device time",
    "queries": "after equally many reward queries",
    "updates": "after equally many updates",
    "end": "at the end",
}
_SLACK = 1.1  # runs of one budget end a part of an update apart; up to this factor their costs count as equal
_QUARTER = 4  # of a column of train.jsonl the mean over the last (first) quarter of the updates counts


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What of a run is looked at, and where on its way."""

    name: str = PROXY
    """a name out of eval.jsonl ("proxy", "gold", "heldout/Aesthetic", "diversity", "motion"), or "train/<column>" for a
    column of train.jsonl, the mean over the last quarter of the updates"""
    at: At = "budget"
    """the last evaluation within the cost that all runs compared have reached, or the last one of each: "end" """
    change: bool = False
    """minus the first evaluation (for a column of train.jsonl: minus the mean over the first quarter)"""
    split: str | None = None
    """of the prompts; None: the main one"""

    @property
    def text(self) -> str:
        """In words."""
        words = {PROXY: "reward", GOLD: "gold score"}.get(self.name, self.name.removeprefix(TRAIN))
        words = words.replace("heldout/", "held-out ").replace("proxy/", "reward ")
        return f"{'change of ' if self.change else ''}{words}{f' on {self.split} prompts' if self.split else ''}"

    def points(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Costs [N] and values [N] of a run, in order."""
        if not self.name.startswith(TRAIN):
            return run.curve(self.name, _COLUMN[self.at], self.split)
        rows = [row for row in run.train if row.get(self.name.removeprefix(TRAIN)) is not None]
        values = [row[self.name.removeprefix(TRAIN)] for row in rows]
        return np.array([row["update"] for row in rows], float), np.array(values, float)

    def limit(self, runs: Sequence[Run]) -> float:
        """The cost up to which all of them have values; infinite for "end" and for columns of train.jsonl."""
        if self.at == "end" or self.name.startswith(TRAIN):
            return math.inf
        ends = [cost[-1] if len(cost) else math.nan for cost, _ in map(self.points, runs)]
        return float(np.min(ends)) * (_SLACK if self.at == "budget" else 1.0)

    def value(self, run: Run, limit: float = math.inf, *, change: bool | None = None) -> float:
        """The number; NaN where there is none."""
        cost, values = self.points(run)
        values = values[cost <= limit]
        if not len(values):
            return math.nan
        part = math.ceil(len(values) / _QUARTER) if self.name.startswith(TRAIN) else 1
        end, start = float(np.mean(values[-part:])), float(np.mean(values[:part]))
        return end - start if (self.change if change is None else change) else end


class Claim(Protocol):
    """A statement about arms that runs can decide; any object with these is one."""

    @property
    def measure(self) -> Measure: ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the arms it speaks of."""
        ...

    @property
    def text(self) -> str:
        """One sentence."""
        ...

    def score(self, runs: Runs, limit: float) -> float:
        """Positive where one seed's runs are as claimed."""
        ...


@dataclass(frozen=True)
class Ahead:
    """Arm a is above arm b."""

    a: str
    b: str
    measure: Measure = Measure()

    @property
    def labels(self) -> tuple[str, ...]:
        return self.a, self.b

    @property
    def text(self) -> str:
        return f"{self.a} is ahead of {self.b}: {self.measure.text} {_AT[self.measure.at]}"

    def score(self, runs: Runs, limit: float) -> float:
        return self.measure.value(runs[self.a], limit) - self.measure.value(runs[self.b], limit)


@dataclass(frozen=True)
class Close:
    """Arms a and b differ by less than a margin."""

    a: str
    b: str
    margin: float
    measure: Measure = Measure()

    @property
    def labels(self) -> tuple[str, ...]:
        return self.a, self.b

    @property
    def text(self) -> str:
        return f"{self.a} and {self.b} are within {self.margin:g}: {self.measure.text} {_AT[self.measure.at]}"

    def score(self, runs: Runs, limit: float) -> float:
        """The signed difference: the whole interval has to lie within the margin, see `decide`."""
        return self.measure.value(runs[self.a], limit) - self.measure.value(runs[self.b], limit)


@dataclass(frozen=True)
class Trend:
    """A measure rises from arm to arm: the slope over their places in the list.

    With `minus`, the difference between each arm and the one at the same place there rises: a gap that widens.
    """

    arms: tuple[str, ...]
    minus: tuple[str, ...] = ()
    measure: Measure = Measure()

    def __post_init__(self) -> None:
        if len(self.arms) < 2 or (self.minus and len(self.minus) != len(self.arms)):
            raise ValueError(f"Trend needs two or more arms, and as many in minus; got {self.arms} and {self.minus}")

    @property
    def labels(self) -> tuple[str, ...]:
        return *self.arms, *self.minus

    @property
    def text(self) -> str:
        what = f"{self.measure.text} {_AT[self.measure.at]}"
        if self.minus:
            return f"the gap from {', '.join(self.minus)} to {', '.join(self.arms)} widens in this order: {what}"
        return f"{', '.join(self.arms)} rise in this order: {what}"

    def score(self, runs: Runs, limit: float) -> float:
        heights = np.array([self.measure.value(runs[label], limit) for label in self.arms])
        if self.minus:
            heights -= np.array([self.measure.value(runs[label], limit) for label in self.minus])
        return float(np.polyfit(np.arange(len(heights)), heights, 1)[0])


@dataclass(frozen=True)
class Rises:
    """A measure is higher at the end of an arm's runs than at their start."""

    label: str
    measure: Measure = Measure(at="end")

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.label,)

    @property
    def text(self) -> str:
        return f"{self.label} raises the {self.measure.text}"

    def score(self, runs: Runs, limit: float) -> float:
        return self.measure.value(runs[self.label], limit, change=True)


@dataclass(frozen=True)
class Falls:
    """A measure is lower at the end than at the start or, with `from_half`, than at the half of the updates."""

    label: str
    measure: Measure = Measure(at="end")
    from_half: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.label,)

    @property
    def text(self) -> str:
        return f"{self.label} lowers the {self.measure.text}{' in the second half' if self.from_half else ''}"

    def score(self, runs: Runs, limit: float) -> float:
        run = runs[self.label]
        if not self.from_half:
            return -self.measure.value(run, limit, change=True)
        cost, _ = self.measure.points(run)
        half = cost[-1] / 2 if len(cost) else math.nan
        return self.measure.value(run, half, change=False) - self.measure.value(run, limit, change=False)


@dataclass(frozen=True)
class Keeps:
    """At the end there is at least this share of what a measure was at the start."""

    label: str
    share: float
    measure: Measure = Measure(at="end")

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.label,)

    @property
    def text(self) -> str:
        return f"{self.label} keeps at least {self.share:.0%} of the {self.measure.text}"

    def score(self, runs: Runs, limit: float) -> float:
        end = self.measure.value(runs[self.label], limit, change=False)
        start = end - self.measure.value(runs[self.label], limit, change=True)
        return end - self.share * start


@dataclass(frozen=True)
class Generalises:
    """The gain on the main split is at least this share of the gain on another one, such as the prompts trained on."""

    label: str
    share: float
    trained_on: str = "train"
    measure: Measure = Measure(at="end")

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.label,)

    @property
    def text(self) -> str:
        return (
            f"the {self.measure.text} that {self.label} gains on other prompts is at least {self.share:.0%} of its "
            f"gain on {self.trained_on} prompts"
        )

    def score(self, runs: Runs, limit: float) -> float:
        there = Measure(name=self.measure.name, at=self.measure.at, split=self.trained_on)
        gain = self.measure.value(runs[self.label], limit, change=True)
        return gain - self.share * there.value(runs[self.label], limit, change=True)


@dataclass(frozen=True)
class LessMemory:
    """Arm a needs less memory than arm b, by a column of train.jsonl."""

    a: str
    b: str
    measure: Measure = Measure(name="train/training_mib", at="end")

    @property
    def labels(self) -> tuple[str, ...]:
        return self.a, self.b

    @property
    def text(self) -> str:
        return f"{self.a} needs less memory than {self.b}: {self.measure.text}"

    def score(self, runs: Runs, limit: float) -> float:
        return self.measure.value(runs[self.b], limit) - self.measure.value(runs[self.a], limit)


@dataclass(frozen=True)
class Alarmed:
    """The run's alarm rang: +1 for a run with a row in alarms.jsonl, -1 for one without."""

    label: str
    measure: Measure = Measure(at="end")

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.label,)

    @property
    def text(self) -> str:
        return f"the alarm rings in runs of {self.label}"

    def score(self, runs: Runs, limit: float) -> float:
        return 1.0 if runs[self.label].alarms else -1.0


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
