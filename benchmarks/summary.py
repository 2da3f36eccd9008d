"""What a set of runs says, in numbers and in one sentence. Needs numpy and scipy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from benchmarks.aggregate import Interval, paired_difference, t_interval
from benchmarks.records import GOLD, PROXY, Run, by_algorithm

_SLACK = 1.1  # runs of one budget end a part of an update apart; up to this factor their costs count as equal
_FEW = 3  # below this many runs an interval over runs says nothing


@dataclass(frozen=True)
class Change:
    """A reward before and after training, and the paired difference.

    unit: over what the interval is taken: "runs", "prompts" (of one run), or "" where there is none.
    """

    before: float
    after: float
    difference: Interval
    unit: str


@dataclass(frozen=True, eq=False)
class Summary:
    """One algorithm's runs, compared at `cost` device-seconds: at the evaluations after the updates `at`.

    `device_s` and `costs` are what its runs spent in all, means over the runs.
    """

    algo: str
    runs: Sequence[Run]
    at: Sequence[int]
    changes: dict[str, Change]
    cost: float
    device_s: float
    costs: dict[str, float]

    @property
    def status(self) -> str:
        return ", ".join(sorted({run.status.lower() for run in self.runs}))


def common_cost(runs: Sequence[Run]) -> float:
    """The cost in device-seconds up to which every run was evaluated; a run never evaluated after training is left out.

    Not the budget: the update that crosses a budget is the last one, and may be long.
    """
    last = [max(row["device_s"] for row in run.evals) for run in runs if run.updates()[-1] > 0]
    return min(last, default=0.0)


def update_at(run: Run, cost: float) -> int:
    """The last evaluated update that cost no more than `cost` device-seconds, or little more: see `_SLACK`."""
    return max(row["update"] for row in run.evals if row["device_s"] <= cost * _SLACK)


def _interval(pairs: Sequence[tuple[dict[int, float], dict[int, float]]]) -> tuple[Interval, str]:
    """Interval of after - before: over runs from three on, over the prompts of a single run, else none.

    Args:
        pairs: for each run {prompt: value} after and before.
    """
    if len(pairs) == 1:
        return paired_difference(*pairs[0])[0], "prompts"
    means = [paired_difference(after, before)[0].centre for after, before in pairs]
    if len(pairs) < _FEW:
        return Interval(float(np.mean(means)), float("nan"), float("nan"), len(pairs)), ""
    return t_interval(means), "runs"


def _change(runs: Sequence[Run], at: Sequence[int], reward: str) -> Change | None:
    pairs = [(run.per_prompt(reward, update), run.per_prompt(reward, 0)) for run, update in zip(runs, at, strict=True)]
    if not all(set(after) & set(before) for after, before in pairs):
        return None
    difference, unit = _interval(pairs)
    # Means over the prompts that have both: otherwise the difference would not be after - before.
    shared = [(after, before, set(after) & set(before)) for after, before in pairs]
    after_mean = float(np.mean([np.mean([after[prompt] for prompt in both]) for after, _, both in shared]))
    before_mean = float(np.mean([np.mean([before[prompt] for prompt in both]) for _, before, both in shared]))
    return Change(before_mean, after_mean, difference, unit)


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """One summary for each algorithm, all at one cost."""
    cost = common_cost(runs)
    found = []
    for algo, group in by_algorithm(runs).items():
        at = [update_at(run, cost) for run in group]
        changes = {name: _change(group, at, name) for name in group[0].rewards()}
        rows = [run.train[-1] for run in group if run.train]
        names = ("videos_sampled", "reward_queries", "denoiser_forwards", "denoiser_backwards", "update")
        costs = {name: float(np.mean([row[name] for row in rows])) if rows else 0.0 for name in names}
        spent = float(np.mean([run.device_s() for run in group]))
        known = {name: change for name, change in changes.items() if change is not None}
        found.append(Summary(algo, group, at, known, cost, spent, costs))
    return found


def difference(a: Summary, b: Summary, reward: str = PROXY) -> tuple[Interval, str]:
    """Paired difference a - b of the reward after training: over shared seeds, or over prompts of one run each.

    Raises:
        ValueError: nothing to pair.
    """
    after_a, after_b = (
        {run.seed: run.per_prompt(reward, update) for run, update in zip(s.runs, s.at, strict=True)} for s in (a, b)
    )
    shared = sorted(set(after_a) & set(after_b))
    if not shared:
        raise ValueError(f"{a.algo} and {b.algo} share no seed: run both with the same ones")
    return _interval([(after_a[seed], after_b[seed]) for seed in shared])


def show(value: float) -> str:
    """A reward as text: three significant digits."""
    return f"{value:.3g}"


def show_interval(interval: Interval, unit: str) -> str:
    """A difference with its interval, or why there is none."""
    if not unit or np.isnan(interval.low):
        return f"{interval.centre:+.3g} (n = {interval.n}, no interval)"
    return f"{interval.centre:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


def explain_unit(unit: str, interval: Interval) -> str:
    """What an interval is taken over, in words."""
    return {
        "runs": f"95 % interval over {interval.n} seeds",
        "prompts": f"95 % interval over {interval.n} prompts of one seed; it says nothing about other seeds",
        "": "no interval: too few seeds",
    }[unit]


def unmeasured(summary: Summary) -> str:
    """Why there is no result of an algorithm at the common cost."""
    if summary.cost == 0:
        return "was not evaluated after training"
    return f"was not evaluated after training within the {summary.cost:.0f} device-seconds compared"


def _moved(change: Change) -> str:
    if not change.difference.excludes_zero:
        return "does not clearly move"
    return "raises" if change.difference.centre > 0 else "lowers"


def answer(summaries: Sequence[Summary], reward_name: str) -> str:
    """One computed sentence: what each algorithm did to the reward and the gold score, and which did better."""
    parts = []
    for summary in summaries:
        change = summary.changes.get(PROXY)
        if change is None or max(summary.at) == 0:
            parts.append(f"{summary.algo} {unmeasured(summary)}")
            continue
        text = f"{summary.algo} {_moved(change)} it ({show(change.before)} to {show(change.after)}"
        gold = summary.changes.get(GOLD)
        if gold is not None:
            text += f"; gold score {show(gold.before)} to {show(gold.after)}"
            if change.difference.excludes_zero and change.difference.centre > 0 > gold.difference.high:
                text += ": over-optimisation"
        parts.append(text + ")")
    split = next((row["split"] for summary in summaries for run in summary.runs for row in run.evals), "fixed")
    start = f"Measured by {reward_name} on {split} prompts: "
    return start + ", ".join(parts) + _ranking(summaries) + "."


def _ranking(summaries: Sequence[Summary]) -> str:
    """What the sentence says about pairs of algorithms, if every one was evaluated after training."""
    if len(summaries) < 2 or any(max(summary.at) == 0 for summary in summaries):
        return ""
    texts = []
    for a, b in combinations(summaries, 2):
        interval, unit = difference(a, b)
        if interval.centre < 0:
            a, b, interval = b, a, Interval(-interval.centre, -interval.high, -interval.low, interval.n)
        shown = f"{show_interval(interval, unit)}, {explain_unit(unit, interval)}"
        if interval.excludes_zero:
            texts.append(
                f"at equal cost ({a.cost:.0f} device-seconds) {a.algo} is above {b.algo} ({a.algo} - {b.algo}: {shown})"
            )
        else:
            texts.append(f"at equal cost {a.algo} and {b.algo} cannot be told apart ({a.algo} - {b.algo}: {shown})")
    return "; " + "; ".join(texts)
