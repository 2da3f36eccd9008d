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

import algos
from algos.budget import seconds
from algos.provenance import plain
from algos.zoo import ZOO, load
from benchmarks import cli, curves, demo, training
from benchmarks.arguments import one_line
from benchmarks.plan import Arm
from benchmarks.settings import algorithm_config, overrides
from tests.test_report import PROMPTS, Page, write_run


class FakeTraining:
    """Stands for `demo.train`: writes a finished folder; `endings` says what happens to a run instead."""

    def __init__(self, **endings: Any) -> None:
        self.endings = endings
        self.calls: list[dict[str, Any]] = []

    def __call__(self, name: str, *, out: Path, seed: int, **given: Any) -> SimpleNamespace:
        self.calls.append({"name": name, "seed": seed, **given})
        ending = self.endings.get(name) or self.endings.get(f"seed_{seed}")
        if isinstance(ending, training.SetupError):
            raise ending
        status, evaluations, end = ("DONE", 5, 60.0) if ending is None else ("INTERRUPTED", 2, 15.0)
        if isinstance(ending, Exception):
            status = "FAILED"
        task, about = {"command": given["command"]}, None
        if "changes" in given:  # of the curves, which look whether a run is the one they were asked for
            setup = given["setup"]
            task |= {"env_id": setup.env_id, "eval_split": setup.split, "eval_noise_seeds": list(setup.noise_seeds)}
            config, _ = algorithm_config(load(name)[1], "no model", given["changes"], seed)
            about = {"config": plain(config), "eval_every": f"{seconds(given['eval_every']):g} device-s"}
        folder = out / name / "Task" / f"seed_{seed}"
        if given.get("resume") and (folder / "run.json").exists():  # the fake continues nothing
            (folder / "run.json").rename(out / f"removed_{seed}.json")
            folder.rename(out / f"removed_{seed}")
        numbers: dict[str, Any] = {"gain": 0.4, "evaluations": evaluations, "end": end}
        write_run(out, name, seed=seed, status=status, task=task, about=about, **numbers)
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
    fake = use(monkeypatch, demo)
    kept = write_run(tmp_path, "vader")
    for run in (demo.main, lambda given: cli.main(["demo", *given])):
        assert run(["--out", str(tmp_path), "--budget", "soon"]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and "is no duration" in said.err and not said.out
    assert (kept / "run.json").exists() and not fake.calls


@pytest.mark.parametrize("place", [("vader", 5), ("elsewhere", 0)])
def test_a_demo_refuses_a_folder_with_runs_of_another_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: tuple[str, int]
) -> None:
    fake = use(monkeypatch, demo)
    own = write_run(tmp_path, "vader")
    other = write_run(tmp_path, place[0], seed=place[1], task={"command": "python train.py"})
    assert demo.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and str(other) in said.err and not said.out
    assert (own / "run.json").exists() and (other / "run.json").exists() and not fake.calls


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
    fake = use(monkeypatch, demo, vader=training.SetupError("weights are damaged"))
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "demo: vader stopped: weights are damaged\n"
    assert [call["name"] for call in fake.calls] == ["vader"]


def test_errors_in_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(RuntimeError("x")) == "RuntimeError: x" and one_line(KeyError()) == "KeyError"


