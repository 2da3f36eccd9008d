"""`run`: a budget, a log, evaluations and checkpoints around any object with an `update()`.

A run owns one folder:

    run.json            what was run, and under "resumes" when, at which update and with which commit it was continued
    train.jsonl         one row per update (`algos.meter`)
    eval.jsonl          one row per (evaluation, reward, prompt, noise seed)
    samples/            eval_<update>.npz: the evaluation's first videos, uint8 [n, F, H, W, 3]
    checkpoints/        <update>/: the last ones, and the one that evaluated best (`algos.checkpoint`); best.json says
                        which. `policy.load(newest_checkpoint(out) / "policy")`, see `algos.checkpoint_store`
    DONE | INTERRUPTED | FAILED    how it ended, with the last counts; none of them: still running, or killed

A run that did not reach DONE, for whatever reason, is continued by the same call with `resume=True` from its newest
intact checkpoint. Logs and videos are taken back to that moment first, and what was lost is done again, so that with a
budget in updates weights and logs become bit for bit those of a run that was never stopped, given the same machine,
versions and number of threads. (A budget or `eval_every` in device-seconds follows the clock, which never repeats
itself.) Times and counts continue from the checkpoint: work that was lost is in none of them, and not counted twice;
`wall_s` and `setup_s` are sums over all processes.

What an algorithm keeps outside of its `state_dict()`, files for instance, is its own to bring back.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from algos.checkpoint_store import CheckpointStore
from algos.evaluate import Evaluator, splits_info
from algos.flops import Flops
from algos.loop import Loop, OutOfMemoryError, Schedule, seconds
from algos.meter import Meter
from algos.progress import Progress, Stop
from algos.provenance import plain, provenance
from algos.resume import earlier_run, go_on, result_of
from algos.run_files import RunFolderError, alone, remove_run, replace_json, writing

__all__ = ["Algorithm", "OutOfMemoryError", "RunFolderError", "RunResult", "run", "run_folder", "seconds"]

SCHEMA_VERSION = 1


class Algorithm(Protocol):
    """Anything that learns: collect with its environment, take an optimiser step, return metrics."""

    def update(self) -> Mapping[str, Any]: ...

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended. `ended` is "budget", "updates" or "interrupted"; scores are means over the last evaluation.

    `resumed_from` is the update it was continued from by this call (the last one, if it was done already), else None.
    """

    out: Path
    ended: str
    updates: int
    device_s: float
    scores: dict[str, float]
    resumed_from: int | None = None

    @property
    def interrupted(self) -> bool:
        return self.ended == "interrupted"


def run_folder(root: str | Path, benchmark: str, algo: str, task: str, seed: int) -> Path:
    """Where a run belongs: <root>/<benchmark>/<algo>/<task>/seed_<n>."""
    return Path(root) / benchmark / algo / task / f"seed_{seed}"


