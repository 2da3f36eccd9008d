"""What a set of runs says, in numbers: changes, levels and paired differences at equal cost. Needs numpy and scipy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from benchmarks.aggregate import Interval, area_under_curve, paired_difference, t_interval
from benchmarks.records import PROXY, Run, by_algorithm

SLACK = 1.1  # runs of one budget end a part of an update apart; up to this factor their costs count as equal
FEW = 3  # below this many runs an interval over runs says nothing
_NAN = float("nan")
AXES = {"device_s": "device-seconds", "reward_queries": "reward queries"}
"""The costs at which algorithms are compared, and their units."""


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
        diverged = ["diverged" for run in self.runs if run.diverged()]
        return ", ".join(sorted({run.status.lower() for run in self.runs} | set(diverged)))

    @property
    def measured(self) -> bool:
        """Whether any of its runs was evaluated after training, up to the cost compared."""
        return max(self.at) > 0


def common_cost(runs: Sequence[Run], x: str = "device_s") -> float:
    """The cost up to which every run was evaluated; a run never evaluated after training is left out.

    Not the budget: the update that crosses a budget is the last one, and may be long. A failed run does not hold the
    others back: it stays in the comparison at its last value.

    Args:
        runs: those that are to be compared.
        x: a cost column of eval.jsonl.
    """
    last = {run.folder: [row[x] for row in run.evals if row.get(x) is not None] for run in runs if run.updates()[-1]}
    known = [run for run in runs if last.get(run.folder)]
    healthy = [run for run in known if run.status != "FAILED"]
    return float(min((max(last[run.folder]) for run in healthy or known), default=0.0))


def update_at(run: Run, cost: float, x: str = "device_s") -> int:
    """The last evaluated update with a finite reward that cost no more than `cost`, or little more: see `SLACK`."""
    costs = {update: run.cost(update, x) for update in run.updates()}
    within = [update for update, spent in costs.items() if spent is not None and spent <= cost * SLACK]
    finite = [update for update in within if np.isfinite(run.mean(PROXY, update))]
    return max(finite or within[:1] or run.updates()[:1])


def over_runs(values: Sequence[float]) -> Interval:
    """A t-interval from three runs on, below that only the mean; a run without a value makes it NaN, not smaller."""
    if len(values) < FEW or not np.isfinite(values).all():
        return Interval(float(np.mean(values)) if len(values) else _NAN, _NAN, _NAN, len(values))
    return t_interval(values)


def _interval(pairs: Sequence[tuple[dict[int, float], dict[int, float]]]) -> tuple[Interval, str]:
    """Interval of after - before: over runs from three on, over the prompts of a single run, else none.

    Args:
        pairs: for each run {prompt: value} after and before.
    """
    if any(not set(after) & set(before) for after, before in pairs):
        return Interval(_NAN, _NAN, _NAN, len(pairs)), ""
    if len(pairs) == 1:
        return paired_difference(*pairs[0])[0], "prompts"
    found = over_runs([paired_difference(after, before)[0].centre for after, before in pairs])
    return found, "runs" if found.n >= FEW else ""


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


def summarise(runs: Sequence[Run], x: str = "device_s") -> list[Summary]:
    """One summary for each algorithm, all at one cost, which is counted in the column `x` of eval.jsonl."""
    cost = common_cost(runs, x)
    found = []
    for algo, group in by_algorithm(runs).items():
        at = [update_at(run, cost, x) for run in group]
        names = dict.fromkeys(name for run in group for name in run.rewards())
        changes = {name: _change(group, at, name) for name in names}
        rows = [run.train[-1] for run in group if run.train]
        counted = ("videos_sampled", "reward_queries", "denoiser_forwards", "denoiser_backwards", "update")
        costs = {name: float(np.mean([row[name] for row in rows])) if rows else 0.0 for name in counted}
        spent = float(np.mean([run.device_s() for run in group]))
        known = {name: change for name, change in changes.items() if change is not None}
        found.append(Summary(algo, group, at, known, cost, spent, costs))
    return found


def level(summary: Summary, reward: str) -> Interval:
    """Mean of what was measured at the cost compared, such as "kl_ref_nats"; NaN where a run lacks it."""
    return over_runs([run.mean(reward, update) for run, update in zip(summary.runs, summary.at, strict=True)])


def mean_height(summary: Summary, reward: str = PROXY) -> Interval:
    """Area under the reward curve up to the cost compared, over that cost; NaN where a run ended before."""
    found = []
    for run in summary.runs:
        x, y = run.curve(reward)
        # An update that crosses the cost a little late is the run's end for the comparison, so it is here.
        end = min(summary.cost, float(x[-1])) if len(x) and x[-1] * SLACK >= summary.cost else _NAN
        found.append(area_under_curve(x, y, end) if np.isfinite(end) else _NAN)
    return over_runs(found)


def per_thousand_queries(summary: Summary, reward: str = PROXY) -> Interval:
    """Change of the reward for each 1,000 reward queries spent up to the evaluation compared."""
    found = []
    for run, update in zip(summary.runs, summary.at, strict=True):
        queries = run.cost(update, "reward_queries")
        found.append(1000 * (run.mean(reward, update) - run.mean(reward, 0)) / queries if queries else _NAN)
    return over_runs(found)


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


def pair_differences(summaries: Sequence[Summary]) -> dict[tuple[str, str], tuple[Interval, str]]:
    """`difference` of every pair of algorithms that share a seed, in the given order; {(a, b): (a - b, unit)}."""
    found = {}
    for a, b in combinations(summaries, 2):
        if {run.seed for run in a.runs} & {run.seed for run in b.runs} and a.measured and b.measured:
            found[a.algo, b.algo] = difference(a, b)
    return found


def ranked(summaries: Sequence[Summary]) -> list[Summary]:
    """The algorithms by their reward after training, best first; those without one at the end."""
    return sorted(summaries, key=lambda s: -_sortable(s.changes, s.measured))


def _sortable(changes: Mapping[str, Change], measured: bool) -> float:
    change = changes.get(PROXY)
    return change.after if change and measured and np.isfinite(change.after) else -np.inf


def show(value: float) -> str:
    """A reward as text: three significant digits."""
    return "-" if np.isnan(value) else f"{value:.3g}"


def show_interval(interval: Interval, unit: str) -> str:
    """A difference with its interval, or why there is none."""
    if np.isnan(interval.centre):
        return "not measured in every run"
    if not unit or np.isnan(interval.low):
        return f"{interval.centre:+.3g} (n = {interval.n}, no interval)"
    return f"{interval.centre:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


def show_level(interval: Interval) -> str:
    """A level with its interval over runs where there is one."""
    if np.isnan(interval.low):
        return show(interval.centre)
    return f"{interval.centre:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


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
