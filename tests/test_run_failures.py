"""Runs that fail: numbers that are not finite, memory, disks. One clear error, and files that stay valid."""

from __future__ import annotations

import builtins
import errno
import io
import json
import math
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gaussian import ddpo_on, full_policy, gaussian_env
from safetensors import SafetensorError
from test_run import FakeAlgorithm, FakeEnv, rows

from algos import Evaluator, run
from algos.checkpoint import load_checkpoint
from algos.checkpoint_store import newest_checkpoint
from algos.run import OutOfMemoryError, RunFolderError
from benchmarks.memory_flat import growth, watch


def not_finite():
    raise FloatingPointError("the gradient norm is nan")


def test_updates_without_a_finite_gradient_are_skipped_and_counted(tmp_path, capsys):
    algorithm = FakeAlgorithm(hooks={2: not_finite})
    real = algorithm.update

    def update():
        try:
            return real()
        except FloatingPointError:
            algorithm.done += 1
            raise

    algorithm.update = update
    result = run(algorithm, out=tmp_path, updates=4, skip_nonfinite=1, progress=False)
    train = rows(tmp_path / "train.jsonl")
    assert result.updates == 4 and [row["skipped_updates"] for row in train] == [0, 1, 1, 1]
    assert [row["reward_mean"] is None for row in train] == [False, True, False, False]
    assert [row["videos_sampled"] for row in train] == [4, 8, 12, 16]  # it has cost what it has cost
    assert json.loads((tmp_path / "DONE").read_text())["skipped_updates"] == 1
    assert "update 2 is not finite and counted as skipped: the gradient norm is nan" in capsys.readouterr().err


def test_too_many_in_a_row_end_the_run(tmp_path):
    algorithm = FakeAlgorithm(hooks={2: not_finite})  # at every attempt: the fake's count stays
    with pytest.raises(FloatingPointError, match="3 updates in a row were not finite.*gradient norm is nan"):
        run(algorithm, out=tmp_path, updates=9, skip_nonfinite=2, checkpoint_every=1, progress=False)
    assert len(rows(tmp_path / "train.jsonl")) == 3
    assert load_checkpoint(newest_checkpoint(tmp_path))["skipped_in_row"] == 2
    with pytest.raises(FloatingPointError, match="^the gradient norm is nan$"):  # not asked for
        run(FakeAlgorithm(hooks={2: not_finite}), out=tmp_path / "b", updates=9, progress=False)


def test_a_loss_that_is_not_finite_counts_where_it_is_asked_for(tmp_path):
    rewards = [1.0, math.nan, 2.0, math.inf, math.nan, 3.0]
    with pytest.raises(FloatingPointError, match=r"2 updates in a row .* returned loss=nan"):
        run(FakeAlgorithm(rewards=rewards), out=tmp_path, updates=6, skip_nonfinite=1, progress=False)
    assert [row["skipped_updates"] for row in rows(tmp_path / "train.jsonl")] == [0, 1, 1, 2]
    assert run(FakeAlgorithm(rewards=rewards), out=tmp_path / "b", updates=6, progress=False).updates == 6


def test_a_skipped_update_leaves_the_weights_and_no_gradient(tmp_path):
    env = gaussian_env()
    policy = full_policy(env)
    (weight,) = policy.trainable_parameters()
    algorithm = ddpo_on(env, policy, updates_per_rollout=1, videos_per_rollout=16)
    before = weight.detach().clone()
    handle = weight.register_hook(lambda gradient: gradient * math.nan)
    run(algorithm, out=tmp_path, updates=1, skip_nonfinite=1, progress=False)
    handle.remove()
    assert torch.equal(weight, before) and weight.grad is None
    assert algorithm.update()["grad_norm"] > 0 and torch.isfinite(weight).all()


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", MEMORY, ids=["cuda", "cpu", "python"])
def test_out_of_memory_names_the_settings(tmp_path, error):
    def out_of_memory():
        raise error

    algorithm = FakeAlgorithm(hooks={2: out_of_memory})
    algorithm.config = SimpleNamespace(micro_batch=8)
    with pytest.raises(OutOfMemoryError) as raised:
        run(algorithm, out=tmp_path, updates=3, checkpoint_every=1, progress=False)
    told = str(raised.value)
    assert (
        "out of memory in update 2: lower micro_batch of the algorithm's config (8 now) or num_envs of the env" in told
    )
    assert "(3 now)" in told and raised.value.__cause__ is error
    assert "micro_batch" in json.loads((tmp_path / "FAILED").read_text())["reason"]
    assert load_checkpoint(newest_checkpoint(tmp_path))["update"] == 1


