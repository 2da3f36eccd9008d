"""Every option of every command with a value it cannot have: one line on standard error, exit code 2, nothing done."""

from __future__ import annotations

import re

import pytest

from algos.zoo import ZOO
from benchmarks import cli, reward_vs_gpu_hours
from benchmarks.presets import presets

# What a command cannot do without, so that the option is what is wrong.
NEEDED = {
    "train": ["--algo", "vader", "--updates", "1"],
    "bench": ["--algo", "vader", "--updates", "1"],
    "bench --preset quick": [],
    "study": ["a", "b"],
    "report": ["nowhere"],
    "export": ["nowhere"],
    "download": ["MovingShapes"],
}
COMMANDS = [*cli.COMMANDS, "bench --preset quick"]


def answer(arguments, capsys):
    """The exit code and what was said on standard error."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Commands write below here, and must not; nor may a benchmark begin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reward_vs_gpu_hours, "_execute", lambda *_: pytest.fail("it began to train"))
    yield
    assert not list(tmp_path.rglob("*"))


def refused(arguments, capsys):
    code, out, err = answer(arguments, capsys)
    assert code == 2 and err.count("\n") == 1 and not out and "Traceback" not in err, (arguments, code, out, err)
    assert err.startswith(("vdm-env", "reward_vs_gpu_hours", "report", "demo")), err
    return err


def options(command, capsys):
    """Its options with the kind of their value, as the help shows it: {"--seed": "INT"}."""
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    return dict(re.findall(r"(--[a-z][a-z-]+) ((?:[A-Z]+|\{[^}]*\}))", said))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_value_of_another_kind_is_refused_by_every_option(command, capsys):
    found = options(command, capsys)
    wrong = {name: kind for name, kind in found.items() if kind in ("INT", "FLOAT") or kind.startswith("{")}
    numbers = ("train", "bench", "bench --preset quick", "sample", "eval", "study", "report", "export", "demo")
    assert bool(wrong) == (command in numbers), found
    for name in wrong:
        err = refused([*command.split(), *NEEDED.get(command, []), name, "soon"], capsys)
        assert name in err or "soon" in err, err


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_without_its_value_is_refused(command, capsys):
    for name in options(command, capsys):
        if name != "--heldout":  # of which there may be none
            refused([*command.split(), *NEEDED.get(command, []), name], capsys)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("more", [["--no-such-option"], ["--no-such-option", "3"], ["too", "many", "words", "here"]])
def test_unknown_options_and_words_are_refused(command, more, capsys):
    if command == "download" and more[0] == "too":
        more = ["--folder"]  # it takes any number of names
    refused([*command.split(), *NEEDED.get(command, []), *more], capsys)


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--updates 0", "updates"),
        ("--budget soon", "soon"),
        ("--evals -1", "eval"),
        ("--eval-prompts 0", "prompts"),
        ("--noise-seeds 0", "seeds"),
        ("--seeds x", "seeds"),
        ("--jobs -1", "jobs"),
        ("--algo vadre", "did you mean 'vader'"),
        ("--env-id MovingShape-HPS", "MovingShapes"),
        ("--set vadre.learning_rate=1", "vad"),
        ("--set learning_rate", "name=value"),
        ("--splits tset", "tset"),
        ("--heldout HPT", "HPT"),
        ("--num-threads 0", "threads"),
    ],
)
def test_every_preset_refuses_what_it_cannot_do(preset, more, message, capsys):
    assert message in refused(["bench", "--preset", preset, *more.split()], capsys)


@pytest.mark.parametrize("name", ZOO)
def test_every_algorithm_refuses_a_setting_it_does_not_have(name, capsys):
    given = ["train", "--algo", name, "--updates", "1", "--set"]
    assert "learning_rat" in refused([*given, "learning_rat=1"], capsys)
    assert "learning_rate" in refused([*given, "learning_rate=fast"], capsys)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("train --algo vader --updates 1 --watch tensorbord", "did you mean 'tensorboard'"),
        ("train --algo vader --updates 1 --on-oom retry", "halve_micro_batch"),
        ("train --algo vader --updates 1 --checkpoint-every -1", "checkpoint"),
        ("train --algo vader --updates 1 --lora-rank -1", "rank"),
        ("train --algo vader --updates 1 --num-steps 0", "num_steps"),
        ("train --algo vader --updates 1 --noise-level -1", "noise"),
        ("train --algo vader --updates 1 --sampler ddpm9", "sampler"),
        ("train --algo vader --updates 1 --num-envs 0", "num_envs"),
        ("train --algo vader --updates 1 --num-envs 8 --group-size 3", "group_size"),
        ("train --algo vader --updates 1 --eval-split tset", "tset"),
        ("train --algo nowhere:Class --updates 1", "nowhere"),
        ("train --algo json:Class --updates 1", "Class"),
        ("train --algo vader --updates 1 --seed 9223372036854775808", "outside 0 .. 9223372036854775806"),
        ("train --algo vader --updates 1 --device meta", "device='meta'"),
        ("train --algo vader --updates 1 --env MovingShapesUNet-HPS --num-steps 100000", "at most 1000"),
        ("train --algo vader --updates 1 --keep-checkpoints 0", "--keep-checkpoints must be at least 1"),
        ("train --algo vader --updates 1 --skip-nonfinite -1", "--skip-nonfinite must be at least 0"),
        ("train --algo vader --updates 1 --heldout HPS", "'HPS' is optimised"),
        ("train --algo vader --updates 1 --prompts objects --prompt-column text", "is a set of the package"),
        ("train --algo vader --updates 1 --out /proc/runs", "/proc/runs"),
        ("sample --env MovingShapes-HPS --seed 9223372036854775808", "outside 0 .. 9223372036854775806"),
        ("sample --env MovingShapes-HPS --out /proc/x.gif", "/proc/x.gif cannot be written"),
        ("eval --env MovingShapes-HPS --out /proc/x.json", "/proc/x.json cannot be written"),
        ("algos vader extra", "extra"),
        ("sample --env MovingShapes-HPS --num-steps 0", "num_steps"),
        ("eval --env MovingShapes-HPS --num-prompts 0", "prompts"),
        ("eval --env MovingShapes-HPS --split tset", "tset"),
        ("report nowhere --threshold x", "threshold"),
        ("report nowhere", "nowhere"),
        ("demo --seed -1", "seed"),
        ("study a b --port 99999999", None),
        ("bench --preset", None),
        ("bench --preset=", None),
    ],
)
def test_what_is_of_the_right_kind_and_still_wrong(given, message, capsys):
    err = refused(given.split(), capsys)
    assert message is None or message in err, err
