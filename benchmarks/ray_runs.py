"""The runs of a benchmark as Ray tasks: the same function, the same files, on the machines of a cluster.

Every machine needs the package, the module of a class of one's own, and the folder of runs at the same path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.execute import Job, Outcome, Say, run_job, state


def require_ray() -> Any:
    """The module `ray`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--ray needs Ray: pip install 'vdm-env[ray]'") from error
    return ray


def with_ray(
    todo: Sequence[Job],
    say: Say,
    *,
    address: str | None = None,
    gpus_per_run: float | None = None,
    cpus_per_run: float = 1.0,
) -> list[Outcome]:
    """Runs each as a task in a worker process of its own.

    Args:
        todo: the runs.
        say: takes a line when a run begins or ends.
        address: of a running cluster, such as "auto"; None: a new one on this machine.
        gpus_per_run: share of a GPU that a run holds; 0.5: two runs share one. None: 1 where the cluster has any and
            the runs are not for the CPU.
        cpus_per_run: CPU cores that a run holds.

    Returns:
        The outcomes of the runs that were begun.

    Raises:
        ValueError: Ray is not installed, no cluster is at the address, or it has not what a run is to hold.
    """
    ray = require_ray()
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(address=address, include_dashboard=False)
        except (ConnectionError, ValueError) as error:
            raise ValueError(f"--ray-address {address}: no Ray cluster answers: {error}") from error
    found: list[Outcome] = []
    try:
        there = ray.cluster_resources()
        gpus = there.get("GPU", 0.0)
        if gpus_per_run is None:
            gpus_per_run = min(1.0, gpus) if any(job.device != "cpu" for job in todo) else 0.0
        if gpus_per_run > gpus or cpus_per_run > there.get("CPU", 0.0):
            raise ValueError(
                f"a run is to hold {gpus_per_run:g} GPUs and {cpus_per_run:g} CPU cores, but Ray has {gpus:g} GPUs and "
                f"{there.get('CPU', 0.0):g} cores: lower --gpus-per-run or --cpus-per-run"
            )
        task = ray.remote(num_gpus=gpus_per_run, num_cpus=cpus_per_run, max_calls=1, max_retries=0)(_task)
        folder = str(Path.cwd())  # a worker's may be another one
        pending = {task.remote(job, folder): job for job in todo}
        for job in todo:
            say(f"{job.name}: waits for Ray")
        while pending:
            try:
                done, _ = ray.wait(list(pending), num_returns=1)
            except KeyboardInterrupt:
                for reference in pending:
                    ray.cancel(reference, force=False)
                say("stopping after the updates under way")
                ray.wait(list(pending), num_returns=len(pending))
                done = list(pending)
            for reference in done:
                job = pending.pop(reference)
                found.append(_result(ray, reference, job))
                say(f"{job.name}: {found[-1].ended}, {found[-1].message}")
    finally:
        if own:
            ray.shutdown()
    return found


def _task(job: Job, folder: str) -> Outcome:
    import os
    import sys

    os.chdir(folder)
    sys.path.append(folder)
    return run_job(job)


def _result(ray: Any, reference: Any, job: Job) -> Outcome:
    try:
        return ray.get(reference)
    except (ray.exceptions.TaskCancelledError, KeyboardInterrupt):
        ended = state(job.folder)
        return Outcome(ended="done" if ended == "DONE" else "interrupted", message=f"stopped: {ended}")
    except ray.exceptions.RayError as error:  # the worker was killed, or its machine is gone
        text = " ".join(str(error).split())
        return Outcome(ended="failed", message=f"Ray lost it: {text}; the same command goes on with it")
