"""A class of one's own by --algo package.module:Class: in a benchmark with its report, in train, and when it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from algos.zoo import recipe
from benchmarks import cli
from benchmarks.records import read_runs
from benchmarks.reward_vs_gpu_hours import main

ENV = "MovingShapes-Brightness"
SOURCE = """
import os, signal
from dataclasses import dataclass
import torch

class Plain:
    env_options = {"group_size": 2}

    def __init__(self, env, policy, lr=1e-3, seed=0):
        self.env, self.policy, self.lr, self.seed = env, policy, lr, seed
        self.updates = 0

    def update(self):
        self.updates += 1
        with torch.no_grad():
            obs, _ = self.env.reset()
            for _ in range(self.env.num_steps):
                obs, reward, *_ = self.env.step(self.policy(obs))
        return {"reward_mean": reward.mean().item(), "lr": self.lr}

    def state_dict(self):
        return {"env": self.env.state_dict(), "updates": self.updates}

    def load_state_dict(self, state):
        self.env.load_state_dict(state["env"])
        self.updates = state["updates"]

class Typed(Plain):
    @dataclass(frozen=True)
    class Config:
        lr: float = 1.0
        seed: int = 0
        @classmethod
        def preset(cls, model):
            return cls(lr=2.0 if model == "MovingShapes" else 3.0)

    def __init__(self, env, policy, config):
        super().__init__(env, policy, config.lr, config.seed)
        self.config = config

class Fails(Plain):
    def update(self):
        raise RuntimeError("no\\nluck")

class Stops(Plain):
    def update(self):
        if self.updates == 0:  # as Ctrl-C at whoever started the run
            os.kill(os.getpid() if "here" in os.environ else os.getppid(), signal.SIGINT)
        return super().update()

class NoUpdate:
    def state_dict(self): ...
    def load_state_dict(self, state): ...
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_own_module.py").write_text(SOURCE)
    (tmp_path / "my_broken_module.py").write_text("import no_such_package_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("my_own_module", "my_broken_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def own(name: str) -> str:
    return f"my_own_module:{name}"


def run(*more: str) -> int:
    return main(["run", "--smoke", "--env-id", ENV, "--name", "own", "--jobs", "0", *more])


def test_it_runs_beside_the_zoo_and_is_in_tables_and_report(home: Path) -> None:
    given = ["--algo", own("Plain"), "--algo", own("Typed"), "--algo", "vader", "--set", "Plain.lr=0.5"]
    assert run(*given) == 0
    runs = {one.algo: one for one in read_runs(home / "runs" / "own")}
    assert set(runs) == {"Plain", "Typed", "vader"}
    assert runs["Plain"].task["algo_name"] == own("Plain") and runs["Plain"].about["env"]["group_size"] == 2
    assert runs["Plain"].train[-1]["lr"] == 0.5 and runs["Typed"].train[-1]["lr"] == 2.0
    folder = home / "runs" / "own"
    assert "Plain" in (folder / "report.html").read_text() and "Typed" in (folder / "table.csv").read_text()
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0 and (folder / "report.html").exists()


def test_a_failure_is_flagged_and_the_others_go_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--algo", own("Fails"), "--algo", own("Plain")) == 1
    said = capsys.readouterr().out
    assert "Fails seed 0: failed, RuntimeError: no luck" in said and "Plain seed 0: done" in said
    assert (home / "runs/own/Fails" / ENV / "seed_0/FAILED").exists()
    assert (home / "runs/own/report.html").exists()


@pytest.mark.parametrize("jobs", ["0", "1"])
def test_an_interrupted_run_ends_with_a_checkpoint_and_is_continued(
    home: Path, jobs: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if jobs == "0":
        monkeypatch.setenv("here", "1")
    given = ["--algo", own("Stops"), "--algo", own("Plain"), "--updates", "3", "--jobs", jobs]
    assert run(*given) == 130
    folder = home / "runs/own/Stops" / ENV / "seed_0"
    assert (folder / "INTERRUPTED").exists() and json.loads((folder / "INTERRUPTED").read_text())["update"] == 1
    assert not (home / "runs/own/Plain").exists() and (home / "runs/own/report.html").exists()
    if jobs == "0":
        assert run(*given) == 0
        assert len((folder / "train.jsonl").read_text().splitlines()) == 3 and (folder / "DONE").exists()


def test_train_and_bench_take_it_too(home: Path) -> None:
    small = ["--env", ENV, "--updates", "1", "--num-envs", "4", "--num-steps", "2", "--eval-prompts", "1",
             "--eval-seeds", "1"]  # fmt: skip
    assert cli.main(["train", "--algo", own("Typed"), *small, "--set", "lr=4"]) == 0
    folder = home / "runs/train/Typed" / ENV / "seed_0"
    assert json.loads((folder / "run.json").read_text())["config"] == {"lr": 4.0, "seed": 0}
    assert cli.main(["train", "--algo", own("Typed"), *small, "--resume", "--set", "lr=4"]) == 0
    preset = ["--preset", "quick", "--smoke", "--env-id", ENV, "--name", "q", "--jobs", "0", "--heldout", "Action"]
    assert cli.main(["bench", *preset, "--algo", own("Plain")]) == 0
    about = json.loads((home / "runs/q/Plain" / ENV / "seed_0/run.json").read_text())
    assert about["task"]["command"].startswith("vdm-env bench --preset quick --smoke")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Plain", "no module 'no_such_module'"),
        ("my_broken_module:Plain", "my_broken_module cannot be imported: No module named 'no_such_package_at_all'"),
        (own("Missing"), "has no class 'Missing'"),
        (own("os"), "has no class 'os'"),
        (own("NoUpdate"), "the class has no update()"),
        ("my own:Plain", "expected package.module:Class"),
    ],
)
@pytest.mark.parametrize("command", ["run", "train", "bench"])
def test_what_cannot_be_used_is_one_line(
    name: str, message: str, command: str, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    try:
        given = ["--algo", name, "--updates", "1"]
        code: Any = run(*given) if command == "run" else cli.main([command, *given])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and said.err.count("\n") == 1 and message in said.err and not said.out, said
    assert not (home / "runs").exists()


def test_unknown_settings_are_refused(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    for one, message in (("Plain.lrr=1", "Plain: unknown key 'lrr'"), ("Typed.lr=fast", "expected a number")):
        assert run("--algo", own("Plain"), "--algo", own("Typed"), "--set", one) == 2
        assert message in capsys.readouterr().err and not (home / "runs").exists()


def test_the_zoo_is_found_by_the_same_function() -> None:
    found = recipe("ddpo")
    assert (found.label, found.algorithm.__name__, found.config.__name__) == ("ddpo", "DDPO", "DDPOConfig")
    assert found.env == {"group_size": 8} and recipe("videodpo").data == "builds"
