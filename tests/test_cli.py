"""The console command: help and refusals of every command, a run from options and files, and what is done with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import vdm_env
from benchmarks import cli, configs, scores
from benchmarks.commands import train
from benchmarks.commands.train import TrainConfig
from benchmarks.pictures import side_by_side
from benchmarks.records import read_run
from benchmarks.trained import find, load_policy
from tests.test_report import write_run

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--algo", "vader", "--updates", "2", "--num-envs", "4", "--num-steps", "2", "--eval-prompts", "2",
    "--eval-seeds", "1", "--eval-videos", "1", "--lora-rank", "3", "--set", "videos_per_update=4",
    "--set", "learning_rate=1e-2", "--num-threads", str(torch.get_num_threads()),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two updates."""
    out = tmp_path_factory.mktemp("runs") / "small"
    assert cli.main(["train", *SMALL, "--out", str(out)]) == 0
    return out / "vader" / "MovingShapes-HPS" / "seed_0"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error of a command that ends with code 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") == 1 and not said.out, (arguments, said)
    assert said.err.startswith("vdm-env")
    return said.err


# ------------------------------------------------------------------ help


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_fits_80_columns_and_explains_every_option(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert stop.value.code == 0 and f"usage: vdm-env {command}" in said
    assert max(map(len, said.splitlines())) <= 80
    # An option without words has its default, or nothing, right behind its name.
    text = " ".join(line.strip("│ ") for line in said.splitlines())
    assert not re.findall(r"--[a-z-]+(?: [A-Z]+| \{[^}]*\})? +(?:\((?:default|required|repeatable)|--|╰)", text)


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"\n  {name} " in said for name in cli.COMMANDS)


def test_help_and_usage_errors_need_no_torch() -> None:
    code = (
        "import sys\nfrom benchmarks import cli\n"
        "for name in cli.COMMANDS:\n"
        "  for more in ('--help', '--no-such-option'):\n"
        "    try: cli.main([name, more])\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == len(cli.COMMANDS)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "no command given"),
        ("trian", "did you mean 'train'"),
        ("envs --idz", "--ids"),
        ("algos vadre", "did you mean 'vader'"),
        ("demo --budget soon", None),
        ("train", "--algo vader"),
        ("train --algoo vader", "did you mean --algo?"),
        ("train --num-envs x", "--num-envs"),
        ("train --algo vadre --updates 1", "did you mean 'vader'"),
        ("train --algo vader", "--updates 100"),
        ("train --algo vader --budget soon", "is no duration"),
        ("train --algo vader --updates 0", "--updates must be at least 1"),
        ("train --algo vader --updates 1 --eval-every soon", "is no duration"),
        ("train --algo vader --updates 1 --eval-prompts 0", "--eval-prompts must be at least 1"),
        ("train --algo vader --updates 1 --resume --fresh", "one of the two"),
        ("train --algo vader --updates 1 --set beta", "expected name=value"),
        ("train --algo vader --updates 1 --env MovingShape-HPS", "did you mean MovingShapes"),
        ("train --algo vader --updates 1 --env MovingShapes-HPT", "did you mean HPS"),
        ("train --algo vader --updates 1 --set learning_rat=1", "did you mean 'learning_rate'"),
        ("train --algo vader --updates 1 --set learning_rate=fast", "expected a number"),
        ("train --algo vader --updates 1 --set seed=3", "give --seed 3"),
        ("train --algo vader --updates 1 --set learning_rate=-1", "learning_rate is -1"),
        ("train --algo vader --updates 1 --num-envs 3", "videos_per_update=63"),
        ("train --algo ddpo --updates 1 --num-envs 4", "try num_envs=8"),
        ("train --algo vader --updates 1 --device nowhere", "device='nowhere'"),
        ("train --algo vader --updates 1 --prompts nowhere", "nowhere"),
        ("train --config nowhere.yaml", "cannot read the config file nowhere.yaml"),
        ("train --config nowhere.ini", "ends in .yaml"),
        ("bench --algo vadre --updates 1", "did you mean 'vader'"),
        ("bench --preset quik", "did you mean 'quick'"),
        ("bench --preset quick --algoo vader", "--algo"),
        ("study", None),
        ("study nowhere elsewhere", "nowhere is no run"),
        ("report", None),
        ("sample", "--env MovingShapes-HPS"),
        ("sample --env MovingShapes-HPS --out x.avi", ".mp4 or .gif"),
        ("sample --env MovingShape-HPS", "did you mean MovingShapes"),
        ("sample --lora nowhere", "nowhere is no run and no LoRA: it does not exist"),
        ("sample --env MovingShapes-HPS --batch-size 0", "--batch-size"),
        ("eval", "--env MovingShapes-HPS"),
        ("eval --run nowhere", "nowhere is no run"),
        ("eval --run a --lora b", "give one of them"),
        ("eval --env MovingShapes-HPS --noise-seeds 0", "--noise-seeds must be"),
        ("eval --env MovingShapes-HPS --rewards HPT", "did you mean HPS"),
        ("export", None),
        ("export nowhere", "nowhere is no run"),
        ("download", "Name models or rewards"),
        ("download NoSuchModel", "NoSuchModel"),
    ],
)
def test_wrong_arguments_are_one_line(
    given: str, message: str | None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: Any = cli.main(given.split())
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and said.err.count("\n") == 1 and not said.out, said
    assert message is None or message in said.err, said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "algo: [", "is broken"),
        ("a.json", "[1]", "holds a list"),
        ("a.yaml", "# nothing\n", "a.yaml is empty"),
        ("a.toml", "algo = ", "is broken"),
        ("a.yaml", "alog: vader", "unknown key 'alog'; did you mean 'algo'"),
        ("a.yaml", "num_envs: many", "num_envs is 'many', expected a whole number"),
        ("a.yaml", "dtype: float8", "expected one of float32"),
        ("a.yaml", "algorithm: fast", "algorithm is 'fast'"),
        ("a.yaml", "algo: vader\nupdates: 1\nalgorithm: {lr: 1}", "unknown key 'lr'"),
        ("a.yaml", "set: [a=1]", "is for the command line"),
    ],
)
def test_wrong_config_files_are_one_line(
    name: str, text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    said = refused(["train", "--config", str(tmp_path / name), "--out", str(tmp_path / "out")], capsys)
    assert message in said and not (tmp_path / "out").exists()


def test_folders_that_are_no_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, trained: Path) -> None:
    capsys.readouterr()
    for command in (["sample", "--lora"], ["eval", "--run"], ["export"]):
        assert "is no run" in refused([*command, str(tmp_path)], capsys)
    old = write_run(tmp_path, "vader")  # a run without checkpoints
    assert "no checkpoint" in refused(["export", str(old)], capsys)
    policy = find(trained).weights
    assert "holds no run.json" in refused(["eval", "--run", str(policy)], capsys)
    assert "Give --env" in refused(["sample", "--lora", str(policy)], capsys)
    said = refused(["train", *SMALL, "--out", str(trained.parents[2])], capsys)
    assert "already holds a run" in said and "--resume" in said
    # The weights of one model on another one.
    assert refused(["sample", "--lora", str(trained), "--env", "MovingShapesUNet-HPS"], capsys)


