"""The demo and the learning curves around a training that is replaced by written folders: endings, exit codes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cli, curves, demo
from benchmarks.arguments import one_line
from tests.test_report import PROMPTS, Page, write_run


class FakeTraining:
    """Stands for `demo.train`: writes a finished folder; `endings` says what happens to a run instead."""

    def __init__(self, **endings: Any) -> None:
        self.endings = endings
        self.calls: list[dict[str, Any]] = []

    def __call__(self, name: str, *, out: Path, seed: int, **given: Any) -> SimpleNamespace:
        self.calls.append({"name": name, "seed": seed, **given})
        ending = self.endings.get(name) or self.endings.get(f"seed_{seed}")
        if isinstance(ending, demo.SetupError):
            raise ending
        status, evaluations, end = ("DONE", 5, 60.0) if ending is None else ("INTERRUPTED", 2, 15.0)
        if isinstance(ending, Exception):
            status = "FAILED"
        task = {"command": given["command"]}
        folder = out / name / "Task" / f"seed_{seed}"
        if given.get("fresh"):
            (folder / "run.json").rename(out / f"removed_{seed}.json")
            folder.rename(out / f"removed_{seed}")
        write_run(out, name, seed=seed, gain=0.4, status=status, evaluations=evaluations, end=end, task=task)
        if isinstance(ending, Exception):
            raise ending
        return SimpleNamespace(interrupted=ending == "interrupt")


def use(monkeypatch: pytest.MonkeyPatch, module: Any, **endings: Any) -> FakeTraining:
    training = FakeTraining(**endings)
    monkeypatch.setattr(module, "train", training)
    return training


def test_demo_prints_its_numbers_and_replaces_an_earlier_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    write_run(out, "vader", seed=7)  # an earlier demo's: its numbers must not enter this report
    (out / "notes.txt").write_text("mine")
    use(monkeypatch, demo)
    assert demo.main(["--out", str(out), "--budget", "60s"]) == 0
    said = capsys.readouterr().out
    assert "seed 0" in said and str(out / "report.html") in said
    assert said.count("  reward 0.") == said.count("  gold   0.") == 2
    assert f"95 % interval over {PROMPTS} prompts of one seed; it says nothing about other seeds" in said
    assert "reward, ddpo - vader:" in said
    assert not (out / "vader" / "Task" / "seed_7").exists() and (out / "notes.txt").exists()


def test_an_interrupted_demo_reports_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, demo, vader="interrupt")
    assert demo.main(["--out", str(tmp_path)]) == 130
    assert "vader (interrupted, 15 device-s, 5 updates)" in capsys.readouterr().out
    page = Page((tmp_path / "report.html").read_text()).text
    assert "vader raises it" in page and "ddpo" not in page


def test_wrong_usage_of_the_demo_is_one_line_and_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = use(monkeypatch, demo)
    kept = write_run(tmp_path, "vader")
    for run in (demo.main, lambda given: cli.main(["demo", *given])):
        assert run(["--out", str(tmp_path), "--budget", "soon"]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and "is no duration" in said.err and not said.out
    assert (kept / "run.json").exists() and not training.calls


@pytest.mark.parametrize("place", [("vader", 5), ("elsewhere", 0)])
def test_a_demo_refuses_a_folder_with_runs_of_another_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: tuple[str, int]
) -> None:
    training = use(monkeypatch, demo)
    own = write_run(tmp_path, "vader")
    other = write_run(tmp_path, place[0], seed=place[1], task={"command": "python train.py"})
    assert demo.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and str(other) in said.err and not said.out
    assert (own / "run.json").exists() and (other / "run.json").exists() and not training.calls


@pytest.mark.parametrize("error", [ValueError("bad\nshape"), FloatingPointError("not finite"), RuntimeError("memory")])
def test_a_failure_keeps_the_report_of_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    use(monkeypatch, demo, ddpo=error)
    assert demo.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err == f"demo: ddpo stopped: {one_line(error)}\n"
    assert "ddpo (failed" in said.out and "vader raises it" in Page((tmp_path / "report.html").read_text()).text


def test_a_failure_before_any_evaluation_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = use(monkeypatch, demo, vader=demo.SetupError("weights are damaged"))
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "demo: vader stopped: weights are damaged\n"
    assert [call["name"] for call in training.calls] == ["vader"]


def test_errors_in_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(RuntimeError("x")) == "RuntimeError: x" and one_line(KeyError()) == "KeyError"


def run_curves(out: Path, *given: str) -> int:
    # The fakes' folders are called Task.
    return curves.main(["--algo", "vader", "--env-id", "Task", "--num-threads", f"{torch.get_num_threads()}",
                        "--out", str(out), *given])  # fmt: skip


def statuses(out: Path) -> dict[str, str]:
    with (out / "changes.csv").open() as file:
        return {row["seed"]: row["status"] for row in csv.DictReader(file)}


def test_curves_go_on_where_they_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, curves, seed_1="interrupt")
    assert run_curves(tmp_path) == 130
    assert statuses(tmp_path) == {"0": "DONE", "1": "INTERRUPTED"} and (tmp_path / "report.html").exists()
    capsys.readouterr()
    training = use(monkeypatch, curves)
    assert run_curves(tmp_path) == 0
    assert [(call["seed"], call["fresh"]) for call in training.calls] == [(1, True), (2, False)]
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "starts again" in line] == [
        f"curves: {tmp_path / 'vader' / 'Task' / 'seed_1'} did not reach its end: this seed starts again"
    ]
    assert statuses(tmp_path) == {"0": "DONE", "1": "DONE", "2": "DONE"}
    command = json.loads((tmp_path / "vader" / "Task" / "seed_2" / "run.json").read_text())["task"]["command"]
    assert "--seeds 0 1 2 " in command and f"--num-threads {torch.get_num_threads()} " in command


def test_curves_that_fail_keep_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = use(monkeypatch, curves, seed_1=FloatingPointError("not finite"))
    assert run_curves(tmp_path) == 1
    assert capsys.readouterr().err == "curves: FloatingPointError: not finite\n"
    assert statuses(tmp_path) == {"0": "DONE", "1": "FAILED"} and (tmp_path / "report.html").exists()
    assert [call["seed"] for call in training.calls] == [0, 1]


@pytest.mark.parametrize(
    "given", [("--budget", "soon"), ("--noise-seeds", "0"), ("--num-threads", "0"), ("--seeds", "1", "1")]
)
def test_wrong_usage_of_the_curves_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: tuple[str, ...]
) -> None:
    training = use(monkeypatch, curves)
    assert run_curves(tmp_path / "out", *given) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not training.calls and not (tmp_path / "out").exists()


def test_an_unknown_environment_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_curves(tmp_path / "out", "--env-id", "NoSuchModel-HPS") == 2
    assert re.fullmatch(r"curves: .*NoSuchModel.*\n", capsys.readouterr().err) and not (tmp_path / "out").exists()


def fake_env(name: str, world: str | None) -> Any:
    return SimpleNamespace(
        model=SimpleNamespace(spec=SimpleNamespace(name=name, world=world)),
        mdp=SimpleNamespace(num_frames=8, height=32, width=32, sampler="ddim", noise_level=1.0),
        config=SimpleNamespace(guidance_scale=1.0),
        prompts=SimpleNamespace(sha256=lambda split: split),
        num_steps=5, num_envs=16, group_size=1,
    )  # fmt: skip


def test_only_a_world_of_ones_own_is_called_that() -> None:
    own = demo._task(fake_env("MovingShapes", "moving_shapes"), demo.ENV_ID, "c")
    assert own["reward_train"] == demo.REWARD == "MovingShapes-HPS (own small weights)" and len(own["limits"]) == 2
    other = demo._task(fake_env("VideoCrafter2", None), "VideoCrafter2-HPS", "c")
    assert (other["reward_train"], other["model_id"]) == ("VideoCrafter2-HPS", "VideoCrafter2")
    assert "own" not in " ".join(other["limits"])


@pytest.mark.parametrize("algo", ["vader", "ddpo"])
def test_a_model_without_a_preset_is_refused_by_name_and_the_worlds_models_share_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str
) -> None:
    import algos
    import vdm_env

    given: dict[str, Any] = {"out": tmp_path, "budget": "1s", "seed": 0, "command": "c"}
    monkeypatch.setattr(vdm_env, "make", lambda *_, **__: fake_env("VideoCrafter2", None))
    with pytest.raises(demo.SetupError, match="no .* preset for 'VideoCrafter2'"):
        demo.train(algo, **given)
    asked: list[str] = []

    def preset(model: str) -> Any:
        asked.append(model)
        raise ValueError("far enough")

    monkeypatch.setattr(getattr(algos, f"{algo.upper()}Config"), "preset", preset)
    monkeypatch.setattr(vdm_env, "make", lambda *_, **__: fake_env("MovingShapesUNet", "moving_shapes"))
    with pytest.raises(demo.SetupError, match="far enough"):
        demo.train(algo, **given)
    assert asked == ["MovingShapes"]