def run_curves(out: Path, *given: str) -> int:
    # The fakes' folders are called Task.
    return curves.main(["--algo", "vader", "--env-id", "Task", "--num-threads", f"{torch.get_num_threads()}",
                        "--budget", "60s", "--out", str(out), *given])  # fmt: skip


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
    fake = use(monkeypatch, curves)
    assert run_curves(tmp_path) == 0
    assert [(call["seed"], call["resume"]) for call in fake.calls] == [(1, "auto"), (2, "auto")]
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "is continued" in line] == [
        f"curves: {tmp_path / 'vader' / 'Task' / 'seed_1'} did not reach its end: this seed is continued"
    ]
    assert statuses(tmp_path) == {"0": "DONE", "1": "DONE", "2": "DONE"}
    command = json.loads((tmp_path / "vader" / "Task" / "seed_2" / "run.json").read_text())["task"]["command"]
    assert "--seeds 0 1 2 " in command and f"--num-threads {torch.get_num_threads()} " in command


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        (("--set", "learning_rate=0.25"), ["config.learning_rate: 0.0002 there, 0.25 given"]),
        (("--updates", "40"), ["budget_updates: None there, 40 given", "eval_every: '7.5 device-s' there"]),
        (("--budget", "2min", "--evals", "16"), ["budget_device_s: 60.0 there, 120.0 given"]),
        (("--noise-seeds", "2"), ["task.eval_noise_seeds: "]),
        (("--split", "validation"), ["task.eval_split: 'test' there, 'validation' given"]),
    ],
)
def test_curves_of_other_settings_than_the_runs_that_are_there_are_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    given: tuple[str, ...], keys: list[str],
) -> None:  # fmt: skip
    use(monkeypatch, curves)
    assert run_curves(tmp_path, "--seeds", "0") == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    fake = use(monkeypatch, curves)
    # The new seed comes first, and is not begun either.
    assert run_curves(tmp_path, "--seeds", "1", "0", *given) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith(f"curves: {tmp_path / 'vader' / 'Task' / 'seed_0'} holds")
    assert all(key in said.err for key in keys) and "choose another --out" in said.err, said.err
    assert said.err.count(" there, ") == len(keys)
    assert not fake.calls and {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert run_curves(tmp_path, "--seeds", "0", "--budget", "1min") == 0 and not fake.calls


def test_a_broken_record_of_a_curve_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, curves)
    assert run_curves(tmp_path, "--seeds", "0") == 0
    path = tmp_path / "vader" / "Task" / "seed_0" / "run.json"
    path.write_text("{")
    capsys.readouterr()
    assert run_curves(tmp_path, "--seeds", "0") == 2
    assert f"{path} is broken" in capsys.readouterr().err


def test_curves_that_fail_keep_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = use(monkeypatch, curves, seed_1=FloatingPointError("not finite"))
    assert run_curves(tmp_path) == 1
    assert capsys.readouterr().err == "curves: FloatingPointError: not finite\n"
    assert statuses(tmp_path) == {"0": "DONE", "1": "FAILED"} and (tmp_path / "report.html").exists()
    assert [call["seed"] for call in fake.calls] == [0, 1]


@pytest.mark.parametrize(
    "given",
    [
        ("--budget", "soon"),
        ("--noise-seeds", "0"),
        ("--num-threads", "0"),
        ("--evals", "0"),
        ("--updates", "0"),
        ("--seeds", "1", "1"),
        ("--algo", "vadre"),
        ("--set", "beta"),
    ],
)
def test_wrong_usage_of_the_curves_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: tuple[str, ...]
) -> None:
    fake = use(monkeypatch, curves)
    assert run_curves(tmp_path / "out", *given) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not fake.calls and not (tmp_path / "out").exists()


def test_an_unknown_environment_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_curves(tmp_path / "out", "--env-id", "NoSuchModel-HPS") == 2
    assert re.fullmatch(r"curves: .*NoSuchModel.*\n", capsys.readouterr().err) and not (tmp_path / "out").exists()


def fake_env(name: str, world: str | None) -> Any:
    return SimpleNamespace(
        model=SimpleNamespace(spec=SimpleNamespace(name=name, world=world)),
        mdp=SimpleNamespace(num_frames=8, height=32, width=32, sampler="ddim", noise_level=1.0),
        config=SimpleNamespace(guidance_scale=1.0, guidance_interval=None),
        prompts=SimpleNamespace(sha256=lambda split: split),
        num_steps=5, num_envs=16, group_size=1,
    )  # fmt: skip


