"""Trained weights by folder: damaged ones are found, options that were given win, and other models are refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import cli
from benchmarks.commands.evaluate import EvalConfig
from benchmarks.commands.evaluate import prepare as prepare_evaluation
from benchmarks.commands.sample import SampleConfig, prepare
from benchmarks.configs import read_mapping
from benchmarks.options import ProcessOptions, check_target
from benchmarks.trained import Trained, environment, find, merged
from tests.test_wrong_arguments import answer

SMALL = [
    "--algo", "vader", "--updates", "3", "--num-envs", "2", "--num-steps", "2", "--num-frames", "2", "--eval-prompts",
    "1", "--eval-seeds", "1", "--eval-videos", "0", "--eval-every", "2", "--lora-rank", "1", "--set",
    "videos_per_update=2", "--checkpoint-every", "1", "--keep-checkpoints", "3", "--dtype", "bfloat16",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in bfloat16 with the checkpoints of its three updates."""
    out = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", *SMALL, "--out", str(out)]) == 0
    return out / "vader" / "MovingShapes-HPS" / "seed_0"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def flip(run: Path, update: int) -> None:
    """Changes one byte of a checkpoint's adapter."""
    path = run / "checkpoints" / f"{update:06d}" / "policy" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def mark_best(run: Path, update: int) -> None:
    (run / "checkpoints" / "best.json").write_text(json.dumps({"update": update, "reward": 1.0}))


def test_the_newest_intact_checkpoint_is_taken(run, tmp_path, capsys):
    assert find(run).update == 3 and not capsys.readouterr().err
    flip(run, 3)
    assert find(run).update == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "000003 is damaged: policy/adapter_model.safetensors" in said
    assert "taken is 000002" in said
    assert cli.main(["export", str(run), "--out", str(tmp_path / "export")]) == 0
    assert "vader, 2 updates" in (tmp_path / "export" / "README.md").read_text()
    flip(run, 2)
    flip(run, 1)
    with pytest.raises(ValueError, match="no intact checkpoint"):
        find(run)


@pytest.mark.parametrize("which", ["best", "3"])
@pytest.mark.parametrize("command", ["sample --lora", "eval --run", "export"])
def test_a_damaged_checkpoint_that_was_asked_for_is_refused(command, which, run, tmp_path, capsys):
    flip(run, 3)
    mark_best(run, 3)
    out = tmp_path / {"sample": "x.gif", "eval": "x.json", "export": "x"}[command.split()[0]]
    code, _, err = answer([*command.split(), str(run), "--checkpoint", which, "--out", str(out)], capsys)
    assert code == 2 and err.count("\n") == 1 and "is damaged" in err and not out.exists()
    assert "intact are the checkpoints of update 1, 2" in err


def test_a_checkpoint_by_its_number(run):
    assert find(run, 2).update == 2
    with pytest.raises(ValueError, match="no checkpoint of update 7; it has those of update 1, 2, 3"):
        find(run, 7)


def test_a_damaged_checkpoint_that_was_given_by_its_folder_is_refused(run):
    folder = run / "checkpoints" / "000003"
    for place in (folder, folder / "policy"):
        assert find(place).weights == folder / "policy"
    flip(run, 3)
    for place in (folder, folder / "policy"):
        with pytest.raises(ValueError, match="000003 is damaged"):
            find(place)


def test_a_best_checkpoint_that_is_not_there(run, capsys):
    mark_best(run, 9)
    code, _, err = answer(["sample", "--lora", str(run), "--checkpoint", "best"], capsys)
    assert code == 2 and err.count("\n") == 1
    assert "names update 9 whose checkpoint is not there; take --checkpoint newest" in err
    (run / "checkpoints" / "best.json").write_text("{}")
    with pytest.raises(ValueError, match=r"best\.json is damaged"):
        find(run, "best")


def test_options_that_are_given_win_over_those_of_the_run(trained, tmp_path):
    out = str(tmp_path / "x.gif")
    own, _, _ = prepare(SampleConfig(lora=str(trained), out=out))
    given, _, _ = prepare(SampleConfig(lora=str(trained), out=out, process=ProcessOptions(dtype="float32")))
    half = [torch.bfloat16 in {one.dtype for one in env.model.denoiser.parameters()} for env in (own, given)]
    assert half == [True, False]
    run = ProcessOptions(weights="random", scale="tiny", dtype="bfloat16", tile_decoding=True, guidance_scale=2.0)
    asked = ProcessOptions(weights="pretrained", scale="full", tile_decoding=False)
    assert merged(run, asked) == ProcessOptions(
        weights="pretrained", scale="full", dtype="bfloat16", tile_decoding=False, guidance_scale=2.0
    )
    assert merged(run, ProcessOptions()) == run
    # What is written down says everything, also what nobody asked for.
    written = read_mapping(trained / "config.yaml")
    names = ("dtype", "weights", "scale", "compile", "tile_decoding")
    assert [written[name] for name in names] == ["bfloat16", "pretrained", "full", False, False]


def test_an_evaluation_knows_that_the_weights_of_its_run_are_random(run, tmp_path):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("weights: pretrained", "weights: random"))
    out = str(tmp_path / "x.json")
    with pytest.warns(UserWarning):
        assert prepare_evaluation(EvalConfig(run=str(run), out=out, num_prompts=1))[-1] is True
    given = ProcessOptions(weights="pretrained")
    assert prepare_evaluation(EvalConfig(run=str(run), out=out, num_prompts=1, process=given))[-1] is False


@pytest.mark.parametrize("command", ["sample --lora", "eval --run"])
def test_the_environment_of_another_model_is_refused(command, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = answer([*command.split(), str(trained), "--env", "MovingShapesUNet-HPS"], capsys)
    assert code == 2 and err.count("\n") == 1
    assert "--env MovingShapesUNet-HPS has the model MovingShapesUNet" in err and "trained on MovingShapes (" in err
    found = Trained(weights=tmp_path, env="MovingShapes-HPS")
    assert environment(found, "MovingShapes-Aesthetic") == "MovingShapes-Aesthetic"
    assert environment(found, None) == "MovingShapes-HPS" and environment(Trained(weights=tmp_path), None) is None


def test_a_file_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("old")
    check_target(tmp_path / "a" / "b" / "x.json")
    check_target(tmp_path / "file")
    for path in (tmp_path / "file" / "x.json", tmp_path, "/proc/x.json"):
        with pytest.raises(ValueError, match="cannot be written"):
            check_target(path)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"] and (tmp_path / "file").read_text() == "old"


def test_a_table_is_shown_even_where_its_file_cannot_be_written(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.json"
    given = ["--num-prompts", "1", "--noise-seeds", "1", "--num-envs", "1", "--out", str(out)]
    monkeypatch.setattr("benchmarks.commands.evaluate.check_target", lambda path: path.mkdir())  # taken meanwhile
    code, said, err = answer(["eval", "--run", str(trained), *given], capsys)
    assert code == 1 and "gold" in said and err.count("\n") == 1


def test_one_evaluated_video_has_no_interval(trained):
    from benchmarks.runs import results

    lines = results(trained)
    assert any("an interval needs two evaluated videos" in line for line in lines)
    assert not any(str(math.nan) in line for line in lines)
