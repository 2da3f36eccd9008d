"""What `vdm-env train` does: an environment, a policy, an algorithm and its evaluation from options, and their run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.arguments import one_line
from benchmarks.commands.train import TrainConfig
from benchmarks.configs import to_mapping, write_yaml
from benchmarks.evaluation import evaluators
from benchmarks.options import (
    UNLESS_GIVEN,
    chosen_frames,
    make_env,
    make_policy,
    own_prompts,
    resolved_batch,
    resolved_process,
    world_of,
)
from benchmarks.plan import run_folder
from benchmarks.records import GOLD, PROXY, read_run
from benchmarks.summary import show
from benchmarks.tables import change
from benchmarks.training import Built, Setup, SetupError, build_algorithm, describe

CONFIG = "config.yaml"
QUESTION = "Does training raise the reward on prompts it did not see?"
_NUMBERS = (
    "weights",
    "scale",
    "compile",
    "tile_decoding",
    "decode_chunk",
)  # of the process: they change what comes out


@dataclass(frozen=True, kw_only=True)
class Resolved(Built):
    """The parts of a run with what there is to write down about them."""

    values: dict[str, Any]
    """contents of config.yaml: every option by name, and "algorithm" """


def build(config: TrainConfig, settings: Mapping[str, Any]) -> Resolved:
    """Everything a run needs.

    Raises:
        ValueError, TypeError, OSError: what was asked for is impossible, or pretrained weights are missing.
    """
    import torch

    from algos.zoo import recipe

    assert config.algo is not None  # checked before
    found = recipe(config.algo)
    own: dict[str, Any] = dict(found.env)
    if not world_of(config.env):
        own["num_envs"] = own.get("group_size", 1)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    given = {**asdict(config.batch), "decode_frames": chosen_frames(config.batch.decode_frames)}
    given = {name: value for name, value in given.items() if not name.startswith("prompt_")}  # how a file is read
    given |= own_prompts(config.batch)
    env = make_env(config.env, config.process, seed=config.seed, defaults=own, **given)
    _check_evaluated(env, config)
    policy, algorithm, chosen, note = build_algorithm(
        found, env, lambda: make_policy(env, config.policy, config.seed), settings, config.seed
    )
    asked = config.evaluation
    levels, spec = (asked.eval_noise_level, config.process.noise_level), env.model.spec
    level = next(
        (one for one in levels if one is not None), spec.noise_level if env.mdp.sampler == spec.sampler else None
    )
    whole = replace(
        config,
        process=resolved_process(env, config.process),
        batch=resolved_batch(env, config.batch),
        evaluation=replace(asked, eval_noise_level=level),
        num_threads=torch.get_num_threads(),
    )
    once = ("set", "config", "resume", "fresh")  # they hold for one call only
    values = {name: value for name, value in to_mapping(whole).items() if name not in once}
    named = asdict(chosen) if is_dataclass(chosen) and not isinstance(chosen, type) else chosen
    values["algorithm"] = {name: value for name, value in named.items() if name != "seed"}
    return Resolved(
        env=env,
        policy=policy,
        algorithm=algorithm,
        evaluators=evaluators(
            env,
            [asked.eval_split],
            num_prompts=asked.eval_prompts,
            noise_seeds=range(asked.eval_seeds),
            heldout=asked.heldout,
            num_videos=asked.eval_videos,
            noise_level=level,
        ),
        note=note,
        config=chosen,
        values=values,
    )


def _check_evaluated(env: Any, config: TrainConfig) -> None:
    """Refuses a split of the evaluation that the prompts do not have, with the ways out; before a policy is made."""
    split = config.evaluation.eval_split
    try:
        env.prompt_ids(split)
    except ValueError as error:
        file = config.batch.prompts
        if file is None:
            raise
        from vdm_env.prompt_sets.files import SPLITS_FILE

        raise ValueError(
            f"none of the {len(env.prompts)} texts of {file} is in the split {split!r}, which a hash of each text "
            f"decides: evaluate on those of training with --eval-split train, give more texts, or write {SPLITS_FILE}"
        ) from error


def start(config: TrainConfig, settings: Mapping[str, Any], *, command: str) -> Any:
    """Builds and runs; the run's folder gets config.yaml before the first update.

    Returns:
        The `algos.run.RunResult`.

    Raises:
        SetupError: the options fit no environment, algorithm or folder; nothing was trained.
        Exception: whatever stopped the training, which its folder records as FAILED.
    """
    started = time.perf_counter()
    from algos import distributed

    try:
        ranks = distributed.current()  # before anything is built: it also gives every process a GPU of its own
    except ValueError as error:
        raise SetupError(one_line(error)) from error
    with distributed.announcing():
        return _start(config, settings, ranks, command=command, started=started)


def _start(config: TrainConfig, settings: Mapping[str, Any], ranks: Any, *, command: str, started: float) -> Any:
    """`start` in each of the processes, of which the first writes."""
    import algos
    from algos.alarm import Alarm
    from algos.zoo import recipe

    assert config.algo is not None
    label = recipe(config.algo).label
    folder = run_folder(config.out, label, config.env, config.seed)
    there = (folder / "run.json").exists()
    if there and not (config.resume or config.fresh):
        raise SetupError(f"{folder} already holds a run: choose another --out, go on with --resume, or give --fresh")
    try:
        built = build(config, settings)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise SetupError(one_line(error)) from error
    every = config.evaluation.eval_every
    forwards = built.env.mdp.counters.denoiser_forwards
    try:
        if ranks.main and not (there and config.resume):
            _write_config(folder, built.values)
        if ranks.main:
            print(f"{config.algo} on {config.env}: {built.note}; every setting is in {folder / CONFIG}", flush=True)
        return algos.run(
            built.algorithm,
            out=folder,
            budget=config.budget,
            updates=config.updates,
            evaluate=built.evaluators,
            eval_every=int(every) if every is not None and every.isdecimal() else every,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            skip_nonfinite=config.skip_nonfinite,
            alarm=Alarm(stop=config.evaluation.stop_on_alarm),
            on_oom=config.on_oom,
            watch=config.watch,
            sample_mp4=config.sample_mp4,
            seed=config.seed,
            task=_task(config, built, command),
            algo=label,
            env=built.env,
            policy=built.policy,
            setup_s=time.perf_counter() - started,
            fresh=config.fresh,
            resume="auto" if config.resume else False,
        )
    except (ValueError, OSError) as error:
        if built.env.mdp.counters.denoiser_forwards == forwards:
            raise SetupError(one_line(error)) from error
        raise


def _write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes config.yaml into a folder in which no other process is at work.

    Raises:
        ValueError: one is.
        RunFolderError: the folder cannot be written.
    """
    from algos.run_files import alone, writing

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            write_yaml(folder / CONFIG, values, f"Repeat this run: vdm-env train --config {CONFIG} --out ...")


