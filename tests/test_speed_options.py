"""Options for speed and memory on the command line: what `train`, `sample` and `eval` make of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import vdm_env
from benchmarks.arguments import parse
from benchmarks.commands.evaluate import EvalConfig
from benchmarks.commands.sample import SampleConfig
from benchmarks.commands.train import TrainConfig, read
from benchmarks.options import ProcessOptions, make_env, resolved_process
from benchmarks.trained import find, merged

FLAGS = ["--guidance-interval", "0.2", "inf", "--compile", "--tile-decoding", "--decode-chunk", "3"]
FLAGS += ["--free-text-encoder"]
WANTED = {
    "guidance_interval": (0.2, math.inf),
    "compile": True,
    "tile_decoding": True,
    "decode_chunk": 3,
    "free_text_encoder": True,
}


@pytest.mark.parametrize("kind", [TrainConfig, SampleConfig, EvalConfig])
def test_every_command_takes_them(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    process = parse(kind, FLAGS, "vdm-env").process
    assert {name: getattr(process, name) for name in WANTED} == WANTED
    given: dict[str, Any] = {}
    monkeypatch.setattr(vdm_env, "make", lambda env_id, **options: given.update(options))
    make_env("ModelScope-HPS", replace(process, device="cpu"))
    assert {name: given[name] for name in WANTED} == WANTED
    given.clear()
    make_env("ModelScope-HPS", ProcessOptions(device="cpu"))
    assert not {"compile", "tile_decoding", "free_text_encoder"} & set(given)
    assert "guidance_interval" not in given and "decode_chunk" not in given


def test_help_names_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"], "vdm-env train")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--guidance-interval" in text and "standard deviations of the noise" in text
    assert "frames decoded together" in text and "None: all" in text
    assert "--compile" in text and "C++ compiler" in text


def test_a_run_keeps_them_and_another_machine_chooses_its_own(tmp_path: Path) -> None:
    """The interval and tiles change videos; compilation and a freed text encoder do not."""
    values = {**WANTED, "guidance_interval": [0.2, math.inf], "guidance_scale": 3.0, "env": "ModelScope-HPS"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    config, _ = read(["--algo", "vader", "--updates", "1", "--config", str(tmp_path / "config.yaml")])
    assert {name: getattr(config.process, name) for name in WANTED} == WANTED
    (tmp_path / "adapter_model.safetensors").touch()
    process = find(tmp_path).process
    assert process.guidance_interval == (0.2, math.inf) and process.tile_decoding and process.decode_chunk == 3
    assert not process.compile and not process.free_text_encoder
    assert merged(process, ProcessOptions(compile=True)).compile
    assert merged(process, ProcessOptions(guidance_scale=1.0)).guidance_interval is None
    assert merged(process, ProcessOptions(guidance_scale=2.0)).guidance_interval == (0.2, math.inf)


def test_an_interval_in_the_record_of_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from benchmarks.commands import train

    arguments = ["--algo", "rwr", "--updates", "1", "--set", "videos_per_update=2", "--set", "videos_per_step=2"]
    arguments += ["--num-envs", "2", "--group-size", "1", "--num-steps", "2"]
    arguments += ["--eval-prompts", "1", "--eval-seeds", "1", "--no-sample-mp4"]
    arguments += ["--out", str(tmp_path), "--num-threads", "1"]
    assert train.main([*arguments, "--guidance-scale", "2", "--guidance-interval", "0.1", "inf"]) == 0
    (folder,) = (path.parent for path in tmp_path.rglob("run.json"))
    assert json.loads((folder / "run.json").read_text())["task"]["guidance_interval"] == [0.1, None]
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["guidance_interval"] == [0.1, math.inf] and written["compile"] is False
    assert find(folder).process.guidance_interval == (0.1, math.inf)
    (folder / "config.yaml").unlink()  # as of a run that `algos.run` made
    assert find(folder).process.guidance_interval == (0.1, math.inf)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        train.main([*arguments, "--fresh", "--guidance-interval", "0.1", "inf"])
    assert "guidance_scale is 1.0, which is none" in capfd.readouterr().err


def test_options_that_were_resolved() -> None:
    env = make_env(
        "MovingShapes-HPS", ProcessOptions(guidance_scale=2.0, guidance_interval=(0.5, 3.0), device="cpu"), num_envs=1
    )
    assert resolved_process(env, ProcessOptions()).guidance_interval == (0.5, 3.0)
