"""The alarm for over-optimisation: the reward goes on rising while something it should stand for falls.

Both changes are paired over the fixed (prompt, noise seed) pairs of the evaluations, and both must be clearly off zero:
a mean over its standard error, as in a paired t-test. Everything is computed from the rows of `eval.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

ALARMS = "alarms.jsonl"
_GOLD = "gold"
_OTHERS = ("heldout/*", "diversity", "motion")
Scores = dict[tuple[int, int | None], float]


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """When the alarm goes off, and what happens then."""

    watch: tuple[str, ...] | None = None
    """measures of the evaluations, * for any text; None: gold, held-out rewards, diversity and motion, but not gold if
    `stop`: a gold score that ends training has been optimised"""
    patience: int = 2
    """so many evaluations in a row must show it, at least 1"""
    z: float = 3.0
    """both changes must be so many standard errors off zero, > 0; 3 and not 2, because many are looked at"""
    stop: bool = False
    """end the run, with "over-optimisation" as its reason"""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1 evaluation, got {self.patience}")
        if self.z <= 0:
            raise ValueError(f"z must be a positive number of standard errors, got {self.z}")

    @property
    def watched(self) -> tuple[str, ...]:
        """Names that are watched, with their *."""
        if self.watch is not None:
            return self.watch
        return _OTHERS if self.stop else (_GOLD, *_OTHERS)


def alarms(rows: Sequence[Mapping[str, Any]], alarm: Alarm, *, proxy: str = "proxy") -> list[dict[str, Any]]:
    """Every alarm that went off, once for each measure, in the order of the evaluations.

    At each evaluation a measure is compared with the one before at which its mean was highest: the alarm goes off where
    since then the optimised reward has clearly risen and the measure clearly fallen, `patience` times in a row.

    Args:
        rows: of `eval.jsonl`, of one split.
        alarm: what is watched.
        proxy: name of the optimised reward.

    Returns:
        Dicts with update, device_s, alarm (the measure), since_update, proxy_change, watched_change: mean paired
        changes since that evaluation.
    """
    scores: dict[str, dict[int, Scores]] = {}
    device_s: dict[int, Any] = {}
    for row in rows:
        device_s[row["update"]] = row.get("device_s")
        if row["value"] is not None:
            pairs = scores.setdefault(row["reward"], {}).setdefault(row["update"], {})
            pairs[row["prompt_id"], row["noise_seed"]] = row["value"]
    reward = scores.get(proxy, {})
    found = []
    for name, of_name in scores.items():
        if name == proxy or not any(fnmatchcase(name, pattern) for pattern in alarm.watched):
            continue
        updates = sorted(of_name.keys() & reward.keys())
        in_a_row = 0
        for place, update in enumerate(updates[1:], 1):
            since = max(updates[:place], key=lambda earlier: float(np.mean(list(of_name[earlier].values()))))
            risen, up = _change(reward[since], reward[update])
            fallen, down = _change(of_name[since], of_name[update])
            in_a_row = in_a_row + 1 if up > alarm.z and down < -alarm.z else 0
            if in_a_row == alarm.patience:
                found.append(
                    {
                        "update": update,
                        "device_s": device_s[update],
                        "alarm": name,
                        "since_update": since,
                        "proxy_change": round(risen, 6),
                        "watched_change": round(fallen, 6),
                    }
                )
                break
    return sorted(found, key=lambda one: one["update"])


def _change(before: Scores, after: Scores) -> tuple[float, float]:
    """Mean paired change and its number of standard errors; 0 where fewer than three pairs are in both."""
    change = np.array([after[pair] - before[pair] for pair in before if pair in after])
    if len(change) < 3:
        return 0.0, 0.0
    error = float(change.std(ddof=1)) / len(change) ** 0.5
    mean = float(change.mean())
    return mean, mean / error if error else float(np.sign(mean)) * float("inf") if mean else 0.0


def message(found: Mapping[str, Any]) -> str:
    """An alarm in one line."""
    return (
        f"ALARM over-optimisation at update {found['update']}: since update {found['since_update']} the reward rose by "
        f"{found['proxy_change']:.3g} while {found['alarm']} fell by {-found['watched_change']:.3g}"
    )
