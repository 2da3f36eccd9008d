"""The one sentence a report begins with, computed from the summaries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

from benchmarks.aggregate import Interval
from benchmarks.records import GOLD, PROXY
from benchmarks.summary import (
    Change,
    Summary,
    difference,
    explain_unit,
    ranked,
    show,
    show_interval,
    unmeasured,
)

_NOTHING = Interval(float("nan"), float("nan"), float("nan"), 0)
_SHORT = 3  # with more algorithms than these, the sentence ranks them instead of describing each


def answer(summaries: Sequence[Summary], reward_name: str, *, short: bool = False) -> str:
    """What the algorithms did to the reward and the gold score, and which did better at equal cost.

    Up to three algorithms each get their numbers and every pair its interval. With more the sentence gives the ranking
    and says which neighbours their paired intervals tell apart; so it does with `short`.
    """
    split = next((run.split for summary in summaries for run in summary.runs), "fixed")
    start = f"Measured by {reward_name} on {split} prompts"
    if len(summaries) > _SHORT or short and len(summaries) > 1:
        return f"{start}, {_chain(summaries)}."
    return f"{start}: " + ", ".join(map(_describe, summaries)) + _ranking(summaries) + "."


def _describe(summary: Summary) -> str:
    change = summary.changes.get(PROXY)
    if change is None or not summary.measured:
        return f"{summary.algo} {unmeasured(summary)}"
    text = f"{summary.algo} {_moved(change)} it ({show(change.before)} to {show(change.after)}"
    gold = summary.changes.get(GOLD)
    if gold is not None:
        text += f"; gold score {show(gold.before)} to {show(gold.after)}"
        text += ": over-optimisation" if over_optimised(summary) else ""
    return text + ")"


def _moved(change: Change) -> str:
    if not change.difference.excludes_zero:
        return "does not clearly move"
    return "raises" if change.difference.centre > 0 else "lowers"


def over_optimised(summary: Summary) -> bool:
    """Whether the reward clearly rose and the gold score clearly fell."""
    change, gold = summary.changes.get(PROXY), summary.changes.get(GOLD)
    if change is None or gold is None or not summary.measured:
        return False
    return change.difference.excludes_zero and change.difference.centre > 0 > gold.difference.high


def _ranking(summaries: Sequence[Summary]) -> str:
    """What the sentence says about pairs of algorithms, if every one was evaluated after training."""
    if len(summaries) < 2 or not all(summary.measured for summary in summaries):
        return ""
    texts = []
    for a, b in combinations(summaries, 2):
        if not _share_a_seed(a, b):
            texts.append(f"{a.algo} and {b.algo} share no seed and are not compared")
            continue
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


def _share_a_seed(a: Summary, b: Summary) -> bool:
    return bool({run.seed for run in a.runs} & {run.seed for run in b.runs})


def _chain(summaries: Sequence[Summary]) -> str:
    """The ranking with > between neighbours that are told apart and ~ between those that are not."""
    order = [summary for summary in ranked(summaries) if summary.measured and PROXY in summary.changes]
    rest = [summary.algo for summary in summaries if summary not in order]
    if not order:
        return "no algorithm was evaluated after training"
    text, units = order[0].algo, set()
    for a, b in pairwise(order):
        interval, unit = difference(a, b) if _share_a_seed(a, b) else (_NOTHING, "")
        units.add(explain_unit(unit, interval))
        # Prompts of a single run tell nothing about another seed, so they rank nobody.
        text += f" {'>' if unit == 'runs' and interval.low > 0 else '~'} {b.algo}"
    changes = [summary.changes[PROXY] for summary in order]
    seeds = [change for change in changes if change.unit == "runs"]
    raised = sum(change.difference.low > 0 for change in seeds)
    best = changes[0]
    said = f"{raised} of {len(order)} algorithms clearly raise it over seeds" if seeds else "too few seeds to decide"
    said += (
        f", the best in the mean being {order[0].algo} ({show(best.before)} to {show(best.after)}); the ranking at "
        f"equal cost ({order[0].cost:.0f} device-seconds) is {text}, where > stands between neighbours that the paired "
        f"difference over seeds tells apart and ~ between those it does not ({'; '.join(sorted(units))})"
    )
    down = [s.algo for s in order if over_optimised(s) and s.changes[PROXY].unit == "runs"]
    said += f"; over-optimisation (reward up, gold score down): {', '.join(down)}" if down else ""
    return said + (f"; not evaluated after training: {', '.join(rest)}" if rest else "")