def run(
    algorithm: Algorithm,
    *,
    out: str | Path,
    budget: str | float | None = None,
    updates: int | None = None,
    evaluate: Evaluator | Sequence[Evaluator] | None = None,
    eval_every: str | int | None = None,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    skip_nonfinite: int = 0,
    seed: int = 0,
    task: Mapping[str, Any] | None = None,
    algo: str | None = None,
    env: Any = None,
    policy: Any = None,
    setup_s: float = 0.0,
    fresh: bool = False,
    resume: bool | Literal["auto"] = False,
    progress: bool = True,
) -> RunResult:
    """Updates an algorithm until its budget is spent, and writes down everything that happened.

    The first Ctrl-C (or SIGTERM) lets the update finish, writes a checkpoint and ends the run with all files valid; the
    second one drops the update that is under way, and the last checkpoint stays.

    Args:
        algorithm: see `Algorithm`; `env`, `policy` and `config` are read from its attributes of these names.
        out: the run's folder, see `run_folder`.
        budget: device-seconds of rollout + decoding + reward + update: "90s", "2min", "1h". The update that crosses
            it is the last. On a CPU they are CPU-seconds of this process, over all its threads: with two busy threads
            "60s" are over in half a minute (`algos.meter`).
        updates: number of updates; with a budget too, whichever comes first.
        evaluate: evaluates before the first update, on the schedule and at the end; its time is kept apart. Of
            several, one a split, the first is the main one: it alone decides which checkpoint is best, and its videos
            are kept.
        eval_every: an int counts updates, a duration such as "30s" device-seconds. Default: an eighth of the budget.
        checkpoint_every: updates between checkpoints; 0: at the end only. Default: before each evaluation that follows
            an update, with or without an evaluator. There is always one at the end and, unless this is 0, one of the
            update that evaluated best; their time is kept apart.
        keep_checkpoints: how many of the latest are kept, >= 1; with two or more, a damaged one costs little. The one
            with the highest mean reward in an evaluation stays besides.
        skip_nonfinite: so many updates in a row may have a gradient that is not finite (`FloatingPointError` from
            `update()`, which leaves the parameters as they were before that optimiser step) or return such a loss. They
            count as updates and in the column skipped_updates. 0: the first such gradient ends the run, and a loss is
            only reported.
        seed: the training seed, for the record: the caller has given it to the environment and the algorithm.
        task: what else `run.json` should say about the task (model, reward, prompts).
        algo: name in the record; default the class's in lower case.
        env: the training environment, if the algorithm has no attribute `env`.
        policy: the policy, if the algorithm has no attribute `policy`; checkpoints need its `save(folder)`, resuming
            its `load(folder)`.
        setup_s: seconds the caller spent on building these.
        fresh: remove an earlier run in `out` first.
        resume: True: continue the run in `out`, to which the algorithm was built as if it were new; "auto": continue
            it if there is one, otherwise begin. A run that is done is left as it is, and its result returned.
        progress: a bar over the budget, or a line an update where standard output is no terminal.

    Raises:
        ValueError: no budget, a bad duration or schedule, a folder that already holds a run (or none, with
            resume=True), one that differs in configuration, task, seed or budget, or in which a process is at work.
        TypeError: no env or policy to be found.
        checkpoint.DamagedCheckpointError: the run to be continued has checkpoints, and none is intact.
        RunFolderError: the folder cannot be written (full, read-only); what it holds is valid.
        OutOfMemoryError: names the settings to lower.
        FloatingPointError: see `skip_nonfinite`.
    """
    if budget is None and updates is None:
        raise ValueError("a run needs an end: give budget='2min' (device-seconds), updates=100, or both")
    if updates is not None and updates < 1:
        raise ValueError(f"updates must be at least 1, got {updates}")
    for name, value, least in (
        ("checkpoint_every", checkpoint_every, 0),
        ("keep_checkpoints", keep_checkpoints, 1),
        ("skip_nonfinite", skip_nonfinite, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if resume not in (True, False, "auto"):
        raise ValueError(f"resume is {resume!r}, expected True, False or 'auto'")
    if fresh and resume:
        raise ValueError("fresh=True removes the run that resume would continue: give one of the two")
    env, policy = _part(algorithm, "env", env), _part(algorithm, "policy", policy)
    evaluators = list(evaluate) if isinstance(evaluate, Sequence) else [] if evaluate is None else [evaluate]
    limit = None if budget is None else seconds(budget)
    schedule = Schedule(eval_every, limit, updates)
    folder = Path(out)
    meter = Meter(counters=env.mdp.counters, device=env.device, flops=Flops(env=env, policy=policy))
    about = {
        "schema_version": SCHEMA_VERSION,
        "algo": algo or type(algorithm).__name__.lower(),
        "config": plain(getattr(algorithm, "config", {})),
        "task": {**plain(task or {}), **splits_info(evaluators)},
        "seed": seed,
        "env": {name: plain(getattr(env, name, None)) for name in ("num_envs", "num_steps", "group_size")},
        "budget_device_s": limit,
        "budget_updates": updates,
        "eval_every": str(schedule),
        "dtype": str(getattr(env.mdp, "dtype", None)).removeprefix("torch."),
        **provenance(env.device),
    }
    about["run_id"] = f"{about['algo']}-seed{seed}-{about['started_utc']}"
    about["resumes"] = []
    if resume is True and not (folder / "run.json").exists():
        raise ValueError(f"there is no run in {folder} to continue; begin one with resume=False, or resume='auto'")
    with ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(folder))
        old = earlier_run(folder, about, fresh=fresh, resume=bool(resume))
        if old is not None and (folder / "DONE").exists():
            return RunResult(**result_of(folder))
        bar = stack.enter_context(Progress(about["algo"], limit, updates, enabled=progress))
        stop = stack.enter_context(Stop())
        loop = Loop(
            algorithm=algorithm,
            policy=policy,
            evaluators=evaluators,
            env=env,
            meter=meter,
            folder=folder,
            bar=bar,
            stop=stop,
            store=CheckpointStore(run=folder, keep=keep_checkpoints),
            schedule=schedule,
            limit=limit,
            updates=updates,
            checkpoint_every=checkpoint_every,
            skip_nonfinite=skip_nonfinite,
        )
        with writing(folder):
            if old is None:
                if fresh:
                    remove_run(folder)
                replace_json(folder / "run.json", about)
            else:
                go_on(loop, old, about)
        resumed_from = None if old is None else loop.update
        meter.seconds["setup"] += setup_s
        try:
            ended = loop.go()
            loop.finish("INTERRUPTED" if ended == "interrupted" else "DONE", ended)
        except Exception as error:
            try:
                loop.finish("FAILED", f"{type(error).__name__}: {error}")
            except RunFolderError as unwritten:
                print(f"{folder / 'FAILED'} could not be written: {unwritten}", file=sys.stderr, flush=True)
            raise
    return RunResult(
        out=folder,
        ended=ended,
        updates=loop.update,
        device_s=meter.device_s,
        scores=loop.scores,
        resumed_from=resumed_from,
    )


def _part(algorithm: Any, name: str, given: Any) -> Any:
    found = getattr(algorithm, name, None) if given is None else given
    if found is None:
        raise TypeError(
            f"{type(algorithm).__name__} has no attribute '{name}': set self.{name}, or give run({name}=...)"
        )
    return found
