"""Whether what was expected before the runs came true: each pair, at equal device time and at equal reward queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.aggregate import Interval
from benchmarks.records import Run, by_algorithm
from benchmarks.summary import AXES, difference, explain_unit, show_interval, summarise

_SHORT = {"device_s": "device time", "reward_queries": "reward queries"}
_NONE = Interval(float("nan"), float("nan"), float("nan"), 0)


@dataclass(frozen=True)
class Verdict:
    """One expectation judged: `ahead` above `behind` at `cost` on the axis.

    verdict: "confirmed" or "refuted" where the paired 95 % interval over seeds lies on one side of 0, else
    "not decided". shown: the difference ahead - behind as text, or why there is none.
    """

    ahead: str
    behind: str
    axis: str
    cost: float
    interval: Interval
    verdict: str
    shown: str


def judge(runs: Sequence[Run], expected: Sequence[Sequence[str]]) -> list[Verdict]:
    """Judges every expected pair on every axis.

    The cost is the largest that both algorithms of the pair were evaluated at. Only an interval over seeds decides: one
    over the prompts of a single run says nothing about other seeds.

    Args:
        runs: of one environment.
        expected: (ahead, behind) labels.
    """
    groups = by_algorithm(runs)
    found = []
    for ahead, behind in expected:
        for axis in AXES:
            missing = [name for name in (ahead, behind) if name not in groups]
            if missing:
                note = f"no run of {' and '.join(missing)}"
                found.append(Verdict(ahead, behind, axis, 0.0, _NONE, "not decided", note))
            else:
                found.append(_judge(groups[ahead], groups[behind], axis))
    return found


def _judge(above: Sequence[Run], below: Sequence[Run], axis: str) -> Verdict:
    a, b = summarise([*above, *below], axis)
    names = (a.algo, b.algo, axis, a.cost)
    late = [s.algo for s in (a, b) if not s.measured]
    if late:
        return Verdict(*names, _NONE, "not decided", f"{' and '.join(late)} not evaluated after training by then")
    try:
        interval, unit = difference(a, b)
    except ValueError as error:
        return Verdict(*names, _NONE, "not decided", str(error))
    shown = show_interval(interval, unit) + (f", {explain_unit(unit, interval)}" if unit else "")
    if unit != "runs" or not interval.excludes_zero:
        return Verdict(*names, interval, "not decided", shown)
    return Verdict(*names, interval, "confirmed" if interval.low > 0 else "refuted", shown)


def sentence(verdicts: Sequence[Verdict]) -> str:
    """How many expectations came true, in words."""
    parts = []
    for axis in AXES:
        found = [verdict.verdict for verdict in verdicts if verdict.axis == axis]
        counts = [f"{found.count(word)} {word}" for word in ("confirmed", "refuted", "not decided") if word in found]
        parts.append(f"at equal {_SHORT[axis]} {', '.join(counts)}")
    pairs = len({(verdict.ahead, verdict.behind) for verdict in verdicts})
    return f"Of {pairs} expected pair{'s' if pairs > 1 else ''}: {'; '.join(parts)}."


def verdict_table(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one for each pair and axis."""
    head = ["expected", "at equal", "cost", "difference", "verdict"]
    rows = [
        [
            f"{one.ahead} above {one.behind}", _SHORT[one.axis],
            f"{one.cost:,.0f} {AXES[one.axis]}" if one.cost else "-", one.shown, f"**{one.verdict}**",
        ]
        for one in verdicts
    ]  # fmt: skip
    return head, rows
