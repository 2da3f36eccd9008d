"""Trained weights in a folder, whatever kind of folder it is: a run's, a checkpoint's, an exported or a PEFT one."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.commands.train import from_file
from benchmarks.options import BatchOptions, PolicyOptions, ProcessOptions, make_policy
from benchmarks.records import Run, read_run
from benchmarks.runs import CONFIG

Which = Literal["newest", "best"] | int
_TASK = ("num_steps", "sampler", "noise_level", "guidance_scale", "num_frames")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Trained weights, and what is known about how they were trained."""

    weights: Path
    """folder that `policy.load` reads"""
    env: str | None = None
    """environment they were trained in; None: not known"""
    process: ProcessOptions = ProcessOptions()
    """sampling they were trained with, where that is known"""
    batch: BatchOptions = BatchOptions()
    """prompts they were trained with, where that is known"""
    run: Run | None = None
    """the run they come from, if the folder is a run's"""
    update: int | None = None
    """update of the run after which they were saved"""


def find(folder: str | Path, which: Which = "newest") -> Trained:
    """Trained weights by folder.

    Args:
        folder: of a run, of a checkpoint, of an export, or any with a PEFT adapter.
        which: of a run's checkpoints; an int is an update. Where the newest one is damaged, the one before it is taken,
            which is said on standard error.

    Raises:
        ValueError: the folder is nothing of that kind, the run has no such checkpoint, or its files are not the ones
            that were written.
    """
    from algos.checkpoint import MANIFEST, verify

    folder = Path(folder)
    if (folder / "run.json").is_file():
        return _of_run(folder, which)
    sealed = folder.parent if folder.name == "policy" else folder
    if (sealed / MANIFEST).is_file():
        verify(sealed)
    for place in (folder, folder / "policy"):
        if (place / "adapter_model.safetensors").is_file() or (place / "model.safetensors").is_file():
            return replace(_settings(folder), weights=place)
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        raise ValueError(
            f"{folder} has a LoRA in diffusers' format only; give the folder with adapter_model.safetensors"
        )
    there = "it does not exist" if not folder.exists() else "it holds no run.json and no adapter_model.safetensors"
    raise ValueError(f"{folder} is no run and no LoRA: {there}; give a folder that vdm-env train or policy.save wrote")


def _of_run(folder: Path, which: Which) -> Trained:
    from algos.checkpoint_store import chosen_checkpoint

    run = read_run(folder)
    try:
        checkpoint, damaged = chosen_checkpoint(folder, which)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    for wrong in damaged:
        print(f"{wrong}; taken is {checkpoint.name}", file=sys.stderr)
    found = replace(_settings(folder), weights=checkpoint / "policy", run=run, update=int(checkpoint.name))
    if found.env is None:  # a run of `algos.run` or of the demo, which wrote no config.yaml
        process = ProcessOptions(**{name: run.task[name] for name in _TASK if name in run.task})
        interval = run.task.get("guidance_interval")
        process = replace(
            process,
            height=run.task.get("height_px"),
            width=run.task.get("width_px"),
            guidance_interval=interval and (interval[0], math.inf if interval[1] is None else interval[1]),
        )
        found = replace(found, env=run.task.get("env_id"), process=process)
    return found


def _settings(folder: Path) -> Trained:
    """What a folder's config.yaml says, if there is one.

    Device, compilation (rounding apart) and what becomes of the text encoder change no video: they are this machine's
    choice.
    """
    if not (folder / CONFIG).is_file():
        return Trained(weights=folder)
    config, _ = from_file(str(folder / CONFIG))
    level = config.evaluation.eval_noise_level
    noise = config.process.noise_level if level is None else level
    process = replace(config.process, device="auto", noise_level=noise, compile=None, free_text_encoder=None)
    return Trained(weights=folder, env=config.env, process=process, batch=config.batch)


def merged(trained: ProcessOptions, given: ProcessOptions) -> ProcessOptions:
    """The sampling of training, changed by the options that were given (those that are not None).

    The device is this machine's choice. No guidance (a scale of 1) has no interval either.
    """
    changes = {field.name: getattr(given, field.name) for field in fields(given)}
    if given.guidance_scale == 1.0:
        trained = replace(trained, guidance_interval=None)
    return replace(trained, **{name: value for name, value in changes.items() if value is not None})


def environment(trained: Trained, given: str | None) -> str | None:
    """The id of the environment to work in: the one that was given, or that of training; None where neither is known.

    Raises:
        ValueError: it has another model than the weights were trained on, or is no id.
    """
    if given is None or trained.env is None:
        return given or trained.env
    from vdm_env.registry import parse_id

    asked, own = parse_id(given)[0], trained.env.removeprefix("vdm_env/").partition("-")[0]
    if asked != own:
        raise ValueError(
            f"--env {given} has the model {asked}, and the weights in {trained.weights} were trained on {own} "
            f"({trained.env}): leave --env out, or name an environment of {own}"
        )
    return given


def load_policy(env: Any, weights: Path | None) -> Any:
    """A policy with trained weights, of the rank and layers they were trained with; None: the untrained model.

    Raises:
        ValueError: a damaged file, or weights that do not belong to this model.
    """
    if weights is None:
        return make_policy(env, PolicyOptions(lora_rank=1))
    file = weights / "adapter_config.json"
    options = PolicyOptions(lora_rank=0)
    if file.is_file():
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            targets = about["target_modules"]
            options = PolicyOptions(
                lora_rank=int(about["r"]), lora_alpha=float(about["lora_alpha"]),
                lora_targets=tuple([targets] if isinstance(targets, str) else targets),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no configuration of a LoRA ({error!r}); save it again") from error
    elif (weights / "adapter_model.safetensors").is_file():
        raise ValueError(f"{weights} has adapter_model.safetensors without adapter_config.json, which says its rank")
    policy = make_policy(env, options)
    policy.load(weights)
    return policy


class Untrained:
    """The model before training as a policy on the same network: `policy` with its reference switched on."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __call__(self, obs: Any) -> Any:
        """The reference's action."""
        with self.policy.reference():
            return self.policy(obs)
