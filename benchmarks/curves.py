"""Learning curves of any algorithm of the zoo over several seeds, on held-out prompts with fixed noise.

    python -m benchmarks.curves --algo vader --env-id MovingShapes-HPS --budget 60s --out runs/curves
    python -m benchmarks.curves --algo ddpo --env-id MovingShapesUNet-HPS --updates 40 --out runs/curves

The sampling of `make demo` (5 steps, no guidance) and the algorithms' presets, one CPU thread a process. Tune with
`--split validation`; the default opens the test prompts. `curves.csv` has one row for each evaluation, `changes.csv`
one for each seed: reward and gold score before and after, paired over prompts and noise; `table.csv` and `table.md` one
for each algorithm, with 95 % intervals over seeds. The same command again goes on where it was stopped: finished seeds
stay, and a seed that was broken off continues from its last checkpoint (with a budget in updates, as if it had never
been stopped). With other settings than those of the runs that are there it trains nothing, and says what differs.

A budget in updates gives the same videos and rewards on a busy machine as on an idle one; `cpu_s` are the CPU-seconds
of training, which other work on the machine hardly changes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.arguments import one_line, parse
from benchmarks.plan import Arm, Benchmark, run_folder
from benchmarks.records import json_object
from benchmarks.report import write_report
from benchmarks.settings import overrides
from benchmarks.training import ENV_ID, Setup, SetupError, train

COMMAND = "python -m benchmarks.curves"
QUESTION = "Does each algorithm raise the reward on prompts it never trained on, and does the gold score follow?"
LIMITS = ("Hyper-parameters are each algorithm's preset for this model, tuned on validation prompts.",)


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvesConfig:
    """Train one algorithm with several seeds and write its curves."""

    algo: str
    """which algorithm, such as vader or online_vpo, or package.module:Class for a class of your own"""
    env_id: str = ENV_ID
    """environment, such as MovingShapes-HPS"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """training seeds; those whose run in `out` is done are not run again, one that was broken off is continued"""
    budget: str | None = None
    """device time of each run for rollout, reward and update, such as 90s or 30min"""
    updates: int | None = None
    """number of updates of each run, instead of a budget or beside it: whichever comes first"""
    set: tuple[str, ...] = ()
    """fields of the algorithm's config that differ from its preset, as name=value; {seed} stands for the seed"""
    evals: int = 8
    """evaluations after the first one, evenly spaced"""
    split: Literal["validation", "test"] = "test"
    """prompts of the evaluations"""
    noise_seeds: int = 8
    """videos of each prompt in an evaluation"""
    num_threads: int = 1
    """CPU threads of the process"""
    out: str = "runs/curves"
    """folder of the runs and the report"""


def _command(config: CurvesConfig) -> str:
    seeds = " ".join(map(str, config.seeds))
    ends = f"--budget {config.budget} " if config.budget else ""
    ends += f"--updates {config.updates} " if config.updates else ""
    ends += f"--set {shlex.join(config.set)} " if config.set else ""
    return (
        f"{COMMAND} --algo {config.algo} --env-id {config.env_id} --seeds {seeds} {ends}--evals {config.evals} "
        f"--split {config.split} --noise-seeds {config.noise_seeds} --num-threads {config.num_threads} "
        f"--out {config.out}"
    )


