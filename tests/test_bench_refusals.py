"""What benchmarks and reports refuse: runs that are no one curve, held-out rewards that are optimised, broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_options, cli, execute, one_curve, reward_vs_gpu_hours
from benchmarks.bench_options import Options, benchmark_of
from benchmarks.conditions import limits, setup
from benchmarks.execute import Outcome
from benchmarks.overview import table_note
from benchmarks.plan import Arm, Benchmark
from benchmarks.presets import preset, presets
from benchmarks.records import check_comparable, read_run, read_runs
from benchmarks.report import make_view
from benchmarks.summary import mean_height, summarise, update_at
from tests.synthetic_runs import write_run

# ------------------------------------------------------------------ one curve, one kind of run


def about(seed: int, **changes: Any) -> dict[str, Any]:
    """A run.json of an algorithm with data of its own."""
    config = {"learning_rate": 1e-4, "folder": f"runs/0/vader/seed_{seed}/data", "seed": seed, "data_seed": seed}
    found: dict[str, Any] = {
        "seed": seed, "config": config, "env": {"num_envs": 4}, "budget_device_s": 60.0, "budget_updates": None,
        "task": {"arm": {"settings": {}, "policy": {"lora_rank": 4}}, "policy": {"lora_rank": 4}},
    }  # fmt: skip
    for path, value in changes.items():
        *parents, last = path.split("__")
        at = found
        for name in parents:
            at = at[name]
        at[last] = value
    return found


def test_seeds_and_the_folders_that_carry_them_are_no_difference() -> None:
    assert one_curve.differing([about(0), about(1), about(12)]) == []
    assert one_curve.differing([about(0)]) == []


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("config__learning_rate", 1e-3, "config.learning_rate (0.0001, 0.001)"),
        ("config__folder", "runs/elsewhere", 'config.folder ("runs/0/vader/seed_0/data", "runs/elsewhere")'),
        ("config__data_seed", 7, "config.data_seed (0, 7)"),
        ("config__new_field", 2, "config.new_field (null, 2)"),
        ("env__num_envs", 8, "env.num_envs (4, 8)"),
        ("budget_device_s", 90.0, "budget_device_s (60.0, 90.0)"),
        ("budget_updates", 40, "budget_updates (null, 40)"),
        ("task__policy__lora_rank", 16, "policy.lora_rank (4, 16)"),
        ("task__arm__policy", {"lora_rank": 16}, "arm.policy.lora_rank (4, 16)"),
        ("task__arm__settings", {"beta": 5}, "arm.settings.beta (null, 5)"),
    ],
)
def test_what_differs_between_runs_of_one_curve_is_named(path: str, value: Any, told: str) -> None:
    assert one_curve.differing([about(0), about(1, **{path: value})]) == [told]


def test_a_field_that_an_older_record_lacks_counts_as_none() -> None:
    assert one_curve.differing([about(0), about(1, config__new_field=None)]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"learning_rate": 1e-3}},
        {"budget_device_s": 90.0},
        {"env": {"num_envs": 8}},
    ],
)
def test_runs_of_one_algorithm_with_other_settings_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    for algo in ("vader", "ddpo"):  # two algorithms may differ as they like
        write_run(tmp_path, algo, about=change if algo == "ddpo" else {})
    check_comparable(read_runs(tmp_path))
    write_run(tmp_path, "vader", seed=1, about=change)
    with pytest.raises(ValueError, match="vader on MovingShapes-HPS are one curve.*" + next(iter(change))):
        check_comparable(read_runs(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [("prompts_train_sha256", "x"), ("heldout", ["Aesthetic"]), ("guidance_interval", [0.2, 5.0])],
)
def test_runs_with_other_training_prompts_or_heldout_rewards_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    write_run(tmp_path, "vader")
    write_run(tmp_path, "ddpo", task={name: value})
    with pytest.raises(ValueError, match=f"'{name}' differs"):
        check_comparable(read_runs(tmp_path))


def test_records_without_these_fields_are_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "vader")
    nothing = {"prompts_train_sha256": None, "heldout": [], "guidance_interval": None}
    write_run(tmp_path, "ddpo", task=nothing, about={"num_gpus_reward": None})
    check_comparable(read_runs(tmp_path))


@pytest.mark.parametrize("name", ["num_gpus_policy", "num_gpus_reward"])
def test_runs_on_other_numbers_of_devices_are_refused(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, "vader", about={name: 1})
    write_run(tmp_path, "ddpo", about={name: 2})
    with pytest.raises(ValueError, match=f"'{name}' differs"):
        check_comparable(read_runs(tmp_path))


# ------------------------------------------------------------------ what a report says


def test_a_remote_reward_on_a_cpu_is_a_limit(tmp_path: Path) -> None:
    note = "The server of Far does not say how many accelerators it holds."
    write_run(tmp_path / "a", "vader", about={"remote_rewards": ["Far"], "reward_devices_note": note})
    runs = read_runs(tmp_path / "a")
    said = limits(runs, summarise(runs))
    assert "Far: scored by a server, whose CPU-seconds or graphics cards are in no cost given here." in said
    assert note in said
    card = {"device": "cuda", "gpu_name": "NVIDIA H200", "num_gpus_policy": 2, "num_gpus_reward": 3}
    write_run(tmp_path / "b", "vader", about={"remote_rewards": ["Far"], **card})
    runs = read_runs(tmp_path / "b")
    assert not any("scored by a server" in line for line in limits(runs, summarise(runs)))
    assert "2 to train and 3 that only serve rewards" in dict(setup(runs))["What the budget counts"]


def test_the_table_says_how_far_costs_may_lie_apart(tmp_path: Path) -> None:
    write_run(tmp_path, "vader", end=60.0)
    write_run(tmp_path, "ddpo", end=65.9)
    write_run(tmp_path, "rwr", end=66.1)
    view = make_view(read_runs(tmp_path))
    at = {s.algo: update_at(s.runs[0], s.cost) for s in view.summaries}
    assert at == {"vader": 20, "ddpo": 20, "rwr": 15}
    assert all(mean_height(s).centre == mean_height(s).centre for s in view.summaries)
    said = table_note(view)
    assert "Rewards are those at 60 device-seconds" in said
    assert "no more than 1.1 times that, so up to 10 % more" in said and "at 1/1.1 of it or later" in said


@pytest.mark.parametrize("name", ["run.json", "DONE", "FAILED"])
@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"'])
def test_a_broken_file_of_a_run_is_named(tmp_path: Path, name: str, content: str) -> None:
    folder = write_run(tmp_path, "vader", status="FAILED" if name == "FAILED" else "DONE")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=r"is broken: .*put the file back, or remove the run's folder") as refused:
        read_run(folder)
    assert str(refused.value).startswith(str(folder / name))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_threshold_that_is_not_finite_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    write_run(tmp_path, "vader")
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(tmp_path), f"--threshold={value}"])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err == f"vdm-env report: --threshold must be a finite reward, got {value}\n"
    assert not (tmp_path / "report.html").exists()


# ------------------------------------------------------------------ held-out rewards, and runs that cannot be set up


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"env_id": "MovingShapes-HPS+0.1*Aesthetic", "heldout": ("Aesthetic",)}, "Aesthetic"),
        ({"env_id": "MovingShapes-Aesthetic", "preset": "quick"}, "Aesthetic"),
        ({"heldout": ("Action", "HPS")}, "HPS"),
    ],
)
def test_a_heldout_reward_that_is_optimised_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], name: str
) -> None:
    given = Options(updates=1, out=str(tmp_path), **options)
    with pytest.raises(ValueError, match=f"--heldout {name}: .* optimises this reward"):
        benchmark_of(given)
    assert reward_vs_gpu_hours.run(given, "command") == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and name in said.err and not said.out and not list(tmp_path.iterdir())


def test_rewards_of_arms_are_optimised_too(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = [Arm(label="plain", algo="vader"), Arm(label="other", algo="vader", env={"reward": "Action"})]
    mixed = [Arm(label="mixed", algo="vader", env={"reward": {"HPS": 1.0, "Aesthetic": 0.1}})]
    for given, name in ((arms, "Action"), (mixed, "Aesthetic")):
        planned = Benchmark(name="x", arms=given, updates=1, heldout=(name,))
        monkeypatch.setattr("benchmarks.bench_options.preset", lambda _, planned=planned: planned)
        with pytest.raises(ValueError, match=f"--heldout {name}: {given[-1].label} optimises"):
            benchmark_of(Options(preset="x"))


@pytest.mark.parametrize("name", presets())
def test_no_preset_holds_out_what_it_optimises(name: str) -> None:
    assert benchmark_of(Options(preset=name)).heldout == preset(name).heldout


def test_a_run_that_cannot_be_set_up_is_the_last_one_that_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = []

    def refuse(job: Any) -> Outcome:
        begun.append(job.name)
        return Outcome(ended="refused", message="weights of VideoCrafter2 are not on this machine")

    monkeypatch.setattr(execute, "run_job", refuse)
    given = Options(algo=("vader", "ddpo"), updates=1, jobs=0, seeds=(0, 1), out=str(tmp_path))
    assert reward_vs_gpu_hours.run(given, "command", "vdm-env bench") == 2
    assert begun == ["vader seed 0"]
    assert capsys.readouterr().err == "vdm-env bench: weights of VideoCrafter2 are not on this machine\n"


def test_missing_weights_end_a_benchmark_of_processes_at_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VDM_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    given = ["bench", "--preset", "quick", "--env-id", "VideoCrafter2-HPS", "--heldout", "PickScore", "--updates", "1",
             "--out", str(tmp_path / "out"), "--jobs", "1"]  # fmt: skip
    assert cli.main(given) == 2
    said = capsys.readouterr()
    assert said.out.count(": begins") == 1 and said.err.count("\n") == 1
    assert said.err.startswith("vdm-env bench: ") and "VideoCrafter2" in said.err


# ------------------------------------------------------------------ the command that was given


def test_help_of_a_preset_is_that_of_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--preset", "quick", "--help"], ["--help", "--preset=quick"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", *given])
        said = capsys.readouterr().out
        assert stop.value.code == 0 and "--jobs" in said and "--heldout" in said
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    assert "--jobs" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "given",
    ["--preset quik", "--preset quick --updates 0", "--preset quick --heldout HPS", "--algo vadre --updates 1", ""],
)
def test_errors_begin_with_the_command_that_was_given(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: Any = cli.main(["bench", *given.split()])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and said.err.startswith("vdm-env bench: ") and said.err.count("\n") == 1, said


@pytest.mark.parametrize("name", ["quik", "nothing like it"])
def test_an_unknown_preset_lists_the_known_ones_once(name: str) -> None:
    with pytest.raises(ValueError, match="unknown preset") as refused:
        preset(name)
    assert all(str(refused.value).count(f"{known},") <= 1 for known in presets())
    assert str(refused.value).count(", ".join(presets())) == 1


def test_a_record_says_whose_runs_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "vader", status="FAILED")
    (folder / "FAILED").write_text(json.dumps({"update": 3}))
    assert read_run(folder).reason == ""


@pytest.mark.parametrize(
    ("values", "same"),
    [
        (("data/v0", "data/v1"), True),
        (("v0/seed_0", "v1/seed_1"), True),
        (("v1/seed_0", "v1/seed_1"), True),
        (("data/v0", "other/x-1"), False),
        (("data/v0", "data/v2"), False),
        (("frames 10", "frames 11"), False),
    ],
)
def test_texts_may_differ_in_the_seed_of_their_run_alone(values: tuple[str, str], same: bool) -> None:
    abouts = [{"seed": seed, "config": {"folder": value}} for seed, value in enumerate(values)]
    assert (one_curve.differing(abouts) == []) is same


def test_a_reward_that_the_sampling_replaced_may_be_held_out() -> None:
    replaced = Benchmark(
        name="b", arms=[Arm(label="vader", algo="vader")], updates=1, heldout=("HPS",),
        env_id="MovingShapes-HPS", sampling={"reward": {"Brightness": 1.0}},
    )  # fmt: skip
    assert "HPS" not in bench_options._optimised(replaced) and "Brightness" in bench_options._optimised(replaced)


def test_a_record_that_is_no_object_is_named_by_the_benchmark(tmp_path: Path) -> None:
    benchmark = Benchmark(name="b", arms=[Arm(label="vader", algo="vader")], seeds=(0,), updates=1)
    (job,) = execute.jobs(benchmark, out=str(tmp_path), command="")
    job.folder.mkdir(parents=True)
    (job.folder / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json is broken: it holds list.*--fresh"):
        execute.differing(job)
