"""Runs of several processes: one log, one set of checkpoints, and an end for all when one of them ends."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from killing import assert_same_run, rows, start
from spread import Spread, build, mistakes, run_case, run_sharded, sharded_mistakes

from algos.checkpoint_store import newest_checkpoint
from algos.distributed import _GRACE_S
from algos.meter import COUNTS

VALUES = {"reward_mean", "loss", "grad_norm", "value", *COUNTS}
PROMPTLY = 10 + _GRACE_S
"""seconds; a collective call would wait for hours"""


def same(a, b):
    """Two entries of a log, but for the order of sums; some are null in both."""
    return a == b or a == pytest.approx(b, rel=1e-6, abs=1e-9)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of a run in one process, and of the same in two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    together = Spread(two, run_case, "ddpo")
    start(build("ddpo", None), one / "run", algo="ddpo")
    codes, errors = together.wait()
    assert codes == [0, 0], errors
    return one / "run", two / "run"


def test_two_processes_write_one_log_and_it_says_what_one_process_would(whole):
    alone, together = (rows(folder / "train.jsonl") for folder in whole)
    assert len(alone) == len(together) == 5
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys() and all(a[name] == b[name] for name in COUNTS)
        assert all(same(a[name], b[name]) for name in a), (a, b)
    alone, together = (rows(folder / "eval.jsonl") for folder in whole)
    assert len(alone) == len(together)
    for a, b in zip(alone, together, strict=True):
        assert same(a["value"], b["value"]), (a, b)
    about = json.loads((whole[1] / "run.json").read_text())
    assert about["env"]["processes"] == 2 and about["env"]["num_envs"] == 4 and (whole[1] / "DONE").exists()


def test_cpu_seconds_are_those_of_both_processes(whole):
    last = json.loads((whole[1] / "train.jsonl").read_text().splitlines()[-1])
    assert last["device_s"] == last["cpu_s"] > 0
    parts = sum(last[name] for name in ("rollout_s", "decode_s", "reward_s", "update_s"))
    assert parts == pytest.approx(last["train_s"], abs=1e-3) and last["update_s"] > 0


def test_a_failure_in_one_process_ends_the_other_with_its_cause_and_the_run_can_be_continued(tmp_path, whole):
    broken = Spread(tmp_path, run_case, "ddpo", 1, 4, RuntimeError("the reward server is lost"))
    codes, errors = broken.wait()
    assert codes == [1, 1]
    assert errors[1] == "RuntimeError: the reward server is lost"
    assert errors[0] == "PeerError: process 1 of 2 has failed: RuntimeError: the reward server is lost"
    assert "process 1 of 2 has failed: RuntimeError: the reward" in (tmp_path / "run" / "FAILED").read_text()
    assert newest_checkpoint(tmp_path / "run").name == "000002"
    codes, errors = Spread(tmp_path, run_case, "ddpo").wait()
    assert codes == [0, 0], errors
    assert_same_run(whole[1], tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumes"][0]["update"] == 2


@pytest.mark.parametrize("rank", [1, 0])
def test_a_process_that_is_killed_ends_the_other_promptly(tmp_path, rank):
    """Process 0 also holds the store by which processes tell each other of failures."""
    together = Spread(tmp_path, run_case, "vader", rank, 2, signal.SIGKILL)
    codes, errors = together.wait()
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    assert errors[1 - rank] == f"PeerError: process {rank} of 2 is gone without a word: killed, or out of memory"
    assert together.seconds_between_ends() < PROMPTLY
    if rank == 1:
        assert "process 1 of 2 is gone" in (tmp_path / "run" / "FAILED").read_text()


def test_a_signal_to_one_process_ends_all_after_the_update_with_a_checkpoint(tmp_path, whole):
    codes, errors = Spread(tmp_path, run_case, "ddpo", 1, 3, signal.SIGTERM).wait()
    assert codes == [0, 0], errors
    assert [(tmp_path / f"ended_{rank}").read_text() for rank in (0, 1)] == ["interrupted"] * 2
    assert (tmp_path / "run" / "INTERRUPTED").exists() and newest_checkpoint(tmp_path / "run").name == "000003"
    codes, errors = Spread(tmp_path, run_case, "ddpo").wait()
    assert codes == [0, 0], errors
    assert_same_run(whole[1], tmp_path / "run")


def test_a_run_with_one_network_for_all_processes_is_the_same_run(tmp_path):
    """FSDP, with evaluations, checkpoints and costs."""
    codes, errors = Spread(tmp_path, run_sharded, "vader").wait()
    assert codes == [0, 0], errors
    (tmp_path / "plain").mkdir()
    codes, errors = Spread(tmp_path / "plain", run_case, "vader").wait()
    assert codes == [0, 0], errors
    for name in ("train.jsonl", "eval.jsonl"):
        found, plain = (rows(folder / "run" / name) for folder in (tmp_path, tmp_path / "plain"))
        assert len(found) == len(plain) > 4
        for a, b in zip(found, plain, strict=True):
            assert a.keys() == b.keys()
            assert all(same(a[key], b[key]) for key in VALUES & a.keys()), (a, b)


def test_what_processes_with_one_network_cannot_do_is_refused(tmp_path):
    codes, errors = Spread(tmp_path, sharded_mistakes).wait()
    assert codes == [0, 0], errors
    for rank in (0, 1):
        whole, uneven, calls = (tmp_path / f"said_{rank}").read_text().splitlines()
        assert "FSDP deals out frozen weights, and this policy trains all of them; give it a LoRA" in whole
        assert "3 videos or pairs cannot be dealt evenly to 2 processes" in uneven
        assert "different numbers of micro-batches of this update" in calls


def test_processes_that_would_not_train_together_are_refused(tmp_path):
    codes, errors = Spread(tmp_path, mistakes).wait()
    assert codes == [0, 0], errors
    for rank in (0, 1):
        weights, alone, arguments, env = (tmp_path / f"said_{rank}").read_text().splitlines()
        other = 1 - rank
        assert weights.startswith(f"RuntimeError: the weights of process {other} are not those of process {rank}")
        assert alone.startswith(f"RuntimeError: the weights of process {other} are not those of process {rank}")
        if rank == 1:
            assert "process 1 was given another run than process 0: budget_updates: 2 there, 3 given" in arguments
        else:
            assert "PeerError: process 1 of 2" in arguments
        assert "SimpleNamespace has no attribute 'shard', and 2 processes would all simulate the same" in env
    assert torch.distributed.is_initialized() is False