# ------------------------------------------------------------------ configs


def test_values_of_files_become_the_fields_types(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("noise-level: 1e-1\nbudget: 60\nlora_targets: [to_q, to_k]\nnum_envs: 8\nalgorithm: {eps: 1e-9}\n")
    config, settings = train.from_file(str(path))
    assert config.process.noise_level == 0.1 and config.budget == "60" and config.batch.num_envs == 8
    assert config.policy.lora_targets == ("to_q", "to_k") and settings == {"eps": "1e-9"}
    for name, text in (("b.toml", 'algo = "vader"\n[algorithm]\neps = 1e-9\n'), ("c.json", '{"algo": "vader"}')):
        (tmp_path / name).write_text(text)
        assert train.from_file(str(tmp_path / name))[0].algo == "vader"
    for hint, good, bad in (
        (float, ("1e-3", 3, 0.5), (True, None, "x", [1])),
        (int, (3,), (3.5, "3", True, None)),
        (bool, (True,), (1, "True", None)),
        (int | None, (None, 3), ("x", 0.5)),
        (tuple[float, float], ([0.9, 0.99],), ([0.9], 0.9, "ab")),
        (dict[str, float] | None, ({"HPS": 1},), ([1], {"HPS": "x"})),
    ):
        for value in good:
            configs.converted(value, hint, "field")
        for value in bad:
            with pytest.raises(ValueError, match=r"field is .*, expected "):
                configs.converted(value, hint, "field")


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("algo: ddpo\nseed: 4\nnum_envs: 8\nalgorithm: {learning_rate: 1.0, eps: 0.5}\n")
    given = ["--config", str(path), "--seed", "5", "--set", "learning_rate=2e-3"]
    config, settings = train.read(given)
    assert (config.algo, config.seed, config.batch.num_envs) == ("ddpo", 5, 8)
    assert settings == {"learning_rate": 2e-3, "eps": 0.5}
    flat = configs.to_mapping(config)
    assert configs.from_mapping(TrainConfig, flat, "back") == config


def test_every_setting_of_every_algorithm_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    from algos.zoo import ZOO, load

    for name in ZOO:
        assert cli.main(["algos", name]) == 0
        said = capsys.readouterr().out
        docs = configs.field_docs(load(name)[1])
        fields = [field for field in docs if field != "seed"]
        assert fields and all(f"\n{field}=" in said and docs[field] for field in fields)
    assert cli.main(["algos"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{said}" for name in ZOO) and max(map(len, said.splitlines())) <= 80


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["envs"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name}" in said for name in (*vdm_env.list_models(), *vdm_env.list_rewards()))
    assert cli.main(["envs", "--ids"]) == 0
    assert capsys.readouterr().out.split() == vdm_env.list_envs()


# ------------------------------------------------------------------ runs


def test_a_run_is_repeated_exactly_from_its_config(trained: Path, tmp_path: Path) -> None:
    written = yaml.safe_load((trained / "config.yaml").read_text())
    assert written["algorithm"]["learning_rate"] == 1e-2 and written["algorithm"]["loss"] == "one_minus"
    assert (written["num_envs"], written["num_steps"], written["lora_rank"]) == (4, 2, 3)
    assert written["guidance_scale"] == 1.0 and written["sampler"] and written["decode_frames"] == "random1"
    assert not {"seed"} & set(written["algorithm"]) and not {"set", "config", "resume"} & set(written)
    out = tmp_path / "again"
    assert cli.main(["train", "--config", str(trained / "config.yaml"), "--out", str(out)]) == 0
    again = out / "vader" / "MovingShapes-HPS" / "seed_0"
    first, second = read_run(trained), read_run(again)
    assert first.about["config"] == second.about["config"]
    assert [row["value"] for row in first.evals] == [row["value"] for row in second.evals]
    files = [(find(folder).weights / "adapter_model.safetensors").read_bytes() for folder in (trained, again)]
    assert files[0] == files[1]
    kept = {k: v for k, v in yaml.safe_load((again / "config.yaml").read_text()).items() if k != "out"}
    assert kept == {k: v for k, v in written.items() if k != "out"}
    assert cli.main(["train", "--config", str(again / "config.yaml"), "--resume"]) == 0  # done: nothing is redone
    assert len(read_run(again).train) == 2


def test_settings_come_from_the_preset_or_the_paper() -> None:
    from algos.vader import VADERConfig
    from benchmarks.settings import algorithm_config

    found, note = algorithm_config(VADERConfig, "MovingShapes", {"eps": "1e-6"}, seed=3)
    assert (found.eps, found.seed) == (1e-6, 3) and note == "preset for MovingShapes"
    assert found.learning_rate == VADERConfig.preset("MovingShapes").learning_rate
    found, note = algorithm_config(VADERConfig, "VideoCrafter2", {}, seed=0)
    assert found == VADERConfig() and "no preset for VideoCrafter2" in note


def test_samples_show_both_models_from_the_same_noise(trained: Path, tmp_path: Path) -> None:
    from benchmarks.commands.sample import SampleConfig, prepare, videos
    from benchmarks.trained import Untrained

    config = SampleConfig(lora=str(trained), prompt=("a red circle moving left",), seed=(3, 4), out="x.gif")
    env, policy, rows = prepare(config)
    assert rows == [(0, 3), (0, 4)] and (env.num_envs, env.num_steps) == (2, 2)
    base, tuned = videos(env, Untrained(policy), rows), videos(env, policy, rows)
    plain = vdm_env.make("MovingShapes-HPS", prompts=list(config.prompt), num_envs=2, num_steps=2, guidance_scale=1.0)
    expected = videos(plain, plain.make_policy(lora_rank=1), rows)
    assert all(np.array_equal(a, b) for a, b in zip(base, expected, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(base, tuned, strict=True))
    for name in ("x.gif", "x.mp4"):
        given = ["--lora", str(trained), "--prompt", config.prompt[0], "--seed", "3", "--out", str(tmp_path / name)]
        assert cli.main(["sample", *given]) == 0
    with Image.open(tmp_path / "x.gif") as image, av.open(str(tmp_path / "x.mp4")) as video:
        stream = video.streams.video[0]
        assert image.n_frames == 8 and image.size == (stream.width, stream.height)


def test_a_film_has_a_row_for_each_prompt_and_a_column_for_each_model() -> None:
    red, blue = (np.broadcast_to(np.uint8(colour), (2, 40, 30, 3)) for colour in ((255, 0, 0), (0, 0, 255)))
    film = side_by_side([("one", [red, blue]), ("a long caption " * 9, [blue, red])], ["base", "trained"])
    assert film.shape[0] == 2 and film.shape[1] % 2 == film.shape[2] % 2 == 0
    side = 30 * 6  # the shorter side has at least 160 pixels
    for colour in (red, blue):
        assert (film == colour[0, 0, 0]).all(-1).sum() == 2 * 2 * side * 40 * 6
    left, right = film[0, :, : film.shape[2] // 2], film[0, :, film.shape[2] // 2 :]
    first = np.flatnonzero((left == (255, 0, 0)).all(-1).any(1))[0]
    assert first < np.flatnonzero((right == (255, 0, 0)).all(-1).any(1))[0]
    with pytest.raises(ValueError, match="of one shape"):
        side_by_side([("one", [red, blue[:1]])], ["base", "trained"])


def test_evaluation_before_and_after(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    given = ["--num-prompts", "3", "--noise-seeds", "2", "--num-envs", "4", "--rewards", "Brightness"]
    assert cli.main(["eval", "--run", str(trained), *given, "--out", str(out)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "gold" in said and max(map(len, said.splitlines()[:-2])) <= 80
    names = set(found["scores"])
    assert {"proxy", "gold", "reward/Brightness", "metric/steadiness", "metric/smoothness"} <= names
    # The reward before training by hand.
    env = vdm_env.make("MovingShapes-HPS", num_envs=6, num_steps=2, guidance_scale=1.0)
    policy = load_policy(env, None)
    ids = [env.prompts.ids("test")[place] for place in (0, 5, 10)]
    assert [env.prompts[index] for index in ids] == found["prompts"]
    obs, _ = env.reset(seed=[0, 1] * 3, options={"prompt_ids": np.repeat(ids, 2).tolist()})
    with torch.no_grad():
        for _ in range(env.num_steps):
            obs, reward, *_ = env.step(policy(obs))
    assert found["scores"]["proxy"]["before"]["mean"] == pytest.approx(float(reward.mean()), abs=1e-4)
    change = found["scores"]["proxy"]
    assert change["change"]["mean"] == pytest.approx(change["after"]["mean"] - change["before"]["mean"], abs=1e-9)
    assert change["change"]["low"] < change["change"]["mean"] < change["change"]["high"]


def test_intervals_are_over_prompts() -> None:
    before = {"r": {0: [0.0, 2.0], 1: [3.0, 3.0], 2: [1.0, None]}}
    after = {"r": {0: [2.0, 2.0], 1: [6.0, 6.0], 2: [9.0, 9.0]}}
    found = scores.compare(before, after)["r"]
    assert found["before"]["mean"] == 2.0 and found["before"]["prompts"] == 2
    # Changes 1 and 3: mean 2, standard error 1, t(0.975, 1) = 12.706.
    assert found["change"]["mean"] == 2.0 and found["change"]["high"] == pytest.approx(14.706, abs=1e-3)
    assert found["not_finite"] == 1


def test_export_of_a_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lora"
    assert cli.main(["export", str(trained), "--out", str(out)]) == 0
    names = {"adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {"README.md", "config.yaml"}
    card, run = (out / "README.md").read_text(), read_run(trained)
    before, after = (
        np.mean([row["value"] for row in run.evals if (row["reward"], row["update"]) == ("proxy", update)])
        for update in (0, 2)
    )
    assert f"| reward | {before:.4g} | {after:.4g} | {after - before:+.3g} [" in card
    assert "vader, 2 updates, seed 0" in card and "learning_rate: 0.01" in card and "vdm-env train --algo vader" in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    # What was written is sampled like the run itself.
    copy, original = find(out), find(trained)
    assert (copy.env, copy.process) == (original.env, original.process) and copy.run is None
    files = [found.weights / "adapter_model.safetensors" for found in (copy, original)]
    assert files[0].read_bytes() == files[1].read_bytes()

    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", no_network)
    capsys.readouterr()
    assert cli.main(["export", str(trained), "--out", str(out), "--push-to", "me/lora"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the hub did not take me/lora: no route" in said
    assert "expected user/name" in refused(["export", str(trained), "--push-to", "lora"], capsys)
