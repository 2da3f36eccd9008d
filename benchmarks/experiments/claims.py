"""Claims about the arms of a benchmark, each of which turns the runs of one seed into one number. Needs numpy only.

The number is positive where the runs are as claimed; `judge` decides by its interval over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from benchmarks.records import GOLD, PROXY, Run

At = Literal["budget", "queries", "updates", "end"]
Runs = Mapping[str, Run]
"""the runs of one seed, by label"""

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
    """The alarm for a measure rang: +1 for a run with such a row in alarms.jsonl, -1 for one without."""

    label: str
    measure: Measure = Measure(name=GOLD, at="end")

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.label,)

    @property
    def text(self) -> str:
        return f"the alarm for the {self.measure.text} rings in runs of {self.label}"

    def score(self, runs: Runs, limit: float) -> float:
        rang = any(row.get("alarm") == self.measure.name for row in runs[self.label].alarms)
        return 1.0 if rang else -1.0
