"""The runs of a benchmark: which there are, in what state, and each of them in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from benchmarks.arguments import one_line
from benchmarks.plan import Arm, Benchmark, run_folder
from benchmarks.records import json_object

Say = Callable[[str], None]
_ENDINGS = ("DONE", "INTERRUPTED", "FAILED")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: an arm with a seed."""

    benchmark: Benchmark
    """with all its arms"""
    arm: Arm
    """one of them"""
    seed: int
    """one of its seeds"""
    out: str
    """folder of all benchmarks"""
    command: str
    """what repeats the benchmark, for the record"""
    device: str = "auto"
    """cpu, cuda, ...; auto: cuda where there is one, else cpu"""
    num_threads: int = 1
    """CPU threads of the process"""
    fresh: bool = False
    """remove an earlier run first"""
    progress: bool = True
    """show every update"""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return run_folder(Path(self.out) / self.benchmark.name, self.arm.label, self.benchmark.env_id, self.seed)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.arm.label} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    ended: Literal["done", "interrupted", "failed", "refused"]
    """refused: it could not be set up, and nothing was trained"""
    message: str
    """in one line"""


def jobs(
    benchmark: Benchmark, arms: Sequence[Arm] | None = None, seeds: Sequence[int] | None = None, **options: Any
) -> list[Job]:
    """The runs of some arms and seeds, seed by seed, so that a part of them is a comparison already.

    Args:
        benchmark: with all arms.
        arms: whose runs; None: all.
        seeds: which; None: all.
        options: further fields of `Job`.
    """
    chosen = benchmark.arms if arms is None else arms
    return [
        Job(benchmark=benchmark, arm=arm, seed=seed, **options)
        for seed in (benchmark.seeds if seeds is None else seeds)
        for arm in chosen
    ]


def state(folder: Path) -> str:
    """Of a run's folder: "missing", "DONE", "INTERRUPTED", "FAILED", or "UNFINISHED": at work, or killed."""
    if not (folder / "run.json").exists():
        return "missing"
    return next((name for name in _ENDINGS if (folder / name).exists()), "UNFINISHED")


def differing(job: Job) -> list[str]:
    """In what the run in a job's folder is another one than the job's, without building anything.

    Raises:
        ValueError: the folder's run.json is broken, or the arm's algorithm or settings are not to be had.
    """
    path = job.folder / "run.json"
    if not path.exists():
        return []
    try:
        old = json_object(path)
    except ValueError as error:
        raise ValueError(f"{error}, or remove the run with --fresh") from error
    from algos.run_files import differences

    new = expected(job, str(old.get("task", {}).get("model_id")))
    there = {key: old.get(key) for key in new}
    there["task"] = {key: old.get("task", {}).get(key) for key in new["task"]}
    return differences(there, {key: new.get(key) for key in there})


def expected(job: Job, model: str) -> dict[str, Any]:
    """The part of a run's record that its plan determines.

    Args:
        job: the run.
        model: name of the environment's model.

    Raises:
        ValueError: see `differing`.
    """
    from algos.budget import Schedule, seconds
    from algos.provenance import plain
    from algos.zoo import recipe
    from benchmarks.arms import arm_record, arm_settings, eval_every
    from benchmarks.settings import algorithm_config, keyword_settings

    found, benchmark = recipe(job.arm.algo), job.benchmark
    limit = None if benchmark.budget is None else seconds(benchmark.budget)
    about = {
        "algo": job.arm.label,
        "seed": job.seed,
        "budget_device_s": limit,
        "budget_updates": benchmark.updates,
        "eval_every": str(Schedule(eval_every(benchmark), limit, benchmark.updates)),
        "task": plain({"env_id": benchmark.env_id, **arm_record(job.arm)}),
    }
    settings = arm_settings(benchmark, job.arm, job.seed, Path(job.out))
    if found.config is None:
        keyword_settings(found.algorithm, settings, job.seed)  # only to refuse what it does not take
        return about
    return {**about, "config": plain(algorithm_config(found.config, model, settings, job.seed)[0])}


