"""The checkpoints of a run: `<run>/checkpoints/<update>/`, of which the last ones and the best one are kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algos.checkpoint import DamagedCheckpointError, load_checkpoint, save_checkpoint, verify
from algos.run_files import replace_json

FOLDER, BEST = "checkpoints", "best.json"


def checkpoints(run: str | Path) -> dict[int, Path]:
    """The checkpoints in a run's folder by update, oldest first; complete or not is not looked at."""
    found = {int(path.name): path for path in (Path(run) / FOLDER).glob("*") if path.name.isdecimal()}
    return dict(sorted(found.items()))


def newest_checkpoint(run: str | Path) -> Path:
    """The last checkpoint of a run; its `policy` folder is for `policy.load`.

    Raises:
        FileNotFoundError: the run has none.
    """
    found = checkpoints(run)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {Path(run) / FOLDER}: the run was stopped before its first one")
    return list(found.values())[-1]


def best_checkpoint(run: str | Path) -> Path:
    """The checkpoint with the highest mean reward in an evaluation; its `policy` folder is for `policy.load`.

    Raises:
        FileNotFoundError: no checkpoint was evaluated.
        ValueError: the file that names it is damaged, or names one that is not there.
    """
    path = Path(run) / FOLDER / BEST
    if not path.exists():
        raise FileNotFoundError(f"no {BEST} in {path.parent}: the run has no evaluated checkpoint; take the newest one")
    try:
        update = int(json.loads(path.read_text(encoding="utf-8"))["update"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); take --checkpoint newest") from error
    found = checkpoints(run)
    if update not in found:
        raise ValueError(f"{path} names update {update} whose checkpoint is not there; take --checkpoint newest")
    return found[update]


def chosen_checkpoint(run: str | Path, which: str | int = "newest") -> tuple[Path, list[str]]:
    """A checkpoint of a run whose files are the ones that were written.

    Args:
        run: the run's folder.
        which: "newest" passes over damaged ones; "best" and the number of an update mean one, which must be intact.

    Returns:
        Its folder, and what is wrong with newer ones that were passed over.

    Raises:
        FileNotFoundError: the run has no checkpoint, or no best one.
        ValueError: see `best_checkpoint`, or the run has no checkpoint of this update.
        DamagedCheckpointError: it is damaged, or none is intact.
    """
    found, damaged = checkpoints(run), list[str]()
    if which == "newest":
        newest_checkpoint(run)  # says why there is none
        for path in reversed(found.values()):
            try:
                verify(path)
                return path, damaged
            except DamagedCheckpointError as error:
                damaged.append(str(error))
        raise DamagedCheckpointError(f"{run} has no intact checkpoint: {'; '.join(damaged)}")
    if which != "best" and which not in found:
        raise ValueError(f"{run} has no checkpoint of update {which}; it has those of {_listed(found)}")
    path = best_checkpoint(run) if which == "best" else found[int(which)]
    try:
        verify(path)
    except DamagedCheckpointError as error:
        intact = [number for number, other in found.items() if _intact(other)]
        raise DamagedCheckpointError(f"{error}; intact are the checkpoints of {_listed(intact)}") from None
    return path, damaged


def _intact(path: Path) -> bool:
    try:
        verify(path)
    except DamagedCheckpointError:
        return False
    return True


def _listed(updates: Iterable[int]) -> str:
    numbers = list(map(str, updates))
    return f"update {', '.join(numbers)}" if numbers else "no update"


@dataclass(kw_only=True)
class CheckpointStore:
    """Saves, finds and removes the checkpoints of one run."""

    run: Path
    """the run's folder"""
    keep: int
    """latest checkpoints that are kept, beside the best one"""
    best_update: int | None = None
    """whose checkpoint had the highest evaluation reward so far"""
    best_reward: float = -math.inf

    def save(self, update: int, state: Mapping[str, Any], policy: Any) -> None:
        """Writes the checkpoint of an update, then removes those that are kept no longer."""
        save_checkpoint(self.run / FOLDER / f"{update:06d}", {**state, "best": self._best()}, policy)
        self._remove_old()

    def is_best(self, reward: float) -> bool:
        """Whether an evaluation reward is finite and higher than any before."""
        return math.isfinite(reward) and reward > self.best_reward

    def mark_best(self, update: int, reward: float) -> None:
        """Notes that the checkpoint of an update, which is there, is the best so far."""
        self.best_update, self.best_reward = update, reward
        replace_json(self.run / FOLDER / BEST, {"update": update, "reward": reward})
        self._remove_old()

    def find(self) -> tuple[Path, dict[str, Any], list[str]] | None:
        """The newest intact checkpoint.

        Returns:
            Its folder, its state and what is wrong with newer ones; None where there is no checkpoint at all.

        Raises:
            DamagedCheckpointError: there are some, and all are damaged.
        """
        damaged: list[str] = []
        for path in reversed(checkpoints(self.run).values()):
            try:
                return path, load_checkpoint(path), damaged
            except DamagedCheckpointError as error:
                damaged.append(str(error))
        if damaged:
            raise DamagedCheckpointError(
                f"{self.run} cannot be resumed, none of its checkpoints is intact: {'; '.join(damaged)}. "
                "Begin it anew with fresh=True, or in another folder"
            )
        return None

    def go_back(self, update: int, best: Mapping[str, Any] | None) -> None:
        """Removes what lies after an update, half-written checkpoints included, and takes the best one of that time."""
        for number, path in checkpoints(self.run).items():
            if number > update:
                shutil.rmtree(path)
        for path in [*(self.run / FOLDER).glob("*.new"), *(self.run / FOLDER).glob("*.old")]:
            shutil.rmtree(path)
        if best is not None and int(best["update"]) in checkpoints(self.run):
            self.mark_best(int(best["update"]), float(best["reward"]))
        else:
            (self.run / FOLDER / BEST).unlink(missing_ok=True)

    def _best(self) -> dict[str, Any] | None:
        return None if self.best_update is None else {"update": self.best_update, "reward": self.best_reward}

    def _remove_old(self) -> None:
        found = checkpoints(self.run)
        kept = {*list(found)[-self.keep :], self.best_update}
        for number, path in found.items():
            if number not in kept:
                shutil.rmtree(path)
