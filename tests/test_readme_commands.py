"""README's shell commands, configurations and Python examples run as written, made short by options behind them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from test_readme import BLOCKS

import vdm_env
from benchmarks import cli
from vdm_env.models.base import VideoModel

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# Options that are put behind a command; the last one given counts, and an update ends a run before its budget does.
SHORTER = {
    "train": "--updates 1 --num-envs 8 --num-steps 2 --eval-prompts 2 --eval-seeds 1 --eval-videos 1",
    "bench": "--updates 1 --num-envs 8 --num-steps 2 --eval-prompts 2 --eval-seeds 1 --seeds 0",
    "bench --preset": "--smoke",
    "demo": "--budget 2s",
    "sample": "",
    "eval": "--num-prompts 2 --noise-seeds 1 --num-envs 2",
    "export": "",
    "report": "",
    "envs": "",
    "algos": "",
    "download": "--dry-run",
}
# Settings of the algorithm a new user's command leaves to its preset: of an update of 8 videos.
SMALL = {"vader": "videos_per_update=8", "ddpo": "videos_per_rollout=8"}


def commands(text):
    """The commands of a page's sh blocks, one each, without comments."""
    lines = "\n".join(re.findall(r"```(?:sh|bash|shell|console)\n(.*?)```", text, re.DOTALL))
    lines = lines.replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in lines.splitlines()]
    split: list[list[str]] = []
    for words in found:
        split.append([])
        for word in words:
            split.append([]) if word in ("&&", ";") else split[-1].append(word)
    return [words for words in split if words]


def shortened(words):
    """A `vdm-env` command with what makes it short behind it."""
    name = "bench --preset" if words[1] == "bench" and "--preset" in words else words[1]
    assert name in SHORTER, f"say in SHORTER how `{shlex.join(words)}` is made short"
    more = shlex.split(SHORTER[name])
    for algo, setting in SMALL.items() if name == "train" else ():
        more += ["--set", setting] if algo in words else []
    if name == "train":
        more += ["--num-threads", str(torch.get_num_threads())]
    return [*words[1:], *more]


def run(words):
    """Runs a command of the README, in the folder of the test."""
    if words[0] == "vdm-env":
        assert cli.main(shortened(words)) == 0, words
    elif words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[:2] == ["pip", "install"] or words[0] == "uv":
        asked = re.findall(r"\[([\w,]+)\]", " ".join(words))
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {name for one in asked for name in one.split(",")} <= set(extras), words
    elif words[:2] == ["accelerate", "launch"] or words[0] == "torchrun":
        # Several processes are tests/test_distributed_runs.py's; here that the command behind it is one.
        assert "vdm-env" in words and shutil.which(words[0], path=Path(sys.executable).parent)
        with pytest.raises(SystemExit) as stop:
            cli.main([*words[words.index("vdm-env") + 1 :], "--help"])
        assert stop.value.code == 0
    elif words[:2] == ["python", "-m"]:
        done = subprocess.run([sys.executable, *words[1:3], "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (0, 2) and "No module named" not in done.stderr, done.stderr
    else:
        assert words[0] in ("git", "cd", "tensorboard", "wandb"), f"no test knows how to run `{shlex.join(words)}`"


def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (script,) = entry_points(group="console_scripts", name="vdm-env")
    assert script.load() is cli.main  # what is run below is what a shell would start
    found = commands(README)
    assert [words for words in found if words[:2] == ["vdm-env", "train"]]
    for words in found:
        run(words)
        assert "Traceback" not in capsys.readouterr().err, words
    assert list((tmp_path / "runs" / "train").glob("*/*/seed_0/DONE"))


def test_a_command_that_is_wrong_would_be_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (
        "```sh\n"
        "vdm-env train --env MovingShapes-HPS \\\n  --algoo vader   # no such option\n"
        "cd x && make no-such-target\n"
        "frobnicate\n"
        "```\n"
    )
    train, cd, make, unknown = commands(page)
    assert train == ["vdm-env", "train", "--env", "MovingShapes-HPS", "--algoo", "vader"] and cd == ["cd", "x"]
    with pytest.raises(SystemExit):
        run(train)
    for words in (make, unknown, ["vdm-env", "frobnicate"], ["pip", "install", ".[nothing]"]):
        with pytest.raises(AssertionError):
            run(words)


def test_configuration_files_are_read(tmp_path):
    from benchmarks.commands import train

    blocks = re.findall(r"```(yaml|toml)\n(.*?)```", README, re.DOTALL)
    assert blocks
    for kind, text in blocks:
        path = tmp_path / f"config.{kind}"
        path.write_text(text)
        config, settings = train.read(["--config", str(path)])
        train.check(config)
        assert config.algo is not None
        from algos.zoo import recipe
        from benchmarks.settings import algorithm_config

        algorithm_config(recipe(config.algo).config, config.env.partition("-")[0], settings, seed=0)


RUN_ELSEWHERE = ("env.make_policy(lora_rank=16)", "def redness", "class RewardWeighted")  # tests/test_readme.py


@pytest.mark.parametrize("code", [b for b in BLOCKS if not any(text in b for text in RUN_ELSEWHERE)])
def test_every_other_python_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if re.search(r"\n +spec = \.\.\.", code):  # an outline: its names must be those of the protocol
        scope: dict = {"vdm_env": vdm_env}
        exec(code.split("\n\n\n")[0], scope)
        outline = {name for name in vars(scope["MyModel"]) if not name.startswith("_")}
        names = {name for name in vars(VideoModel) if not name.startswith("_")} | set(VideoModel.__annotations__)
        assert outline <= names, outline - names
        return
    exec(code, {"__name__": "readme"})
