"""A run that was killed and continued is, bit for bit, the run that never stopped."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gaussian import full_policy, gaussian_env
from killing import UPDATES, Fuse, Killed, assert_same_run, build, rows, start
from test_run import FakeAlgorithm, break_file

import algos
from algos.checkpoint import DamagedCheckpointError
from algos.checkpoint_store import checkpoints, newest_checkpoint
from algos.preference_sampling import build_preferences
from algos.run import run
from benchmarks.kill_and_resume import compare

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def fuse(monkeypatch):
    return Fuse(monkeypatch)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """Complete data for those that learn from files; VideoDPO finds them and need not make any."""
    env = gaussian_env(num_envs=16, num_steps=3, group_size=1)
    folder = tmp_path_factory.mktemp("preferences")
    build_preferences(folder, env, full_policy(env), groups=4, candidates=4)
    return folder


def run_until_done(name, out, fuse, preferences, kills):
    """Runs an algorithm, killed at these counts of the fuse one after the other, until it is done."""
    for at in [*kills, None]:
        fuse.count, fuse.at = 0, at
        algorithm = build(name, preferences)
        fuse.count = 0
        try:
            result = start(algorithm, out)
        except Killed:
            assert not (out / "DONE").exists()
        else:
            assert result.updates == UPDATES and (out / "DONE").exists()
    return fuse.count


@pytest.mark.parametrize("name", algos.ZOO)
def test_an_algorithm_that_was_killed_ends_as_if_it_had_not_been(name, tmp_path, fuse, preferences):
    total = run_until_done(name, tmp_path / "whole", fuse, preferences, [])
    draw = random.Random(name)
    # The second kill may come after the end of what is left to do, and then there is none.
    kills = [draw.randint(total // 2, total), draw.randint(1, total // 2)]
    run_until_done(name, tmp_path / "killed", fuse, preferences, kills)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert len(json.loads((tmp_path / "killed" / "run.json").read_text())["resumes"]) >= 1


class Counting(FakeAlgorithm):
    """`FakeAlgorithm` whose metrics follow a generator of its own and the global one of torch."""

    def update(self):
        metrics = super().update()
        return {**metrics, "drawn": float(torch.rand(1, generator=self.generator) + torch.rand(1))}

    def state_dict(self):
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])


def counting():
    algorithm = Counting()
    algorithm.generator = torch.Generator().manual_seed(0)
    return algorithm


def test_every_single_file_operation_may_be_the_last(tmp_path, fuse):
    def go(out, at):
        fuse.count, fuse.at = 0, at
        with torch.random.fork_rng():
            torch.manual_seed(3)
            start(counting(), out, updates=4)

    go(tmp_path / "whole", None)
    total = fuse.count
    drawn = [row["drawn"] for row in rows(tmp_path / "whole" / "train.jsonl")]
    assert total > 20 and len(set(drawn)) == 4
    for at in range(1, total + 1):
        out = tmp_path / str(at)
        with pytest.raises(Killed):
            go(out, at)
        go(out, None)
        assert compare(tmp_path / "whole", out) == [], at
        assert json.loads((out / "DONE").read_text())["videos_sampled"] == 16, at
        assert not [*out.rglob("*.part"), *out.rglob("*.new")], at


def test_the_comparison_of_kill_and_resume_sees_what_differs(tmp_path):
    folders = {}
    for name, changes in {"a": {}, "b": {}, "c": {"hooks": {2: lambda: torch.rand(1)}}, "d": {"done": 1}}.items():
        folders[name] = tmp_path / name
        algorithm = counting()
        vars(algorithm).update(changes)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            start(algorithm, folders[name])
    assert compare(folders["a"], folders["b"]) == []
    assert compare(folders["a"], folders["c"]) == ["train.jsonl"]
    assert "state of the algorithm" in compare(folders["a"], folders["d"])
    weights = newest_checkpoint(folders["b"]) / "policy" / "adapter.txt"
    weights.write_text("1.7500001")
    with pytest.raises(DamagedCheckpointError):
        compare(folders["a"], folders["b"])


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from killing import build, start
start(build("ddpo", None), Path(sys.argv[2]), updates=int(sys.argv[3]))
"""


def test_a_process_that_was_killed_by_the_system_is_continued_by_another(tmp_path):
    out, updates = tmp_path / "killed", 14
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    threads = torch.get_num_threads()
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(threads)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(ROOT / "tests"), str(out), str(updates)],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + 120
    while child.poll() is None and len(checkpoints(out)) < 2:
        assert time.monotonic() < until
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (out / "DONE").exists()
    start(build("ddpo", None), out, updates=updates)
    start(build("ddpo", None), tmp_path / "whole", updates=updates)
    assert_same_run(tmp_path / "whole", out)


def stopped(out, at=3, updates=6, **options):
    """A run of six updates that failed in the update after this one."""

    def crash():
        raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        run(
            FakeAlgorithm(hooks={at + 1: crash}),
            out=out,
            updates=updates,
            checkpoint_every=1,
            progress=False,
            **options,
        )


