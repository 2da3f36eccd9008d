"""The results table of a report and the matrix of paired differences, as text. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from benchmarks.aggregate import Interval
from benchmarks.breakdown import peak_gib
from benchmarks.figures import View
from benchmarks.records import DIVERSITY, GOLD, HELDOUT, KL, PROXY, Run
from benchmarks.summary import (
    SLACK,
    Summary,
    explain_unit,
    level,
    mean_height,
    pair_differences,
    per_thousand_queries,
    ranked,
    show,
    show_interval,
    show_level,
)
from benchmarks.thresholds import show_times, times

Cells = tuple[list[str], list[list[str]]]
_COLUMNS = 4  # up to so many algorithms each have a column; more have a row each, best first


def table(view: View) -> Cells:
    """Header and rows of the results table; a column for each algorithm, or a row each where there are many."""
    summaries = view.summaries if len(view.summaries) <= _COLUMNS else ranked(view.summaries)
    ended, spent = _spent(view, summaries)
    rows = [*ended, *_changes(view, summaries), *_scalars(view, summaries), *spent]
    head = ["", *(s.algo for s in summaries)]
    if len(summaries) <= _COLUMNS:
        return head, rows
    turned = [list(column) for column in zip(head, *rows, strict=True)]
    turned[0][0] = "algorithm"
    return turned[0], turned[1:]


def _spent(view: View, summaries: Sequence[Summary]) -> tuple[list[list[str]], list[list[str]]]:
    """How the runs ended, and what they cost."""
    ended = [
        ["seeds", *(str(len(s.runs)) for s in summaries)],
        ["ended", *(s.status for s in summaries)],
    ]
    return ended, [
        [f"{view.device}-hours per run", *(f"{s.device_s / 3600:.4f}" for s in summaries)],
        ["updates", *(f"{s.costs['update']:.0f}" for s in summaries)],
        ["compared after update", *(_range(s.at) for s in summaries)],
        ["videos sampled", *(f"{s.costs['videos_sampled']:,.0f}" for s in summaries)],
        ["reward queries", *(f"{s.costs['reward_queries']:,.0f}" for s in summaries)],
        ["denoiser forward passes", *(f"{s.costs['denoiser_forwards']:,.0f}" for s in summaries)],
        ["denoiser backward passes", *(f"{s.costs['denoiser_backwards']:,.0f}" for s in summaries)],
    ]


def _changes(view: View, summaries: Sequence[Summary]) -> list[list[str]]:
    """Before, after and change of the reward, the gold score and the held-out rewards."""
    heldout = [name for name in view.names if name.startswith(HELDOUT)]
    words = {PROXY: "reward", GOLD: "gold score", **{name: f"held-out {name[len(HELDOUT) :]}" for name in heldout}}
    rows = []
    for name, word in words.items():
        changes = [s.changes.get(name) for s in summaries]
        trained = [change if s.measured else None for s, change in zip(summaries, changes, strict=True)]
        if not any(changes):
            continue
        if name in (PROXY, GOLD):
            rows.append([f"{word}, before", *(show(c.before) if c else "-" for c in changes)])
        rows += [
            [f"{word}, after", *(show(c.after) if c else "-" for c in trained)],
            [f"{word}, change", *(show_interval(c.difference, c.unit) if c else "-" for c in trained)],
        ]
    return rows


def _scalars(view: View, summaries: Sequence[Summary]) -> list[list[str]]:
    rows = []
    for name, word in ((DIVERSITY, "diversity, after"), (KL, "KL, after (nats)")):
        if name in view.names:
            rows.append([word, *(show_level(level(s, name)) if s.measured else "-" for s in summaries)])
    rows.append(["reward, mean over the cost", *(show_level(mean_height(s)) for s in summaries)])
    rows.append(["change per 1,000 reward queries", *(show_level(per_thousand_queries(s)) for s in summaries)])
    if view.threshold is not None:
        reached = [show_times(times(s.runs, view.threshold, scale=1 / 3600)) for s in summaries]
        rows.append([f"{view.device}-hours to {view.threshold.value:.3g}", *reached])
    peaks = [peak_gib(s.runs) for s in summaries]
    if any(peak is not None for peak in peaks):
        rows.append(["peak memory (GiB)", *("-" if peak is None else f"{peak:.2f}" for peak in peaks)])
    if any(run.alarms for run in view.runs):
        rows.append(["alarms", *(_alarms(s.runs) for s in summaries)])
    return rows


def _alarms(runs: Sequence[Run]) -> str:
    """Which alarms went off in training, and in how many rows."""
    names = ("alarm", "name", "kind")
    found = Counter(str(next((row[k] for k in names if row.get(k)), "alarm")) for run in runs for row in run.alarms)
    return ", ".join(f"{name} x{count}" for name, count in sorted(found.items())) or "none"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def table_note(view: View) -> str:
    """What the table's numbers are."""
    changes = [change for s in view.summaries if (change := s.changes.get(PROXY))]
    notes = dict.fromkeys(explain_unit(change.unit, change.difference) for change in changes)
    text = f"Rewards are those at {view.summaries[0].cost:.0f} device-seconds, up to which every algorithm was "
    text += "evaluated: of each run those of its last evaluation with a finite reward that had cost no more than "
    text += (
        f"{SLACK:g} times that, so up to {100 * (SLACK - 1):.0f} % more, because runs of one budget end a part of an "
    )
    text += "update apart; a run that failed before stays in at its last value. Change: after - before on the same "
    text += f"prompts and noise; {'; '.join(notes)}. Other brackets are 95 % intervals over seeds. Mean over the cost: "
    text += "area under the reward curve up to that cost, over that cost; a run that ended earlier, at "
    text += f"1/{SLACK:g} of it or later, counts up to its end."
    return text + (f" Threshold: {view.threshold.rule}." if view.threshold else "")


def matrix(view: View) -> Cells | None:
    """Paired differences of the reward, row - column, best algorithm first; None where there is nothing to pair.

    Only the half above the diagonal: the other one is its mirror. "-" where two algorithms share no seed or one was
    not evaluated; a missing score makes a difference "not measured", it is never averaged away.
    """
    order = ranked(view.summaries)
    found = pair_differences(order)
    if len(order) < 2 or not found:
        return None
    rows = [
        [a.algo, *("" if j <= i else _cell(found.get((a.algo, b.algo))) for j, b in enumerate(order) if j > 0)]
        for i, a in enumerate(order[:-1])
    ]  # fmt: skip
    return ["row - column", *(s.algo for s in order[1:])], rows


def _cell(found: tuple[Interval, str] | None) -> str:
    if found is None:
        return "-"
    interval, unit = found
    text = show_interval(interval, unit)
    return f"**{text}**" if interval.excludes_zero and unit == "runs" else text


def matrix_note(view: View) -> str:
    """What the matrix's numbers are."""
    units = {explain_unit(unit, i) for i, unit in pair_differences(view.summaries).values() if np.isfinite(i.centre)}
    return (
        "Differences of the reward after training at equal cost, paired over shared seeds, prompts and noise "
        f"({'; '.join(sorted(units)) or 'none measured'}). Bold: an interval over seeds excludes 0. Each is of its "
        "pair alone; with many pairs some exclude 0 by chance."
    )
