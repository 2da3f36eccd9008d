"""The section of a report that pools several environments. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.page import Section, Table, Text
from benchmarks.pooled import pool
from benchmarks.summary import Summary, show, show_level
from benchmarks.tables import write_csv


def pooled_section(tasks: Mapping[str, Sequence[Summary]], root: Path) -> list[Section]:
    """Interquartile means and probabilities of improvement over environments; nothing with only one.

    Writes pooled.csv with the normalised scores of every run, from which everything in the section can be computed.
    """
    if len(tasks) < 2:
        return []
    found = pool(tasks)
    if found is None:
        text = "Not pooled: an algorithm must be evaluated, and one of them must gain, in every environment."
        return [Section("All environments", [Text(text)])]
    order = sorted(found.iqm, key=lambda algo: -found.iqm[algo].centre)
    rows = [
        [algo, str(found.iqm[algo].n), show_level(found.iqm[algo])]
        + [show_level(found.improvement[algo, other]) if other != algo else "" for other in order]
        for algo in order
    ]  # fmt: skip
    head = ["algorithm", "runs", "interquartile mean", *(f"P(above {other})" for other in order)]
    scales = "; ".join(
        f"{scale.env_id}: 0 is the untrained model's {show(scale.base)}, 1 the {show(scale.best)} of {scale.best_algo}"
        for scale in found.scales
    )
    note = (
        f"Rewards at each environment's common cost, normalised ({scales}). Interquartile mean over all runs with a 95 "
        "% stratified bootstrap over seeds (2,000 resamples), which covers less than 95 % with few seeds: about 84 % "
        "with 3, 90 % with 5, 92 % with 10; with fewer than 3 in an environment there is no interval. "
        "P(above): probability that a run of the row ends above one of the column, "
        "mean over environments. Source: Agarwal et al. 2021, arXiv:2108.13264. Numbers: pooled.csv."
    )
    scores = [
        {"algo": algo, "env_id": scale.env_id, "normalised_reward": float(value), "base": scale.base,
         "best": scale.best}
        for algo, parts in found.scores.items()
        for scale, part in zip(found.scales, parts, strict=True)
        for value in part
    ]  # fmt: skip
    write_csv(root / "pooled.csv", scores)
    return [Section("All environments", [Table(head, rows), Text(note, "note")])]