def _task(config: TrainConfig, built: Resolved, command: str) -> dict[str, Any]:
    limits = ["One seed: no statement about others."]
    if config.process.weights == "random":
        limits.insert(0, "The video model has random weights: this tests the code and says nothing about any model.")
    task = describe(
        built.env, built.evaluators[0].env, Setup(env_id=config.env, question=QUESTION, limits=limits), command
    )
    own = {"algo_name": config.algo} if ":" in str(config.algo) else {}
    policy = asdict(config.policy)
    policy.pop("offload_activations")  # changes no number, and a run that lacks memory may go on with it
    asked = {name: getattr(config.process, name) for name in _NUMBERS}
    asked = {name: value for name, value in asked.items() if value not in (None, UNLESS_GIVEN.get(name))}
    return {**task, **own, "policy": policy, **({"process": asked} if asked else {})}


def results(folder: Path) -> list[str]:
    """What a run found, and what to do with it, as lines of text."""
    run = read_run(folder)
    lines = [f"{run.algo} on {run.task.get('env_id')}, seed {run.seed}: {run.status.lower()} ({run.reason})"]
    for name, word in ((PROXY, "reward"), (GOLD, "gold")):
        if name in run.rewards():
            found = change(run, name)
            low, high = (found[f"{name}_{end}"] for end in ("low", "high"))
            known = math.isfinite(low) and math.isfinite(high)
            lines.append(
                f"  {word:<6} {show(found[f'{name}_before'])} -> {show(found[f'{name}_after'])}   "
                f"change {found[f'{name}_change']:+.3g} "
                f"{f'[{low:+.3g}, {high:+.3g}]' if known else '(an interval needs two evaluated videos)'}"
            )
    lines.append("  [low, high]: 95 % interval over the evaluated videos of this one run; it says nothing about seeds")
    lines.append(f"  videos before and after: vdm-env sample --lora {folder} --out sample.mp4")
    return lines
