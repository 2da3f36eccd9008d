"""`run`: a budget, a log, evaluations and checkpoints around any object with an `update()`.

A run owns one folder:

    run.json            what was run, and under "resumes" when, at which update and with which commit it was continued
    train.jsonl         one row per update (`algos.meter`)
    eval.jsonl          one row per (evaluation, reward, prompt, noise seed)
    alarms.jsonl        if the alarm went off: one row per measure (`algos.alarm`)
    samples/            eval_<update>.npz: the evaluation's first videos, uint8 [n, F, H, W, 3];
                        eval_<update>/<prompt>.mp4: the same to look at
    tensorboard/, wandb/, wandb.json    of those that watch (`algos.watchers`)
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

Started in several processes (`algos.distributed`), all of them make this call with the same arguments; they train
together, the first one evaluates and writes the folder, and all have to see it. Where one of them fails the others end
too, and FAILED says which it was and why.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from algos import distributed
from algos.alarm import Alarm
from algos.budget import Schedule, seconds
from algos.checkpoint_store import CheckpointStore
from algos.evaluate import Evaluator, splits_info
from algos.flops import Flops
from algos.loop import Loop
from algos.meter import Meter
from algos.out_of_memory import OutOfMemoryError
from algos.progress import Progress, Stop
from algos.provenance import plain, provenance
from algos.resume import earlier_run, go_on, result_of
from algos.run_files import RunFolderError, alone, differences, read_json, remove_run, replace_json, writing
from algos.watchers import Watcher, Watchers, make_watchers

__all__ = ["Algorithm", "OutOfMemoryError", "RunFolderError", "RunResult", "run", "run_folder", "seconds"]

SCHEMA_VERSION = 1


class Algorithm(Protocol):
    """Anything that learns: collect with its environment, take an optimiser step, return metrics."""

    def update(self) -> Mapping[str, Any]: ...

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended: "budget", "updates", "over-optimisation" or "interrupted".

    `scores` are means over the last evaluation.
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


@distributed.announcing()
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
    on_oom: Literal["fail", "halve_micro_batch"] = "fail",
    alarm: Alarm | None = Alarm(),  # noqa: B008 - frozen
    watch: str | Watcher | Sequence[str | Watcher] = (),
    sample_mp4: bool = True,
    seed: int = 0,
    task: Mapping[str, Any] | None = None,
    algo: str | None = None,
    env: Any = None,
    policy: Any = None,
    setup_s: float = 0.0,
    reward_devices: int | None = None,
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
        on_oom: "halve_micro_batch": an update that memory does not suffice for is done again from the state before it,
            with half the `micro_batch` of the algorithm's config (None counts as `env.num_envs`), again and again down
            to 1; the smaller one is kept, also by a run that is continued, and written to `run.json` as
            micro_batch_halved. The result is the same but for the order of sums (`algos.out_of_memory`). What was lost
            counts as cost. Each update then copies its state to main memory first. For one process only, and of no use
            to an algorithm without `micro_batch`.
        alarm: watches the evaluations for a reward that rises while what it should stand for falls, see
            `algos.alarm.Alarm`: one line on standard error and a row of alarms.jsonl; with its `stop` the run ends
            there. None: nobody watches.
        watch: where the run can be watched besides: "tensorboard", "wandb", or objects, see `algos.watchers`. One that
            fails is told nothing more, which is said once, and the run goes on.
        sample_mp4: write the kept videos as samples/eval_<update>/<prompt>.mp4 too.
        seed: the training seed, for the record: the caller has given it to the environment and the algorithm.
        task: what else `run.json` should say about the task (model, reward, prompts).
        algo: name in the record; default the class's in lower case.
        env: the training environment, if the algorithm has no attribute `env`.
        policy: the policy, if the algorithm has no attribute `policy`; checkpoints need its `save(folder)`, resuming
            its `load(folder)`.
        setup_s: seconds the caller spent on building these.
        reward_devices: accelerators that only serve rewards, which a run on a GPU holds and pays for too. None: what
            the reward's attribute `devices` says, and that of each part of a sum; a `RemoteReward` has it from its
            server. Give 0 where that server works on the policy's own GPU, and one number for several servers of one
            GPU. On a CPU they are written down, and cost nothing.
        fresh: remove an earlier run in `out` first.
        resume: True: continue the run in `out`, to which the algorithm was built as if it were new; "auto": continue
            it if there is one, otherwise begin. A run that is done is left as it is, and its result returned.
        progress: a bar over the budget, or a line an update where standard output is no terminal.

    Raises:
        ValueError: no budget, a bad duration or schedule, a folder that already holds a run (or none, with
            resume=True), one that differs in configuration, task, seed or budget, or in which a process is at work.
        TypeError: no env or policy to be found, or an object in `watch` that is no `algos.watchers.Watcher`.
        ImportError: the package of a name in `watch` is not installed; the message says how to install it.
        checkpoint.DamagedCheckpointError: the run to be continued has checkpoints, and none is intact.
        RunFolderError: the folder cannot be written (full, read-only); what it holds is valid.
        OutOfMemoryError: names the settings to lower.
        FloatingPointError: see `skip_nonfinite`.
        launch.LaunchError: several processes were started that could not find each other.
        distributed.PeerError: another process of the run has ended; the message says which and why.
    """
    if budget is None and updates is None:
        raise ValueError("a run needs an end: give budget='2min' (device-seconds), updates=100, or both")
    if updates is not None and updates < 1:
        raise ValueError(f"updates must be at least 1, got {updates}")
    for name, value, least in (
        ("checkpoint_every", checkpoint_every, 0),
        ("keep_checkpoints", keep_checkpoints, 1),
        ("skip_nonfinite", skip_nonfinite, 0),
        ("reward_devices", reward_devices, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if resume not in (True, False, "auto"):
        raise ValueError(f"resume is {resume!r}, expected True, False or 'auto'")
    if on_oom not in ("fail", "halve_micro_batch"):
        raise ValueError(f"on_oom is {on_oom!r}, expected 'fail' or 'halve_micro_batch'")
    if fresh and resume:
        raise ValueError("fresh=True removes the run that resume would continue: give one of the two")
    env, policy = _part(algorithm, "env", env), _part(algorithm, "policy", policy)
    evaluators = list(evaluate) if isinstance(evaluate, Sequence) else [] if evaluate is None else [evaluate]
    limit = None if budget is None else seconds(budget)
    schedule = Schedule(eval_every, limit, updates)
    folder = Path(out)
    ranks = distributed.current()
    if on_oom == "halve_micro_batch" and ranks.world > 1:
        raise ValueError(
            f"on_oom='halve_micro_batch' is for one process, and this run has {ranks.world}; lower micro_batch instead"
        )
    told = make_watchers(watch)
    flops = Flops(env=env, policy=policy)
    reward = getattr(env.mdp, "reward", None)
    machine = provenance(env.device, processes=ranks.world, reward=reward, reward_devices=reward_devices)
    num_devices = ranks.world + machine["num_gpus_reward"]
    meter = Meter(counters=env.mdp.counters, device=env.device, num_devices=num_devices, flops=flops)
    about = {
        "schema_version": SCHEMA_VERSION,
        "algo": algo or type(algorithm).__name__.lower(),
        "config": plain(getattr(algorithm, "config", {})),
        "task": {**plain(task or {}), **splits_info(evaluators)},
        "seed": seed,
        "env": {name: plain(getattr(env, name, None)) for name in ("num_envs", "num_steps", "group_size")}
        | ({"processes": ranks.world} if ranks.world > 1 else {}),
        "budget_device_s": limit,
        "budget_updates": updates,
        "eval_every": str(schedule),
        "dtype": str(getattr(env.mdp, "dtype", None)).removeprefix("torch."),
        **machine,
    }
    about["run_id"] = f"{about['algo']}-seed{seed}-{about['started_utc']}"
    if alarm is not None and alarm.stop:
        about["stops_at"] = plain(alarm)
    about["resumes"] = []
    if resume is True and not (folder / "run.json").exists():
        raise ValueError(f"there is no run in {folder} to continue; begin one with resume=False, or resume='auto'")
    about = _agreed(ranks, about)
    if ranks.sharded:
        from algos.fsdp import shard_network

        shard_network(env, policy)
    with ExitStack() as stack:
        old = done = None
        if ranks.main:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(alone(folder))
            old = earlier_run(folder, about, fresh=fresh, resume=bool(resume))
            if old is not None and (folder / "DONE").exists():
                done = result_of(folder)
        old, done = ranks.agreed((old, done))
        if done is not None:
            return RunResult(**done)
        bar = stack.enter_context(Progress(about["algo"], limit, updates, enabled=progress, silent=not ranks.main))
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
            alarm=alarm,
            ranks=ranks,
            watchers=Watchers(told if ranks.main else (), bar.say, env.device),
            sample_mp4=sample_mp4,
            halve_micro_batch=on_oom == "halve_micro_batch",
        )
        with writing(folder):
            if old is not None:
                go_on(loop, old, about)
            elif ranks.main:
                if fresh:
                    remove_run(folder)
                replace_json(folder / "run.json", about)
        resumed_from = None if old is None else loop.update
        meter.add_setup(setup_s)
        if loop.watchers:
            loop.watchers.tell("begin", folder, read_json(folder / "run.json"), loop.update, loop.evaluated_at)
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


def _agreed(ranks: distributed.Ranks, about: dict[str, Any]) -> dict[str, Any]:
    """The `run.json` of the first process, once this one's says the same."""
    told = ranks.agreed(about)
    found = differences(told, about)
    if found:
        raise ValueError(
            f"process {ranks.rank} was given another run than process 0: {'; '.join(found)} (there: process 0). Start "
            f"all processes with the same arguments"
        )
    return told


def _part(algorithm: Any, name: str, given: Any) -> Any:
    found = getattr(algorithm, name, None) if given is None else given
    if found is None:
        raise TypeError(
            f"{type(algorithm).__name__} has no attribute '{name}': set self.{name}, or give run({name}=...)"
        )
    return found