def test_curves_without_an_end_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curves.main(["--algo", "vader", "--out", str(tmp_path / "out")]) == 2
    assert "--updates 40" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_only_a_world_of_ones_own_is_called_that() -> None:
    setup = training.Setup(limits=["tuned by hand"])
    env = fake_env("MovingShapes", "moving_shapes")
    own = training.describe(env, env, setup, "c")
    assert own["reward_train"] == training.REWARD == "MovingShapes-HPS (own small weights)" and len(own["limits"]) == 2
    setup = training.Setup(env_id="VideoCrafter2-HPS", limits=["tuned by hand"])
    env = fake_env("VideoCrafter2", None)
    other = training.describe(env, env, setup, "c")
    assert (other["reward_train"], other["model_id"]) == ("VideoCrafter2-HPS", "VideoCrafter2")
    assert other["limits"] == ["tuned by hand"]


@pytest.mark.parametrize("algo", sorted(ZOO))
def test_a_model_without_a_preset_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str
) -> None:
    import vdm_env

    monkeypatch.setattr(vdm_env, "make", lambda *_, **__: fake_env("VideoCrafter2", None))
    with pytest.raises(training.SetupError, match="no .* preset for 'VideoCrafter2'"):
        training.train(algo, out=tmp_path, seed=0, command="c", setup=training.Setup(), budget="1s")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("algo", sorted(ZOO))
@pytest.mark.parametrize("model", ["MovingShapes", "MovingShapesUNet"])
def test_every_algorithm_of_the_zoo_has_presets_for_the_embedded_models_and_trains_with_them(
    algo: str, model: str, tmp_path: Path
) -> None:
    setup = training.Setup(env_id=f"{model}-HPS", noise_seeds=[0])
    changes = {"folder": str(tmp_path / "data")} if algo in ("videodpo", "offline_dpo") else {}
    arm = Arm(label=algo, algo=algo, settings=changes)
    if algo == "offline_dpo":
        with pytest.raises(FileNotFoundError, match="data"):
            training.build(arm, setup, seed=3)
        return
    built = training.build(arm, setup, seed=3)
    env, policy, algorithm, (evaluator,) = built.env, built.policy, built.algorithm, built.evaluators
    assert evaluator.env.mdp.noise_level == env.model.spec.noise_level  # one sampler for all that are compared
    assert algorithm.config.seed == 3 and algorithm.env is env and len(evaluator.prompt_ids) == 16
    assert env.num_steps == training.SAMPLING["num_steps"] and policy.guidance_scale == 1.0


def test_fields_of_a_config_from_the_command_line() -> None:
    given = ["learning_rate=1e-3", "pairs=all_pairs", "folder=runs/{seed}=x", "betas=(0.9, 0.99)"]
    found = overrides(given, seed=4)
    assert found == {"learning_rate": 1e-3, "pairs": "all_pairs", "folder": "runs/4=x", "betas": (0.9, 0.99)}
    with pytest.raises(ValueError, match="VADERConfig: unknown key 'bets'; did you mean 'betas'"):
        training.build(Arm(label="vader", algo="vader", settings={"bets": 1}), training.Setup(), seed=0)


def test_names_of_the_zoo() -> None:
    with pytest.raises(ValueError, match="did you mean 'vader'"):
        load("vadre")
    for name, entry in ZOO.items():
        algorithm, config = load(name)
        assert (algorithm.__name__, config.__name__) == (entry.algorithm, f"{entry.algorithm}Config")
        assert getattr(algos, entry.algorithm) is algorithm and entry.algorithm in dir(algos)
    with pytest.raises(AttributeError, match="VADER"):
        _ = algos.NoSuchAlgorithm


def test_a_seed_that_would_stand_on_a_curve_with_others_is_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, curves)
    assert run_curves(tmp_path, "--seeds", "0") == 0
    fake = use(monkeypatch, curves)
    assert run_curves(tmp_path, "--seeds", "1", "--budget", "99s") == 2
    said = capsys.readouterr().err
    assert "seed_0 holds another run" in said and "budget_device_s" in said and not fake.calls
