"""What a blind study of two runs is made of: its pairs of videos, their order, the file of votes, and the result.

Needs numpy and scipy only, no torch.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from benchmarks.aggregate import Interval
from benchmarks.records import Run

Choice = Literal["left", "right", "tie"]
CHOICES: tuple[Choice, ...] = ("left", "right", "tie")
SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class Pair:
    """Two videos of one prompt from the same noise, uint8 [F,H,W,3]."""

    prompt_id: int
    noise_seed: int
    prompt: str
    video_a: np.ndarray
    video_b: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """One choice: the pair, who chose, which run stood left, and what was chosen."""

    prompt_id: int
    noise_seed: int
    rater: str
    left: Literal["a", "b"]
    choice: Choice

    @property
    def score_b(self) -> float:
        """1 if B was chosen, 0 if A, 1/2 for no difference."""
        if self.choice == "tie":
            return 0.5
        return float((self.choice == "left") == (self.left == "b"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """How often B was preferred to A over `pairs` of videos; ties count one half."""

    prefers_b: Interval
    wins_a: int
    wins_b: int
    ties: int
    raters: int

    def __str__(self) -> str:
        votes = self.wins_a + self.wins_b + self.ties
        if not votes:
            return "no votes yet"
        share = self.prefers_b
        return (
            f"B preferred in {100 * share.centre:.0f} % (95 % interval {100 * share.low:.0f} to {100 * share.high:.0f} "
            f"%, {share.n} pairs); {votes} votes of {self.raters} {'person' if self.raters == 1 else 'people'}: "
            f"A {self.wins_a}, B {self.wins_b}, no difference {self.ties}"
        )


def last_update_with_samples(run: Run) -> int:
    """The latest evaluation whose videos were kept.

    Raises:
        ValueError: none were.
    """
    kept = [update for update in run.updates() if (run.folder / "samples" / f"eval_{update:06d}.npz").exists()]
    if not kept:
        raise ValueError(f"{run.folder} has kept no videos (samples/eval_*.npz): give a run with evaluations")
    return kept[-1]


def pairs_of(run_a: Run, update_a: int, run_b: Run, update_b: int) -> list[Pair]:
    """The videos that both runs made of the same prompt and noise seed, by these.

    Raises:
        ValueError: no videos of that update, no common prompt and noise, prompts of one number that differ, videos of
            different sizes, or one run and update against itself.
    """
    if run_a.folder.resolve() == run_b.folder.resolve() and update_a == update_b:
        raise ValueError(f"both sides are update {update_a} of {run_a.folder}: choose another run or another update")
    kept = []
    for run, update in ((run_a, update_a), (run_b, update_b)):
        samples = run.samples(update)
        if samples is None:
            raise ValueError(f"{run.folder} has no videos of update {update}; its evaluations are {run.updates()}")
        videos, keys, prompts = samples
        kept.append({key: (video, prompt) for key, video, prompt in zip(keys, videos, prompts, strict=True)})
    common = sorted(set(kept[0]) & set(kept[1]))
    if not common:
        raise ValueError(
            f"{run_a.folder} and {run_b.folder} kept no video of the same prompt and noise seed: compare runs with the "
            "same evaluation prompts"
        )
    pairs = []
    for key in common:
        (video_a, prompt_a), (video_b, prompt_b) = kept[0][key], kept[1][key]
        if prompt_a != prompt_b or video_a.shape != video_b.shape:
            raise ValueError(
                f"prompt {key[0]} is {prompt_a!r} with videos {list(video_a.shape)} in {run_a.folder}, and "
                f"{prompt_b!r} with {list(video_b.shape)} in {run_b.folder}: compare runs of one task"
            )
        pairs.append(Pair(*key, prompt_a, video_a, video_b))
    return pairs


def order(num_pairs: int, seed: int, rater: str) -> list[tuple[int, bool]]:
    """The pairs in random order, and whether B stands left: as often as A, give or take one. Fixed by its arguments."""
    draw = np.random.default_rng([seed, zlib.crc32(rater.encode())])
    b_left = draw.permutation([i % 2 == 0 for i in range(num_pairs)])
    return [(int(index), bool(left)) for index, left in zip(draw.permutation(num_pairs), b_left, strict=True)]


class VoteFile:
    """Votes in a JSONL file, each written to the disk before `add` returns; a kill loses at most the one being made.

    The first line says which study the votes belong to. One process at a time may write.

    Args:
        path: made if it does not exist.
        about: what identifies the study.

    Raises:
        ValueError: the file is of another study, or a line inside it is broken.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend_end(path)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        head = {"schema_version": SCHEMA_VERSION, **about}
        self.votes: list[Vote] = []
        if not lines:
            self._write(head)
            return
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is broken: {error}; mend or remove it") from None
        if rows[0] != json.loads(json.dumps(head)):
            different = sorted(k for k in {*head, *rows[0]} if head.get(k) != rows[0].get(k))
            raise ValueError(
                f"{path} holds votes of another study ({', '.join(different)} differ): choose another --out"
            )
        try:
            self.votes = [Vote(**row) for row in rows[1:]]
        except TypeError as error:
            raise ValueError(f"{path} holds a line that is no vote: {error}") from None

    def add(self, vote: Vote) -> None:
        """Appends one vote and waits until it is on the disk."""
        self._write({name: getattr(vote, name) for name in Vote.__dataclass_fields__})
        self.votes.append(vote)

    def latest(self) -> list[Vote]:
        """The last vote of each person on each pair: voting again corrects a vote."""
        return list({(vote.rater, vote.prompt_id, vote.noise_seed): vote for vote in self.votes}.values())

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _mend_end(path: Path) -> None:
    """Cuts off a last line without its end: a vote that was being written when the process was killed."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def result(votes: Sequence[Vote]) -> Result:
    """Who was preferred. Of `VoteFile.latest`; the unit is the pair, several people's votes on it are averaged first.

    Wilson's interval (1927) of 95 %, n the number of pairs; with ties or averages, which vary less than a coin, it is
    wider than needed.
    """
    by_pair: dict[tuple[int, int], list[float]] = {}
    for vote in votes:
        by_pair.setdefault((vote.prompt_id, vote.noise_seed), []).append(vote.score_b)
    scores = [vote.score_b for vote in votes]
    return Result(
        prefers_b=wilson([float(np.mean(found)) for found in by_pair.values()]),
        wins_a=scores.count(0.0),
        wins_b=scores.count(1.0),
        ties=scores.count(0.5),
        raters=len({vote.rater for vote in votes}),
    )


def wilson(shares: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of n values in [0,1] with Wilson's interval for a proportion; NaN for none."""
    n = len(shares)
    if not n:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    p, z = float(np.mean(shares)), float(stats.norm.ppf(0.5 + confidence / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half), n)
