"""A benchmark from its plan to its tables: the same numbers however it is stopped, ordered and spread out."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import execute, plan_file
from benchmarks.bench_options import Options
from benchmarks.plan import Arm, Benchmark, check, folder_name, run_folder
from benchmarks.reward_vs_gpu_hours import main, prepare
from vdm_env.env import DenoisingVectorEnv

ENV = "MovingShapes-Brightness"
BASE = ["--smoke", "--env-id", ENV, "--updates", "3", "--heldout", "Aesthetic", "--name", "tiny"]
VADER = [*BASE, "--algo", "vader"]
TINY = [*VADER, "--algo", "videodpo", "--set", "videodpo.prompts=4"]  # which keeps data on disk
CHANGES_FROM_RUN_TO_RUN = ("_s", "_gib", "_hours", "_commit", "_minutes")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


def run(out: Path, *more: str, given: Sequence[str] = TINY) -> int:
    return main(["run", *given, "--out", str(out), "--jobs", "0", *more])


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    """Of a table, without times and memory, in an order that does not depend on that of the runs."""
    with (folder / name).open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert read
    found = [{k: v for k, v in row.items() if not k.endswith(CHANGES_FROM_RUN_TO_RUN)} for row in read]
    return sorted(found, key=lambda row: sorted((k, str(v)) for k, v in row.items()))


def folder(out: Path, algo: str, seed: int) -> Path:
    return run_folder(out / "tiny", algo, ENV, seed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two algorithms, two seeds, never stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert run(out, "--seeds", "0", "1", "--hypothesis", "vader wins", "--ahead", "vader>videodpo") == 0
    return out


def test_a_benchmark_leaves_plan_runs_tables_and_report(whole: Path) -> None:
    values = plan_file.read(whole / "tiny")
    assert values is not None and values["hypothesis"] == "vader wins"
    assert values["expected_ahead"] == [["vader", "videodpo"]] and values["seeds"] == [0, 1]
    assert plan_file.merged(values, plan_file.benchmark_of(values)) == values
    about = json.loads((folder(whole, "vader", 1) / "run.json").read_text())
    assert about["algo"] == about["task"]["algo_name"] == "vader"
    assert about["task"]["arm"]["settings"] == {"videos_per_update": 8}
    assert about["task"]["eval_split"] == "test" and about["task"]["heldout"] == ["Aesthetic"]
    lines = (folder(whole, "vader", 1) / "eval.jsonl").read_text().splitlines()
    measured = {json.loads(line)["reward"] for line in lines}
    assert {"proxy", "gold", "heldout/Aesthetic", "kl_ref_nats", "diversity", "motion"} <= measured
    assert (whole / "tiny" / "report.html").exists()
    assert len(rows(whole / "tiny", "changes.csv")) == 4


def test_the_tables_do_not_depend_on_deaths_order_or_deleted_runs(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["--hypothesis", "vader wins", "--ahead", "vader>videodpo", "--seeds", "1", "0"]
    # In vader's first update, while videodpo builds pairs and has no checkpoint, and in its last evaluation.
    unharmed, left = DenoisingVectorEnv.step, 0

    def step(self: Any, *given: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return unharmed(self, *given)

    for deadline in (4, 15, 7):
        left = deadline
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(DenoisingVectorEnv, "step", step)
            run(tmp_path, *said)
    assert run(tmp_path, *said) == 0
    # The data of a finished run go with its folder, and are paid for again.
    shutil.rmtree(folder(tmp_path, "videodpo", 1))
    (folder(tmp_path, "videodpo", 0) / "DONE").unlink()  # as if it was killed before the last word
    assert run(tmp_path, *said) == 0
    for name in ("curves.csv", "changes.csv", "table.csv"):
        assert rows(tmp_path / "tiny", name) == rows(whole / "tiny", name), name


def test_processes_side_by_side_give_the_same_files(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--seeds", "0", "--jobs", "2") == 0
    wanted = [row for row in rows(whole / "tiny", "curves.csv") if row["seed"] == "0"]
    assert rows(tmp_path / "tiny", "curves.csv") == wanted


def test_ray_gives_the_same_files(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    assert run(tmp_path, "--seeds", "0", "--ray", given=VADER) == 0
    assert "vader seed 0: done" in capfd.readouterr().out
    wanted = [row for row in rows(whole / "tiny", "curves.csv") if (row["algo"], row["seed"]) == ("vader", "0")]
    assert rows(tmp_path / "tiny", "curves.csv") == wanted


def test_ray_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(tmp_path, "--ray") == 2
    assert capsys.readouterr().err == "reward_vs_gpu_hours: --ray needs Ray: pip install 'vdm-env[ray]'\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "vader.learning_rate=5e-3"], "vader.settings"),
        (["--updates", "4"], "updates: 3 there, 4 given"),
        (["--eval-prompts", "3"], "eval_prompts: 2 there, 3 given"),
        (["--hypothesis", "videodpo wins"], "hypothesis: 'vader wins' there"),
        (["--heldout", "Motion"], "heldout"),
    ],
)
def test_other_settings_than_those_of_the_runs_are_refused_before_anything_is_trained(
    whole: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in whole.rglob("*"))
    assert run(whole, "--seeds", "0", "1", "2", *more) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out and said.err.count("\n") == 1
    assert sorted(path for path in whole.rglob("*")) == before


def test_a_run_that_differs_is_named_though_the_plan_is_lost(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "tiny" / "benchmark.json").unlink()
    assert run(tmp_path / "copy", "--set", "vader.learning_rate=5e-3", "--updates", "4") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "2 of the runs" in lines[0] and "vader seed 0" in lines[1]
    assert "config.learning_rate" in lines[1] and "budget_updates: 3 there, 4 given" in lines[1]


def test_fresh_removes_what_was_asked_for_and_nothing_else(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    kept = folder(tmp_path / "copy", "videodpo", 0) / "run.json"
    text = kept.read_text()
    other = ["--fresh", "--set", "vader.learning_rate=5e-3"]
    # One seed would stay, which was made with the preset.
    assert run(tmp_path / "copy", *other, "--seeds", "0", given=VADER) == 2
    assert "vader.settings" in capsys.readouterr().err
    assert run(tmp_path / "copy", *other, "--seeds", "0", "1", given=VADER) == 0
    about = json.loads((folder(tmp_path / "copy", "vader", 0) / "run.json").read_text())
    assert about["config"]["learning_rate"] == 5e-3 and kept.read_text() == text


def test_the_plan_says_what_is_done_and_what_it_takes(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["plan", *TINY, "--out", str(tmp_path / "runs"), "--seeds", "0", "1", "2"]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert said.count("missing") == 6 and "hours unknown until a run is done" in said and not list(tmp_path.iterdir())
    assert main([*given, "--budget", "36s"]) == 0
    said = capsys.readouterr().out
    assert said.count("0.0100 device-h") == 6 and "0 done, 6 to run: 0.060 device-h" in said
    assert main([*given[:-6], "--out", str(whole), "--seeds", "0", "1", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count(" done ") >= 4 and said.count("missing") == 2 and "4 done, 2 to run" in said
    assert "s a video of the 4 runs" in said and "MB more" in said and "vader wins" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "plan, run, report"),
        ("ran", "got ran"),
        ("run --algoo vader", "--algo"),
        ("run --algo vadre", "did you mean 'vader'"),
        ("run", "give --budget 60s"),
        ("run --budget soon", "is no duration"),
        ("run --updates 0", "--updates must be at least 1"),
        ("run --updates 1 --noise-seeds 0", "--noise-seeds must be"),
        ("run --updates 1 --seeds 1 1", "--seeds"),
        ("run --updates 1 --jobs -1", "--jobs must be"),
        ("run --updates 1 --env-id MovingShape-HPS", "did you mean MovingShapes"),
        ("run --updates 1 --heldout Aesthetics", "did you mean Aesthetic"),
        ("run --updates 1 --splits tests", "unknown split 'tests'"),
        ("run --updates 1 --set learning_rate", "expected name=value"),
        ("run --updates 1 --set vadre.learning_rate=1", "no arm 'vadre'"),
        ("run --updates 1 --set vader.learning_rat=1", "did you mean 'learning_rate'"),
        ("run --updates 1 --set vader.learning_rate=fast", "expected a number"),
        ("run --updates 1 --ahead vader", "expected two algorithms"),
        ("run --updates 1 --ahead vader>refl", "'refl'"),
        ("run --preset quik", "did you mean 'quick'"),
        ("run --updates 1 --name a/b", "--name 'a/b'"),
        ("plan --updates 0", "--updates must be at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(
    given: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: Any = main(given.split())
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and said.err.count("\n") == 1 and not said.out and message in said.err, said
    assert not list(tmp_path.iterdir())


def test_a_device_this_machine_lacks_is_refused_unless_ray_runs_it_elsewhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = Options(updates=1, device="cuda:99", out=str(tmp_path))
    with pytest.raises(ValueError, match="'cuda:99' cannot be used here.*give cpu, cuda or auto"):
        prepare(options, "")
    assert main(["run", "--updates", "1", "--device", "cuda:99", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
    found, _ = prepare(replace(options, ray=True), "")
    assert found and {job.device for job in found} == {"cuda:99"}
    assert prepare(replace(options, ray_address="auto"), "")


def test_a_report_of_nothing_is_wrong_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_offline_algorithms_come_after_those_that_build_their_data(tmp_path: Path) -> None:
    from benchmarks.arms import arm_settings

    arms = [Arm(label=name, algo=name) for name in ("offline_dpo", "videodpo", "vader")]
    benchmark = Benchmark(name="b", arms=arms, seeds=(0, 1), updates=1)
    stages = execute.stages(execute.jobs(benchmark, out=str(tmp_path), command=""))
    assert [[job.name for job in stage] for stage in stages] == [
        ["videodpo seed 0", "vader seed 0", "videodpo seed 1", "vader seed 1"],
        ["offline_dpo seed 0", "offline_dpo seed 1"],
    ]
    read, built = (arm_settings(benchmark, arm, 1, tmp_path) for arm in arms[:2])
    assert read == built == {"folder": str(tmp_path / "b/videodpo/MovingShapes-HPS/seed_1/preferences")}
    arm = Arm(label="x", algo="vader", settings={"a": "b_{seed}"})
    assert arm_settings(benchmark, arm, 3, tmp_path) == {"a": "b_3"}


def test_folders_are_safe_and_arms_do_not_share_one() -> None:
    assert folder_name("vader K=10") == "vader_K=10" and folder_name("../a:b") == "a_b" and folder_name("/") == "arm"
    twins = [Arm(label="a b", algo="vader"), Arm(label="a/b", algo="ddpo")]
    with pytest.raises(ValueError, match="different"):
        check(Benchmark(name="x", arms=twins, updates=1))


def test_an_arm_may_train_with_another_sampling_and_is_evaluated_like_all() -> None:
    from benchmarks.training import Setup, build

    setup = Setup(env_id=ENV, sampling={"num_envs": 8, "num_steps": 2, "guidance_scale": 1.0}, num_prompts=2,
                  further_splits=("train",))  # fmt: skip
    other = {"num_steps": 3, "noise_level": 0.3, "reward": "HPS", "guidance_scale": 2.0, "height": 16, "width": 16}
    arm = Arm(label="x", algo="ddpo", env=other, policy={"lora_rank": 2}, settings={"videos_per_rollout": 8})
    built = build(arm, setup, 0)
    assert (built.env.num_steps, built.env.mdp.height, built.env.mdp.reward.name) == (3, 16, "HPS")
    assert built.policy.guidance_scale == 2.0
    for evaluator in built.evaluators:
        assert (evaluator.env.num_steps, evaluator.env.mdp.height, evaluator.guidance_scale) == (2, 32, 1.0)
        assert evaluator.env.mdp.reward.name == "Brightness"
        assert evaluator.env.mdp.noise_level == built.env.model.spec.noise_level
    assert [evaluator.split for evaluator in built.evaluators] == ["test", "train"]
    found = built.evaluators[0].evaluate(built.policy)
    assert found.rows and built.policy.guidance_scale == 2.0
    as_trained = build(Arm(**{**vars(arm), "evaluate_as_trained": True}), setup, 0).evaluators[0]
    assert (as_trained.env.num_steps, as_trained.env.mdp.height, as_trained.env.mdp.noise_level) == (3, 16, 0.3)
    with pytest.raises(ValueError, match="'Brightness' is optimised"):
        build(Arm(label="v", algo="vader"), Setup(env_id=ENV, heldout=["Brightness"]), 0)
