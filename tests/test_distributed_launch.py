"""`vdm-env train` as README starts it on several devices, here on the CPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from algos.progress import Stop
from benchmarks.cli import main

SMALL = "--env MovingShapes-HPS --algo ddpo --updates 1 --num-envs 8 --num-steps 2 --set videos_per_rollout=16"
EVALUATION = "--eval-prompts 1 --eval-seeds 1 --num-threads 1"


def test_one_command_in_two_processes_makes_one_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = f"--multi_gpu --num_processes 2 --num_machines 1 --main_process_port {port}"
    launch += " --mixed_precision no --dynamo_backend no --module benchmarks.cli"
    words = f"{launch} train {SMALL} {EVALUATION} --out".split()
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("update 1  1/1 updates") == 1 and done.stdout.count("done (updates)") == 1
    folder = tmp_path / "ddpo" / "MovingShapes-HPS" / "seed_0"
    row = json.loads((folder / "train.jsonl").read_text())
    assert row["videos_sampled"] == row["reward_queries"] == 16
    about = json.loads((folder / "run.json").read_text())
    assert about["env"]["num_envs"] == 8 and about["env"]["processes"] == 2
    assert (folder / "DONE").exists() and (folder / "config.yaml").exists()


def test_half_a_launch_environment_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stopped:
        main([*f"train {SMALL} {EVALUATION} --out".split(), str(tmp_path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vdm-env train: RANK=0 is set, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("launched", "counted"), [(True, 1), (False, 2)])
def test_a_launcher_passes_on_what_the_terminal_has_sent_and_it_counts_once(launched, counted, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none") if launched else monkeypatch.delenv("TORCHELASTIC_RUN_ID", False)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested == counted