def stages(todo: Sequence[Job]) -> list[list[Job]]:
    """The runs in an order in which those that read preference data come after those that build them."""
    from algos.zoo import recipe

    reads = [recipe(job.arm.algo).data == "reads" for job in todo]
    found = [[job for job, late in zip(todo, reads, strict=True) if late is wanted] for wanted in (False, True)]
    return [stage for stage in found if stage]


def run_job(job: Job) -> Outcome:
    """Trains and evaluates one run in this process; its folder says how it ended."""
    from benchmarks.arms import train_arm
    from benchmarks.options import place
    from benchmarks.training import SetupError

    try:
        import torch

        torch.set_num_threads(job.num_threads)
        result = train_arm(
            job.benchmark,
            job.arm,
            job.seed,
            out=Path(job.out),
            command=job.command,
            device=place(job.device),
            fresh=job.fresh,
            progress=job.progress,
        )
    except KeyboardInterrupt:
        return Outcome(ended="interrupted", message="stopped before its first update")
    except SetupError as error:
        return Outcome(ended="refused", message=one_line(error))
    except Exception as error:  # whatever it is, the other runs go on
        return Outcome(ended="failed", message=one_line(error))
    scores = "".join(f", {name} {value:.4g}" for name, value in result.scores.items())
    message = f"{result.updates} updates, {result.device_s:.1f} device-s{scores}"
    return Outcome(ended="interrupted" if result.interrupted else "done", message=message)


def in_this_process(todo: Sequence[Job], say: Say) -> list[Outcome]:
    """Runs one after the other, without processes of their own: no start-up each, but one peak of memory for all.

    After one that is refused no further one begins: what is wrong with it is mostly wrong with all.
    """
    found: list[Outcome] = []
    for job in todo:
        say(f"{job.name}: begins")
        found.append(run_job(job))
        say(f"{job.name}: {found[-1].ended}, {found[-1].message}")
        if found[-1].ended in ("interrupted", "refused"):
            break
    return found


def in_processes(todo: Sequence[Job], at_once: int, say: Say) -> list[Outcome]:
    """Runs each in a process of its own.

    Ctrl-C (or SIGTERM) is handed on to the runs, which end with a checkpoint; no further run begins. If this process is
    killed, they end by themselves in the same way. After one that is refused no further one begins.

    Args:
        todo: the runs.
        at_once: how many side by side.
        say: takes a line when a run begins or ends.

    Returns:
        The outcomes of the runs that were begun.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running, found = deque(todo), dict[int, tuple[Job, Any, Connection]](), list[Outcome]()
    with _handing_on([], running) as asked:
        refused = False
        while running or (waiting and not asked and not refused):
            while waiting and len(running) < at_once and not asked and not refused:
                job = waiting.popleft()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(job, sender), name=job.name)
                say(f"{job.name}: begins")
                process.start()
                sender.close()
                running[process.sentinel] = (job, process, receiver)
            for sentinel in wait(list(running), timeout=1.0):
                assert isinstance(sentinel, int)
                job, process, receiver = running.pop(sentinel)
                process.join()
                outcome = _outcome(receiver, process.exitcode, bool(asked))
                say(f"{job.name}: {outcome.ended}, {outcome.message}")
                found.append(outcome)
                refused = refused or outcome.ended == "refused"
    return found


def _child(job: Job, sender: Connection) -> None:
    os.setpgrp()  # Ctrl-C in the terminal reaches the parent alone, which hands it on once
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=follow, daemon=True).start()
    sender.send(run_job(job))
    sender.close()


def _outcome(receiver: Connection, code: int | None, asked: bool) -> Outcome:
    """What a process sent before its end, or what its end says."""
    try:
        with receiver:
            return receiver.recv()
    except EOFError:
        if asked:
            return Outcome(ended="interrupted", message="stopped before its first update")
        why = f"signal {-code}" if code is not None and code < 0 else f"code {code}"
        return Outcome(ended="failed", message=f"its process ended with {why}; the same command goes on with it")


@contextmanager
def _handing_on(asked: list[int], running: Mapping[int, tuple[Job, Any, Connection]]) -> Iterator[list[int]]:
    """Hands signals that ask for an end on to the processes; the list says which came."""

    def handle(number: int, frame: Any) -> None:
        asked.append(number)
        for _, process, _ in running.values():
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
