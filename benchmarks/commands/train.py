"""`vdm-env train`: one algorithm on one environment, from options, a config file, or both."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import tyro

from benchmarks.arguments import one_line, parse, refuse
from benchmarks.configs import from_mapping, read_mapping
from benchmarks.options import BatchOptions, PolicyOptions, ProcessOptions
from benchmarks.training import ENV_ID, SetupError

PROGRAM = "vdm-env train"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationOptions:
    """Evaluation on fixed prompts and noise: before training, during it and at its end."""

    eval_split: Literal["train", "validation", "test"] = "test"
    """prompts of the evaluations"""
    eval_prompts: int = 16
    """number of prompts, spread over the split"""
    eval_seeds: int = 2
    """videos of each prompt, from noise seeds 0, 1, ..."""
    eval_every: str | None = None
    """a number of updates, or a duration of training such as 30s; None: an eighth of the budget"""
    eval_noise_level: float | None = None
    """noise of the sampler in evaluations; None: --noise-level or else the model's, whatever the algorithm
    trains with"""
    eval_videos: int = 6
    """prompts whose first video is kept"""
    heldout: tuple[str, ...] = ()
    """rewards that are measured in evaluations and never optimised, such as Aesthetic"""
    stop_on_alarm: bool = False
    """end the run where the reward goes on rising while held-out rewards, diversity or motion fall; without it that is
    only reported (see algos/alarm.py)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train one algorithm on one environment.

    The settings of the algorithm are its preset for the model, if it has one, otherwise its paper's. The run's folder
    is OUT/ALGO/ENV/seed_SEED; its config.yaml holds every setting, and --config with that file repeats the run.

    On several devices: accelerate launch --multi_gpu --num_processes 2 --no_python vdm-env train ...
    """

    env: str = ENV_ID
    """environment, <Model>-<Reward>; vdm-env envs lists them"""
    algo: str | None = None
    """algorithm; vdm-env algos lists them; package.module:Class for a class of your own"""
    budget: str | None = None
    """device time of rollout, reward and update, such as 90s, 2min or 1h; the update that crosses it is the last"""
    updates: int | None = None
    """number of updates, instead of a budget or beside it: whichever comes first"""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """a setting of the algorithm, as in --set learning_rate=1e-3; vdm-env algos ALGO lists them"""
    seed: int = 0
    """of prompts, noise and the LoRA's initial values"""
    config: str | None = None
    """YAML, TOML or JSON file with any of these options (num_envs: 16) and the algorithm's settings (algorithm:
    {...}); options given here win over it"""
    out: str = "runs/train"
    """folder of runs; vdm-env report OUT compares them"""
    resume: bool = False
    """go on with the run in its folder, to the same bits as if it had not been stopped; or begin, if there is none"""
    fresh: bool = False
    """remove an earlier run in its folder first"""
    checkpoint_every: int | None = None
    """updates between checkpoints, 0: at the end only; None: before each evaluation"""
    keep_checkpoints: int = 2
    """latest checkpoints that are kept, beside the one that evaluated best"""
    skip_nonfinite: int = 0
    """updates in a row that may have a gradient or a loss that is not finite; 0: the first such gradient ends the
    run"""
    on_oom: Literal["fail", "halve_micro_batch"] = "fail"
    """where memory does not suffice for an update: end, or do it again with half the algorithm's micro_batch, which
    gives the same result"""
    watch: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """where to watch the run beside its log files: tensorboard or wandb; may be given twice"""
    sample_mp4: bool = True
    """write the videos that evaluations keep as samples/eval_<update>/<prompt>.mp4 too"""
    num_threads: int | None = None
    """CPU threads; None: as many as torch takes"""
    process: ProcessOptions = field(default_factory=ProcessOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


def from_file(path: str) -> tuple[TrainConfig, dict[str, Any]]:
    """The options of a config file, and its settings of the algorithm.

    Raises:
        ValueError: unreadable, unknown keys, or values of a wrong type; the message names file and key.
    """
    values = read_mapping(path)
    settings = values.pop("algorithm", None) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: algorithm is {settings!r}, expected names with values")
    for name, instead in (("set", "algorithm: {learning_rate: 1e-3}"), ("config", "one file")):
        if name in values:
            raise ValueError(f"{path}: {name!r} is for the command line; write {instead}")
    return from_mapping(TrainConfig, values, path), {k.replace("-", "_"): v for k, v in settings.items()}


def read(arguments: Sequence[str]) -> tuple[TrainConfig, dict[str, Any]]:
    """Options and settings of the algorithm from the command line, over those of the file it names.

    Raises:
        ValueError: see `from_file`.
        SystemExit: see `benchmarks.arguments.parse`.
    """
    from benchmarks.settings import overrides

    config: TrainConfig = parse(TrainConfig, arguments, PROGRAM)
    settings: dict[str, Any] = {}
    if config.config is not None:
        base, settings = from_file(config.config)
        config = parse(TrainConfig, arguments, PROGRAM, default=base)
    return config, {**settings, **overrides(config.set, config.seed)}


def check(config: TrainConfig) -> None:
    """Refuses what can be refused without building anything.

    Raises:
        ValueError: no algorithm or an unknown one, no budget, a bad duration, a number below one, an unknown watcher.
        ImportError: a watcher's package is not installed.
    """
    from algos.budget import seconds
    from algos.watchers import make_watchers
    from algos.zoo import recipe
    from benchmarks.options import check_seed

    if config.algo is None:
        raise ValueError("which algorithm? Give one, such as --algo vader (vdm-env algos lists them)")
    recipe(config.algo)
    if config.budget is None and config.updates is None:
        raise ValueError("a run needs an end: give --budget 2min (device time), --updates 100, or both")
    if config.budget is not None:
        seconds(config.budget)
    every = config.evaluation.eval_every
    if every is not None and not every.isdecimal():
        seconds(every)
    least = {
        "updates": 1,
        "eval_prompts": 1,
        "eval_seeds": 1,
        "num_threads": 1,
        "eval_videos": 0,
        "checkpoint_every": 0,
        "keep_checkpoints": 1,
        "skip_nonfinite": 0,
    }
    for name, value in least.items():
        given = getattr(config if hasattr(config, name) else config.evaluation, name)
        if given is not None and given < value:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {value}, got {given}")
    check_seed(config.seed)
    make_watchers(config.watch)
    if config.resume and config.fresh:
        raise ValueError("--fresh removes the run that --resume would go on with: give one of the two")


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0; 1 after a failure, 130 if it was interrupted, both with a run folder that can be resumed.

    Raises:
        SystemExit: code 2 for wrong usage, before any training.
    """
    try:
        config, settings = read(arguments)
        check(config)
    except (ValueError, ImportError) as error:
        refuse(PROGRAM, one_line(error))
    from benchmarks.runs import results, start

    try:
        result = start(config, settings, command=shlex.join(["vdm-env", "train", *arguments]))
    except SetupError as error:
        refuse(PROGRAM, one_line(error))
    except Exception as error:  # the run's folder says FAILED and why
        print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr)
        return 1
    from algos import distributed

    if distributed.current().main:
        print("", *results(result.out), sep="\n")
    return 130 if result.interrupted else 0