def test_costs_continue_and_lost_work_is_counted_once(tmp_path):
    stopped(tmp_path, at=3)
    failed = json.loads((tmp_path / "FAILED").read_text())
    assert failed["videos_sampled"] == 16  # the update that failed has cost something too
    result = run(FakeAlgorithm(), out=tmp_path, updates=6, checkpoint_every=1, resume=True, progress=False)
    assert (result.resumed_from, result.updates) == (3, 6) and not (tmp_path / "FAILED").exists()
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["videos_sampled"] for row in train] == [4, 8, 12, 16, 20, 24]
    assert all(later["wall_s"] >= row["wall_s"] for row, later in zip(train, train[1:], strict=False))
    (entry,) = json.loads((tmp_path / "run.json").read_text())["resumes"]
    assert (entry["update"], entry["updates_redone"]) == (3, 0) and {"git_commit", "started_utc"} <= set(entry)


def test_a_finished_run_is_reported_and_left_alone(tmp_path, capsys):
    algorithm = build("ddpo", None)
    first = start(algorithm, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = start(build("ddpo", None), tmp_path)
    assert f"{tmp_path} is done: {UPDATES} updates" in capsys.readouterr().out
    assert (again.ended, again.updates, again.resumed_from) == ("updates", UPDATES, UPDATES)
    assert again.scores == pytest.approx(first.scores) and list(again.scores) == list(first.scores)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_cannot_be_continued_is_refused_and_left_alone(tmp_path):
    with pytest.raises(ValueError, match="there is no run in"):
        run(FakeAlgorithm(), out=tmp_path / "none", updates=1, resume=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="one of the two"):
        run(FakeAlgorithm(), out=tmp_path, updates=1, resume=True, fresh=True)
    with pytest.raises(ValueError, match="expected True, False or 'auto'"):
        run(FakeAlgorithm(), out=tmp_path, updates=1, resume="yes")
    out = tmp_path / "run"
    stopped(out, task={"env_id": "A", "command": "one"})
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = FakeAlgorithm()
    object.__setattr__(other, "config", type(other.config)(learning_rate=0.2))
    with pytest.raises(ValueError) as refused:
        run(other, out=out, updates=7, seed=1, task={"env_id": "B", "command": "two"}, resume=True)
    told = str(refused.value)
    for part in (
        "config.learning_rate: 0.1 there, 0.2 given",
        "seed: 0 there, 1 given",
        "task.env_id: 'A' there, 'B' given",
        "budget_updates: 6 there, 7 given",
    ):
        assert part in told
    assert "command" not in told and "fresh=True" in told
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    run(FakeAlgorithm(), out=out, updates=6, task={"env_id": "A", "command": "two"}, resume=True, progress=False)


def test_a_policy_that_cannot_be_read_back_is_refused(tmp_path):
    stopped(tmp_path)
    bare = FakeAlgorithm()
    bare.policy = type("Bare", (), {"value": 0.5, "save": lambda self, folder: None})()
    with pytest.raises(TypeError, match=r"Bare has no load\(folder\)"):
        run(bare, out=tmp_path, updates=6, resume=True)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors", "policy/adapter.txt", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, name):
    stopped(tmp_path, at=4)
    assert list(checkpoints(tmp_path)) == [3, 4]
    break_file(newest_checkpoint(tmp_path) / name, "cut")
    result = run(FakeAlgorithm(), out=tmp_path, updates=6, resume=True, progress=False)
    told = capsys.readouterr().err
    assert re.search(rf"checkpoint \S+000004 is damaged: {re.escape(name)}", told)
    assert "taking the one of update 3 instead" in told and result.resumed_from == 3
    assert [row["update"] for row in rows(tmp_path / "train.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_run_without_any_intact_checkpoint_is_not_continued(tmp_path):
    stopped(tmp_path, at=4)
    for path in checkpoints(tmp_path).values():
        break_file(path / "state.json", "one bit")
    with pytest.raises(DamagedCheckpointError, match=r"000004 .*000003 .*fresh=True"):
        run(FakeAlgorithm(), out=tmp_path, updates=6, resume="auto", progress=False)
    assert (tmp_path / "FAILED").exists() and len(rows(tmp_path / "train.jsonl")) == 4
    run(FakeAlgorithm(), out=tmp_path, updates=6, fresh=True, progress=False)


def test_a_log_that_does_not_reach_to_the_checkpoint_is_not_continued(tmp_path):
    stopped(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="does not hold the rows 1 to 3"):
        run(FakeAlgorithm(), out=tmp_path, updates=6, resume=True, progress=False)
    (tmp_path / "train.jsonl").write_text("{broken\n" + "".join(lines[1:]))
    with pytest.raises(ValueError, match="train.jsonl is damaged"):
        run(FakeAlgorithm(), out=tmp_path, updates=6, resume=True, progress=False)


def test_one_process_at_a_time(tmp_path):
    def second():
        with pytest.raises(ValueError, match="another process is running in"):
            run(FakeAlgorithm(), out=tmp_path, updates=3, resume="auto", progress=False)

    assert run(FakeAlgorithm(hooks={2: second}), out=tmp_path, updates=3, progress=False).updates == 3


def test_files_of_somebody_else_are_not_taken_for_a_run(tmp_path):
    (tmp_path / "train.jsonl").write_text("mine\n")
    for options in ({}, {"fresh": True}, {"resume": "auto"}):
        with pytest.raises(ValueError, match="train.jsonl but no run.json"):
            run(FakeAlgorithm(), out=tmp_path, updates=1, **options)
    assert (tmp_path / "train.jsonl").read_text() == "mine\n"
