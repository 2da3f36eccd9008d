"""What `vdm-env train` does: an environment, a policy, an algorithm and its evaluation from options, and their run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from benchmarks.arguments import one_line
from benchmarks.commands.train import TrainConfig
from benchmarks.configs import check_names, converted, to_mapping, write_yaml
from benchmarks.options import (
    chosen_frames,
    make_env,
    make_policy,
    own_prompts,
    resolved_batch,
    resolved_process,
    world_of,
)
from benchmarks.records import GOLD, PROXY, read_run
from benchmarks.summary import show
from benchmarks.tables import change
from benchmarks.training import Setup, SetupError, describe

CONFIG = "config.yaml"
QUESTION = "Does training raise the reward on prompts it did not see?"


@dataclass(frozen=True, kw_only=True)
class Built:
    """The parts of a run, and what to say and to write down about them."""

    env: Any
    policy: Any
    algorithm: Any
    evaluator: Any
    resolved: dict[str, Any]
    """contents of config.yaml: every option by name, and "algorithm" """
    note: str
    """where the algorithm's settings come from"""


def algorithm_config(kind: type[Any], model: str, settings: Mapping[str, Any], seed: int) -> tuple[Any, str]:
    """An algorithm's config and where it comes from: the model's preset, or else the paper's settings.

    Args:
        kind: the config's class.
        model: `env.model.spec.name`.
        settings: fields that differ, as a file or `--set` gives them.
        seed: of the run.

    Raises:
        ValueError: an unknown field (the nearest is named), or a value it refuses.
    """
    names = [field.name for field in fields(kind) if field.name != "seed"]
    if "seed" in settings:
        raise ValueError(f"{kind.__name__}.seed is the seed of the run: give --seed {settings['seed']}")
    check_names(settings, names, kind.__name__)
    hints = get_type_hints(kind)
    changes = {k: converted(v, hints[k], f"{kind.__name__}.{k}") for k, v in settings.items()}
    try:
        base, note = kind.preset(model), f"preset for {model}"
    except (ValueError, AttributeError):
        base, note = kind(), f"no preset for {model}: the defaults of {kind.__name__}, which are the paper's"
    return replace(base, **{**changes, "seed": seed}), note


def build(config: TrainConfig, settings: Mapping[str, Any]) -> Built:
    """Everything a run needs.

    Raises:
        ValueError, TypeError, OSError: what was asked for is impossible, or pretrained weights are missing.
    """
    import torch

    import algos

    assert config.algo is not None  # checked before
    entry, (algorithm_class, config_class) = algos.ZOO[config.algo], algos.load(config.algo)
    own: dict[str, Any] = dict(entry.env)
    if not world_of(config.env):
        own["num_envs"] = own.get("group_size", 1)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    given = {**asdict(config.batch), "decode_frames": chosen_frames(config.batch.decode_frames)}
    given |= own_prompts(config.batch)
    env = make_env(config.env, config.process, seed=config.seed, defaults=own, **given)
    chosen, note = algorithm_config(config_class, env.model.spec.name, settings, config.seed)
    policy = make_policy(env, config.policy, config.seed)
    algorithm = algorithm_class(env, policy, chosen)
    asked = config.evaluation
    levels, spec = (asked.eval_noise_level, config.process.noise_level), env.model.spec
    level = next(
        (one for one in levels if one is not None), spec.noise_level if env.mdp.sampler == spec.sampler else None
    )
    held_out = env.derive(split=asked.eval_split, group_size=1, decode_frames=None, noise_level=level)
    evaluator = algos.Evaluator(
        held_out,
        spread(held_out.prompt_ids(asked.eval_split), asked.eval_prompts),
        range(asked.eval_seeds),
        num_videos=asked.eval_videos,
    )
    whole = replace(
        config,
        process=resolved_process(env, config.process),
        batch=resolved_batch(env, config.batch),
        evaluation=replace(asked, eval_noise_level=level),
        num_threads=torch.get_num_threads(),
    )
    once = ("set", "config", "resume", "fresh")  # they hold for one call only
    resolved = {name: value for name, value in to_mapping(whole).items() if name not in once}
    resolved["algorithm"] = {name: value for name, value in asdict(chosen).items() if name != "seed"}
    return Built(env=env, policy=policy, algorithm=algorithm, evaluator=evaluator, resolved=resolved, note=note)


def spread(prompt_ids: list[int], count: int) -> list[int]:
    """At most `count` of the prompts, evenly spread, because neighbours resemble each other."""
    if count >= len(prompt_ids):
        return prompt_ids
    return [prompt_ids[place * len(prompt_ids) // count] for place in range(count)]


def start(config: TrainConfig, settings: Mapping[str, Any], *, command: str) -> Any:
    """Builds and runs; the run's folder gets config.yaml before the first update.

    Returns:
        The `algos.run.RunResult`.

    Raises:
        SetupError: the options fit no environment, algorithm or folder; nothing was trained.
        Exception: whatever stopped the training, which its folder records as FAILED.
    """
    started = time.perf_counter()
    import algos
    from algos.run import run_folder

    assert config.algo is not None
    root = Path(config.out)
    folder = run_folder(root.parent, root.name, config.algo, config.env, config.seed)
    there = (folder / "run.json").exists()
    if there and not (config.resume or config.fresh):
        raise SetupError(f"{folder} already holds a run: choose another --out, go on with --resume, or give --fresh")
    try:
        built = build(config, settings)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise SetupError(one_line(error)) from error
    print(f"{config.algo} on {config.env}: {built.note}; every setting is in {folder / CONFIG}", flush=True)
    every = config.evaluation.eval_every
    forwards = built.env.mdp.counters.denoiser_forwards
    try:
        if not (there and config.resume):
            write_yaml(folder / CONFIG, built.resolved, f"Repeat this run: vdm-env train --config {CONFIG} --out ...")
        return algos.run(
            built.algorithm,
            out=folder,
            budget=config.budget,
            updates=config.updates,
            evaluate=built.evaluator,
            eval_every=int(every) if every is not None and every.isdecimal() else every,
            checkpoint_every=config.checkpoint_every,
            seed=config.seed,
            task=_task(config, built, command),
            algo=config.algo,
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


def _task(config: TrainConfig, built: Built, command: str) -> dict[str, Any]:
    limits = ["One seed: no statement about others."]
    if config.process.weights == "random":
        limits.insert(0, "The video model has random weights: this tests the code and says nothing about any model.")
    task = describe(built.env, built.evaluator.env, Setup(env_id=config.env, question=QUESTION, limits=limits), command)
    return {**task, "policy": asdict(config.policy)}


def results(folder: Path) -> list[str]:
    """What a run found, and what to do with it, as lines of text."""
    run = read_run(folder)
    lines = [f"{run.algo} on {run.task.get('env_id')}, seed {run.seed}: {run.status.lower()} ({run.reason})"]
    for name, word in ((PROXY, "reward"), (GOLD, "gold")):
        if name in run.rewards():
            found = change(run, name)
            lines.append(
                f"  {word:<6} {show(found[f'{name}_before'])} -> {show(found[f'{name}_after'])}   "
                f"change {found[f'{name}_change']:+.3g} "
                f"[{found[f'{name}_low']:+.3g}, {found[f'{name}_high']:+.3g}]"
            )
    lines.append("  [low, high]: 95 % interval over the evaluated videos of this one run; it says nothing about seeds")
    lines.append(f"  videos before and after: vdm-env sample --lora {folder} --out sample.mp4")
    return lines