def _eval_every(config: CurvesConfig) -> str | int:
    """Updates between evaluations, or device-seconds if the budget is given in these alone."""
    if config.updates is not None:
        return max(1, config.updates // config.evals)
    from algos.budget import seconds

    return f"{seconds(config.budget or '') / config.evals}s"


def _check(config: CurvesConfig) -> None:
    """Refuses what can be refused without building anything.

    Raises:
        ValueError: an unknown algorithm, no budget, a bad duration, a number below one, or seeds that are missing,
            repeated or negative.
    """
    from algos.budget import seconds
    from algos.zoo import recipe

    recipe(config.algo)
    overrides(config.set, 0)
    if config.budget is None and config.updates is None:
        raise ValueError("a run needs an end: give --budget 60s (device-seconds), --updates 40, or both")
    if config.budget is not None:
        seconds(config.budget)
    numbers = {"noise-seeds": config.noise_seeds, "num-threads": config.num_threads, "evals": config.evals}
    numbers["updates"] = 1 if config.updates is None else config.updates
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if not config.seeds or len(set(config.seeds)) != len(config.seeds) or min(config.seeds) < 0:
        raise ValueError(f"--seeds must be different numbers from 0 on, got {' '.join(map(str, config.seeds))}")


def _done(config: CurvesConfig) -> set[int]:
    """The seeds whose run is done, without building anything.

    Raises:
        ValueError: the run of a seed is another one than the one asked for; the message names what differs.
    """
    found = set()
    # Seeds that are not asked for too: the report draws them on the same curve.
    for record in sorted(_folder(config, config.seeds[0]).parent.glob("seed_*/run.json")):
        folder, number = record.parent, record.parent.name.removeprefix("seed_")
        if not number.isdecimal():
            continue
        if keys := _differing(config, int(number), folder):
            raise ValueError(
                f"{folder} holds another run, which differs in {'; '.join(keys)}. Run it as it was, choose another "
                "--out, or remove the folder"
            )
        if int(number) in config.seeds and (folder / "DONE").exists():
            found.add(int(number))
    return found


def _folder(config: CurvesConfig, seed: int) -> Path:
    return run_folder(Path(config.out), config.algo.rpartition(":")[2], config.env_id, seed)


def _differing(config: CurvesConfig, seed: int, folder: Path) -> list[str]:
    """In what the run in a folder is another one than that of a seed.

    Raises:
        ValueError: its run.json is broken, or the settings are not to be had.
    """
    from algos.run_files import differences
    from algos.zoo import recipe
    from benchmarks.execute import Job, expected

    old = json_object(folder / "run.json")
    task = old.get("task") or {}
    changes = overrides(config.set, seed)
    # Where its own data lie is no setting, unless it was given: --out may be written in two ways.
    own_data = recipe(config.algo).data is not None and "folder" not in changes
    arm = Arm(label=recipe(config.algo).label, algo=config.algo, settings=changes)
    benchmark = Benchmark(
        name="curves", arms=[arm], env_id=config.env_id, budget=config.budget, updates=config.updates,
        evals=config.evals,
    )  # fmt: skip
    new = expected(Job(benchmark=benchmark, arm=arm, seed=seed, out=config.out, command=""), str(task.get("model_id")))
    new["task"] = {
        "env_id": config.env_id, "eval_split": config.split, "eval_noise_seeds": list(range(config.noise_seeds)),
    }  # fmt: skip
    there = {key: old.get(key) for key in new} | {"task": {key: task.get(key) for key in new["task"]}}
    if own_data and "config" in new:
        for about in (there, new):
            about["config"] = {key: value for key, value in (about["config"] or {}).items() if key != "folder"}
    return differences(there, new)


def curves(config: CurvesConfig, program: str = "curves") -> int:
    """Runs what is missing and writes tables and report, also of a part of it.

    Args:
        config: what to train.
        program: what lines of output begin with.

    Returns:
        The exit code: 0; 1 after a failure or 130 if it was interrupted, with tables and report of what was done;
        2 for wrong usage, before any training.
    """
    import torch

    out = Path(config.out)
    code, trained = 0, False
    try:
        _check(config)
        done = _done(config)
    except ValueError as error:
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        return 2
    torch.set_num_threads(config.num_threads)
    setup = Setup(
        env_id=config.env_id,
        split=config.split,
        noise_seeds=range(config.noise_seeds),
        question=QUESTION,
        limits=LIMITS,
    )
    try:
        for seed in config.seeds:
            folder = _folder(config, seed)
            if seed in done:
                continue
            if (folder / "run.json").exists():
                print(f"{program}: {folder} did not reach its end: this seed is continued", flush=True)
            result = train(
                config.algo,
                out=out,
                seed=seed,
                command=_command(config),
                setup=setup,
                budget=config.budget,
                updates=config.updates,
                changes=overrides(config.set, seed),
                eval_every=_eval_every(config),
                resume="auto",
            )
            trained = True
            if result.interrupted:
                code = 130
                break
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # whatever it is, the runs before it deserve their tables
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        if isinstance(error, SetupError) and not trained:
            return 2
        code = 1
    try:
        print(f"report: {write_report(out)}")
    except (ValueError, OSError) as error:
        if code != 1:  # otherwise the one line of the failure said it all
            print(f"{program}: {one_line(error)}", file=sys.stderr)
        return code or 1
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.curves`."""
    return curves(parse(CurvesConfig, arguments, "curves"))


if __name__ == "__main__":
    sys.exit(main())
