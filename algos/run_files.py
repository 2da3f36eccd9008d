"""The files of a run's folder: rows appended whole or not at all, JSON replaced in one step, one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from algos.checkpoint import sync

ENDINGS = ("DONE", "INTERRUPTED", "FAILED")
LOGS = ("train.jsonl", "eval.jsonl", "alarms.jsonl")
TENSORBOARD, WANDB, WANDB_STATE = "tensorboard", "wandb", "wandb.json"  # of `algos.watchers`
OWN = (*ENDINGS, "checkpoints", "samples", TENSORBOARD, WANDB, WANDB_STATE, *LOGS, "run.json")
"""Everything of a run, in the order in which it is removed: `run.json` last, because a run that lost its checkpoints in
a crash before begins anew when it is resumed, and files without `run.json` are nobody's."""
# What must agree for a run to be continued. Of the task, what only describes the run may change.
_SAME = (
    "algo", "config", "task", "seed", "env", "budget_device_s", "budget_updates", "eval_every", "dtype", "stops_at",
    "num_gpus_reward",
)  # fmt: skip
_TOLD = ("task.command", "task.question", "task.limits")


class RunFolderError(OSError):
    """A run's folder cannot be written: the disk is full, or the folder is read-only; what it holds is valid."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns whatever the system says about a write inside into one clear error.

    Raises:
        RunFolderError: in the place of an OSError, also of one inside safetensors.
    """
    try:
        yield
    except RunFolderError:
        raise
    except (OSError, SafetensorError) as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, SafetensorError) and told is None:
            raise
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        why = os.strerror(number) if number else str(error)
        way_out = "make room" if number in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
        raise RunFolderError(
            f"cannot write to {folder}: {why}. What it holds is valid: {way_out} and go on with resume=True, "
            "or choose another folder"
        ) from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a folder for this process, until its end however it ends.

    Raises:
        ValueError: another process is at work in it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is running in {folder}: wait for its end, stop it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # a file system without locks
                raise
        yield
    finally:
        os.close(handle)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file so that there is the old or the new one at any time, after a crash of the machine too."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except Exception:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """`replace_file` with JSON."""
    replace_file(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """What `replace_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def rows_as_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as lines of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds lines of JSON; where the disk is full, none of them."""
    data = rows_as_bytes(rows)
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            done = 0
            while done < len(data):
                done += file.write(data[done:])
        except OSError:
            file.truncate(before)
            raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; one at the end that was not finished is left out.

    Raises:
        ValueError: a line before the last one is broken.
    """
    if not path.exists():
        return []
    # After the last newline there is nothing, or a line that was broken off.
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; begin the run anew with fresh=True") from None


def go_back(folder: Path, update: int, evaluated_at: int) -> int:
    """Takes the logs and videos back to where a checkpoint was taken.

    Args:
        folder: of the run.
        update: the checkpoint's; later rows of train.jsonl go.
        evaluated_at: update of the last evaluation before the checkpoint, -1: none; later rows of eval.jsonl and
            alarms.jsonl go.

    Returns:
        How many updates were in the log and will be done again.

    Raises:
        ValueError: the log does not reach to the checkpoint, or is damaged; nothing was changed.
    """
    train, evals, alarms = (read_rows(folder / name) for name in LOGS)
    kept = [row for row in train if row["update"] <= update]
    if [row["update"] for row in kept] != list(range(1, update + 1)):
        raise ValueError(
            f"{folder / LOGS[0]} does not hold the rows 1 to {update} that its checkpoint was taken after: "
            "put the file back, or begin the run anew with fresh=True"
        )
    before = ([row for row in rows if row["update"] <= evaluated_at] for rows in (evals, alarms))
    for name, rows in zip(LOGS, (kept, *before), strict=True):
        if (folder / name).exists():
            replace_file(folder / name, rows_as_bytes(rows))
    for path in (folder / "samples").glob("eval_*"):
        number = path.stem.removeprefix("eval_")
        if path.suffix not in ("", ".npz") or not number.isdecimal() or int(number) > evaluated_at:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in folder.glob("*.part"):
        path.unlink()
    return len(train) - len(kept)


def sync_logs(folder: Path) -> None:
    """Puts the logs on the disk: a checkpoint must not be there without the rows before it."""
    for name in LOGS:
        if (folder / name).exists():
            sync(folder / name)


def remove_run(folder: Path) -> None:
    """Removes an earlier run's own files and no others."""
    if not (folder / "run.json").exists():
        return
    for name in OWN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In what two `run.json` are different runs: "config.learning_rate: 0.1 there, 0.2 given".

    What is not there counts as None, which is what an optional field is that an older `run.json` does not know.
    """
    there, given = (_flat({name: about.get(name) for name in _SAME}) for about in (old, new))
    keys = [key for key in {**there, **given} if key not in _TOLD]
    return [
        f"{key}: {there.get(key, 'absent')!r} there, {given.get(key, 'absent')!r} given"
        for key in keys
        if there.get(key) != given.get(key)
    ]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, tuples as lists, as JSON returns them."""
    if not isinstance(tree, Mapping):
        return {path: json.loads(json.dumps(tree))}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{path}.{key}" if path else str(key))
    return found
