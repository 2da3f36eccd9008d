"""`vdm-env export`: the weights of a run for others, with a model card."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.arguments import one_line, parse, refuse
from benchmarks.options import ProcessOptions

PROGRAM = "vdm-env export"
_CARD_SAMPLING = ("num_steps", "sampler", "noise_level", "guidance_scale", "guidance_interval")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write the LoRA of a run in the formats of PEFT and diffusers, with a model card, and push it if asked to."""

    run: tyro.conf.Positional[str]
    """folder of the run"""
    out: str | None = None
    """folder to write; None: export in the run's folder"""
    checkpoint: Literal["newest", "best"] | int = "newest"
    """of the run's checkpoints; best: with the highest reward in an evaluation; a number: of that update"""
    push_to: str | None = None
    """repository on the hub, user/name, to upload to with your own login (hf auth login); None: nothing is sent"""
    public: bool = False
    """a repository that is made is public"""
    process: ProcessOptions = field(default_factory=ProcessOptions)


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code: 0, or 1 if writing or uploading failed.

    Raises:
        SystemExit: code 2 for wrong usage, before anything is written.
    """
    config = parse(ExportConfig, arguments, PROGRAM)
    try:
        trained, policy = prepare(config)
    except (ValueError, TypeError, OSError) as error:
        refuse(PROGRAM, one_line(error))
    from algos.export import PushError, push

    try:
        folder = Path(config.out or Path(config.run) / "export")
        for path in write(trained, policy, folder):
            print(path)
        if config.push_to is not None:
            print(push(folder, config.push_to, private=not config.public))
    except PushError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # a full disk, a refused name of a repository
        print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def prepare(config: ExportConfig) -> tuple[Any, Any]:
    """The run's weights and a policy that has them.

    Raises:
        ValueError, TypeError, OSError: no run, or one whose model cannot be made here.
    """
    from benchmarks.options import make_env
    from benchmarks.trained import find, load_policy, merged

    trained = find(config.run, config.checkpoint)
    if trained.run is None or trained.env is None:
        raise ValueError(f"{config.run} is no run: it holds no run.json")
    if config.push_to is not None and len([part for part in config.push_to.split("/") if part]) != 2:
        raise ValueError(f"--push-to {config.push_to}: expected user/name")
    env = make_env(trained.env, merged(trained.process, config.process), num_envs=1)
    return trained, load_policy(env, trained.weights)


def write(trained: Any, policy: Any, folder: Path) -> list[Path]:
    """Writes weights, card and config; returns the files."""
    from algos.export import export, write_card
    from benchmarks.runs import CONFIG

    files = export(policy, folder)
    files.append(write_card(card(trained, policy, diffusers=len(files) > 2), policy, folder))
    if (trained.run.folder / CONFIG).is_file():  # `vdm-env sample --lora` reads environment and sampling there
        shutil.copyfile(trained.run.folder / CONFIG, folder / CONFIG)
        files.append(folder / CONFIG)
    return files


def card(trained: Any, policy: Any, *, diffusers: bool) -> Any:
    """What the model card says about a run."""
    from algos.export import Card
    from benchmarks.configs import read_mapping
    from benchmarks.runs import CONFIG
    from vdm_env.download import plan

    run, model = trained.run, policy._mdp.model
    task = run.task
    fetches = plan(model.spec.name) if model.spec.name in _models() else []
    known = model.spec.world is not None
    licences = dict.fromkeys(f"{fetch.licence} ({fetch.repository})" for fetch in fetches)
    file = run.folder / CONFIG
    changes = _changes(run, trained.update)
    return Card(
        title=f"{model.spec.name} aligned with {run.algo} on {task.get('reward_train', trained.env)}",
        env_id=trained.env,
        model=model.spec.name,
        repositories=[fetch.repository for fetch in fetches],
        licence="Apache-2.0, with vdm_env" if known else "; ".join(licences) or "not known here: ask its publisher",
        spdx="apache-2.0" if known else "other",
        reward=str(task.get("reward_train", trained.env)),
        algorithm=run.algo,
        updates=trained.update,
        seed=run.seed,
        command=task.get("command"),
        config=read_mapping(file) if file.is_file() else {"algorithm": run.about.get("config", {})},
        sampling={n: v for n in _CARD_SAMPLING if (v := getattr(trained.process, n)) is not None},
        changes=changes,
        interval=f"[low, high]: 95 % interval over {len(run.per_prompt('proxy', 0))} prompts of this one seed.",
        limits=task.get("limits", ()),
        diffusers=diffusers,
    )


def _models() -> list[str]:
    from vdm_env.models import MODELS

    return list(MODELS)


def _changes(run: Any, update: int) -> list[Any]:
    """Reward and gold score before training and at an update, where both were evaluated."""
    import math

    from algos.export import Change
    from benchmarks.aggregate import paired_difference
    from benchmarks.records import GOLD, PROXY

    found: list[Any] = []
    for name, word in ((PROXY, "reward"), (GOLD, "gold score")):
        before, after = run.per_prompt(name, 0), run.per_prompt(name, update)
        shared = [prompt for prompt in before if prompt in after]
        if shared:
            interval, _ = paired_difference(after, before)
            known = not math.isnan(interval.low)
            means = [sum(values[prompt] for prompt in shared) / len(shared) for values in (before, after)]
            low, high = (interval.low, interval.high) if known else (None, None)
            found.append(Change(name=word, before=means[0], after=means[1], low=low, high=high))
    return found