def test_out_of_memory_in_an_evaluation_and_other_errors(tmp_path):
    evaluator = Evaluator(FakeEnv(), [0])
    evaluator.evaluate = lambda policy: (_ for _ in ()).throw(MEMORY[0])
    with pytest.raises(OutOfMemoryError, match="in the evaluation after update 0: lower num_envs of the env"):
        run(FakeAlgorithm(), out=tmp_path / "a", updates=1, evaluate=evaluator, progress=False)
    with pytest.raises(RuntimeError, match="^shapes do not fit$") as raised:
        algorithm = FakeAlgorithm(hooks={1: lambda: (_ for _ in ()).throw(RuntimeError("shapes do not fit"))})
        run(algorithm, out=tmp_path / "b", updates=1, progress=False)
    assert not isinstance(raised.value, OutOfMemoryError)


class FullDisk:
    """A file on which only the first bytes of a write find room."""

    def __init__(self, file):
        self.file, self.left = file, 7

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        done = self.file.write(data[: self.left])
        # Without a buffer the system says how many bytes it took, and refuses only the next ones.
        if isinstance(self.file, io.BufferedWriter) or not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left = 0
        return done


@pytest.mark.parametrize("full", ["train.jsonl", "eval.jsonl", "npz", "state.json", "tensors", "run.json"])
def test_a_full_disk_is_one_clear_error_and_the_run_continues_when_there_is_room(tmp_path, monkeypatch, full):
    def options():
        evaluator = Evaluator(FakeEnv(), [0, 1], num_videos=1)
        return {"out": tmp_path, "updates": 4, "evaluate": evaluator, "eval_every": 2, "progress": False}

    def fill():
        """From now on the disk is full for this file."""
        opened, written, saved = Path.open, Path.write_text, import_module("algos.checkpoint").save_file

        def open_file(path, *given, **kinds):
            file = opened(path, *given, **kinds)
            return FullDisk(file) if full in path.name and "r" not in (given or "r")[0] else file

        def write_text(path, *given, **kinds):
            if full in path.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return written(path, *given, **kinds)

        def save(tensors, path):
            if full == "tensors":
                Path(path).write_bytes(b"half")
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            saved(tensors, path)

        broken.setattr(Path, "open", open_file)
        broken.setattr(Path, "write_text", write_text)
        broken.setattr(import_module("algos.checkpoint"), "save_file", save)

    with monkeypatch.context() as broken:
        if full == "run.json":
            fill()
        with pytest.raises(RunFolderError, match="No space left on device.*make room and go on with resume=True"):
            run(FakeAlgorithm(hooks={3: fill} if full != "run.json" else {}), **options())
    if full == "run.json":
        assert list(tmp_path.iterdir()) == []
    else:
        assert "No space left" in json.loads((tmp_path / "FAILED").read_text())["reason"]
        assert load_checkpoint(newest_checkpoint(tmp_path))["update"] == (4 if full in ("eval.jsonl", "npz") else 2)
    assert not [*tmp_path.rglob("*.part"), *tmp_path.rglob("*.new")]
    for name in ("train.jsonl", "eval.jsonl"):
        assert all(isinstance(row, dict) for row in (rows(tmp_path / name) if (tmp_path / name).exists() else []))
    assert run(FakeAlgorithm(), **options(), resume="auto").updates == 4
    assert [row["update"] for row in rows(tmp_path / "train.jsonl")] == [1, 2, 3, 4]
    assert sorted({row["update"] for row in rows(tmp_path / "eval.jsonl")}) == [0, 2, 4]


def test_a_read_only_folder_is_one_clear_error(tmp_path, monkeypatch):
    def read_only(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(RunFolderError, match="cannot write to .*: Permission denied.*make it writable") as raised:
        run(FakeAlgorithm(), out=tmp_path / "out", updates=1, progress=False)
    assert isinstance(raised.value, builtins.OSError) and isinstance(raised.value.__cause__, PermissionError)


def test_a_failure_that_cannot_even_be_noted_is_still_the_first_error(tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def crash():
        monkeypatch.setattr(import_module("algos.run_files"), "replace_file", full)
        raise RuntimeError("the first error")

    with pytest.raises(RuntimeError, match="the first error"):
        run(FakeAlgorithm(hooks={1: crash}), out=tmp_path, updates=1, progress=False)
    assert "FAILED could not be written" in capsys.readouterr().err


def test_memory_stays_flat_over_many_updates(tmp_path):
    """Two thousand times the log's row in memory would be seen: the limit is 2 %, as of the long version's."""
    evaluator = Evaluator(FakeEnv(), [0, 1], num_videos=1)
    readings = watch(FakeAlgorithm(), evaluator, 400, tmp_path)
    assert len(readings) == 400 and min(readings) > 2**20
    assert growth(readings) < 0.02
    assert growth([100] * 20 + [103] * 80) == pytest.approx(0.03) and growth([100] * 100) == 0
