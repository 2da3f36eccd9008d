"""A paper's finding beside ours, as a section of a report: `write_report(root, [section(experiment, runs)])`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.judge import Outcome
from benchmarks.page import Block, Code, Facts, Section, Table, Text
from benchmarks.records import Run

_HEAD = ("claim", "our runs", "our values", "95 % interval over seeds", "seeds")
_KNOWN = {
    "numbers": "Numbers are the paper's.",
    "direction": "The direction only: the paper's numbers were not at hand.",
    "ours": "An expectation of this package, not of a paper.",
}
_NOTE = (
    "A claim's number is positive where our runs are as it says, paired over seeds. 'agrees': its interval lies above "
    "zero (for 'within': inside the margin); 'differs': below it (outside); otherwise nothing is decided."
)


def section(experiment: Experiment, runs: Sequence[Run]) -> Section:
    """An experiment's finding and what runs of its benchmark say about it.

    Args:
        experiment: whose claims are judged.
        runs: of its benchmark; those of other labels are left out.
    """
    verdict = experiment.judge(runs)
    place = ", ".join(part for part in (experiment.paper, experiment.place) if part)
    source = f"{place} (arXiv:{experiment.arxiv})" if experiment.arxiv else "this package"
    facts = [
        ("finding" if experiment.paper else "expectation", f"{experiment.finding} {_KNOWN[experiment.known]}"),
        ("source", source),
        ("our runs", verdict.word),
        ("deviation", experiment.deviation or "none"),
    ]
    table = Table(_HEAD, [_cells(outcome) for outcome in verdict.outcomes], wrap=True)
    blocks: list[Block] = [Facts(facts), table, Text(_NOTE, "note"), Code([experiment.command])]
    return Section(f"{experiment.name}: {verdict.word}", blocks)


def _cells(outcome: Outcome) -> list[str]:
    values = ", ".join(f"{label} {value:.4g}" for label, value in outcome.values.items())
    interval = outcome.interval
    if interval is None:
        shown = "-"
    elif np.isnan(interval.low):
        shown = f"{interval.centre:+.3g}"
    else:
        shown = f"{interval.centre:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"
    return [outcome.claim, outcome.word, values or "-", shown, outcome.note]
