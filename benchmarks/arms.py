"""One run of a benchmark: an arm with a seed, begun or continued."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.arguments import one_line
from benchmarks.plan import Arm, Benchmark, run_folder
from benchmarks.training import Setup, SetupError, build, describe

DATA = "preferences"
"""folder, inside a run's, of the preference data that it builds"""


def train_arm(
    benchmark: Benchmark,
    arm: Arm,
    seed: int,
    *,
    out: Path,
    command: str,
    device: str = "cpu",
    fresh: bool = False,
    progress: bool = True,
) -> Any:
    """One run of a benchmark: begun, or continued from its last checkpoint.

    Preference data that a run builds lie in its own folder and go with it, so that a run that is repeated pays for them
    again; OfflineDPO finds those of the benchmark's VideoDPO with the same seed.

    Args:
        benchmark: task, evaluation and budget.
        arm: of the benchmark.
        seed: one of its seeds.
        out: folder of all benchmarks.
        command: what repeats the benchmark, for the record.
        device: of the networks.
        fresh: remove an earlier run of this arm and seed first.
        progress: see `algos.run`.

    Returns:
        The `algos.run.RunResult`.

    Raises:
        SetupError: the arm fits no environment, algorithm or prompts; nothing was trained.
        ValueError: the run cannot be continued; see `algos.run`.
        Exception: whatever stopped the training, which its folder records as FAILED.
    """
    started = time.perf_counter()
    import algos

    folder = run_folder(out / benchmark.name, arm.label, benchmark.env_id, seed)
    setup = Setup.of(benchmark)
    try:
        settings = arm_settings(benchmark, arm, seed, out)
        _forget_data(folder, fresh)
        built = build(replace(arm, settings=settings), setup, seed, device=device, strict=False)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise SetupError(one_line(error)) from error
    task = describe(built.env, built.evaluators[0].env, setup, command)
    return algos.run(
        built.algorithm,
        out=folder,
        budget=benchmark.budget,
        updates=benchmark.updates,
        evaluate=built.evaluators,
        eval_every=eval_every(benchmark),
        seed=seed,
        task={**task, **arm_record(arm)},
        algo=arm.label,
        env=built.env,
        policy=built.policy,
        setup_s=time.perf_counter() - started,
        fresh=fresh,
        resume=False if fresh else "auto",
        progress=progress,
    )


def arm_record(arm: Arm) -> dict[str, Any]:
    """What a run's record says about its arm."""
    parts = {"settings": arm.settings, "env": arm.env, "policy": arm.policy}
    return {
        "algo_name": arm.algo,
        "arm": {**{name: dict(value) for name, value in parts.items()}, "evaluate_as_trained": arm.evaluate_as_trained},
    }


def arm_settings(benchmark: Benchmark, arm: Arm, seed: int, out: Path) -> dict[str, Any]:
    """An arm's settings with {seed} replaced, and with the folder of its preference data where it has any.

    Raises:
        ValueError: see `algos.zoo.recipe`.
    """
    from algos.zoo import recipe

    settings = {k: v.replace("{seed}", str(seed)) if isinstance(v, str) else v for k, v in arm.settings.items()}
    kind = recipe(arm.algo).data
    makers = [arm] if kind == "builds" else [one for one in benchmark.arms if recipe(one.algo).data == "builds"]
    if kind and makers:
        place = run_folder(out / benchmark.name, makers[0].label, benchmark.env_id, seed) / DATA
        settings = {"folder": str(place), **settings}
    return settings


def _forget_data(folder: Path, fresh: bool) -> None:
    """Removes what a run built before its first checkpoint: found again it would not be paid for."""
    from algos.checkpoint_store import checkpoints
    from algos.run_files import alone

    if (folder / DATA).exists() and (fresh or not checkpoints(folder)):
        with alone(folder):
            shutil.rmtree(folder / DATA)


def eval_every(benchmark: Benchmark) -> str | int:
    """Updates between evaluations, or device-seconds if the budget is given in these alone."""
    if benchmark.updates is not None:
        return max(1, benchmark.updates // benchmark.evals)
    from algos.budget import seconds

    return f"{seconds(benchmark.budget or '') / benchmark.evals}s"
