"""Algorithms head to head: reward against GPU-hours, from the plan over the runs to the report.

    python -m benchmarks.reward_vs_gpu_hours plan                     # what would be run, its hours and its disk
    python -m benchmarks.reward_vs_gpu_hours run --seeds 0 1 2 --budget 60s --heldout Aesthetic --jobs 2
    python -m benchmarks.reward_vs_gpu_hours report runs/reward_vs_gpu_hours

The same command again skips runs that are done and continues those that were stopped, from their last checkpoints; what
differs from what was run before is refused before anything is trained. With a budget in updates the numbers do not
depend on where runs were stopped, on their order, or on --jobs. Hypothesis, arms and budget are in benchmark.json
before the first run begins.

On a GPU a budget is device time; on a CPU it is CPU-seconds of the run's process.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks import plan_file
from benchmarks.arguments import one_line, parse, refuse
from benchmarks.bench_options import PROGRAM, Options, benchmark_of
from benchmarks.plan import folder_name, run_folder

COMMANDS = ("plan", "run", "report")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """Write report and tables of a benchmark again, also of a part of its runs."""

    folder: tyro.conf.Positional[str] = f"runs/{PROGRAM}"
    """of the benchmark"""


def prepare(options: Options, command: str) -> tuple[list[Any], dict[str, Any]]:
    """The jobs that are asked for, and what benchmark.json will say. Writes nothing.

    Raises:
        ValueError: wrong options, or runs that are there and differ from what is asked for.
    """
    from benchmarks.execute import differing, jobs

    for name, least in (("jobs", 0), ("num_threads", 1), ("cpus_per_run", 0), ("gpus_per_run", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not _by_ray(options):  # then other machines have it, and answer for themselves
        _check_device(options.device)
    asked = benchmark_of(options)
    root = Path(options.out) / asked.name
    old = plan_file.read(root)
    removed = {run_folder(root, arm.label, asked.env_id, seed) for arm in asked.arms for seed in asked.seeds}
    gone = [
        root / folder_name(arm["label"])
        for arm in (old or {"arms": []})["arms"]
        if not _runs(root / folder_name(arm["label"])) - (removed if options.fresh else set())
    ]
    values = plan_file.merged(old, asked, gone)
    said = plan_file.benchmark_of(values)
    own = {arm.label: arm for arm in asked.arms}
    whole = replace(said, arms=[own.get(arm.label, arm) for arm in said.arms])
    found = jobs(
        whole,
        asked.arms,
        asked.seeds,
        out=options.out,
        command=command,
        device=options.device,
        num_threads=options.num_threads,
        fresh=options.fresh,
        progress=options.jobs <= 1 and not _by_ray(options),
    )
    wrong = [] if options.fresh else [f"{job.name}: {'; '.join(keys)}" for job in found if (keys := differing(job))]
    if wrong:
        raise ValueError(
            "\n".join(
                [
                    f"{len(wrong)} of the runs in {root} were made with something else (there, given); run them as "
                    "they were, choose another --name, or remove them with --fresh",
                    *wrong,
                ]
            )
        )
    return found, values


def _check_device(name: str) -> None:
    """Raises ValueError unless this machine has the device."""
    import torch

    if name == "auto":
        return
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} cannot be used here: {one_line(error)}; give cpu, cuda or auto") from error


def _runs(folder: Path) -> set[Path]:
    return {path.parent for path in folder.rglob("run.json")}


def _by_ray(options: Options) -> bool:
    return options.ray or options.ray_address is not None


def run(options: Options, command: str, program: str = PROGRAM) -> int:
    """Makes the runs that are missing, then report and tables, also of a part.

    A run that cannot be set up, because of missing weights for instance, is the last one that is begun.

    Args:
        options: of the benchmark.
        command: what repeats it, for the record.
        program: what lines of output begin with.

    Returns:
        The exit code: 0; 1 if a run failed, 130 if it was interrupted, both with a report of what was done; 2 for wrong
        usage, before any training.
    """
    from benchmarks import execute

    def say(text: str) -> None:
        print(f"{program}: {text}", flush=True)

    try:
        todo, values = prepare(options, command)
        if _by_ray(options):
            from benchmarks.ray_runs import require_ray

            require_ray()
        root = Path(options.out) / values["name"]
        if plan_file.read(root) != values:
            plan_file.write(root, values)
    except (ValueError, OSError) as error:
        return complain(error, program)
    done = [job for job in todo if not job.fresh and execute.state(job.folder) == "DONE"]
    for job in done:
        say(f"{job.name}: done before")
    left = [job for job in todo if job not in done]
    outcomes: list[execute.Outcome] = []
    try:
        for stage in execute.stages(left):
            outcomes += _execute(options, stage, say)
            if any(one.ended in ("interrupted", "refused") for one in outcomes):
                break
    except KeyboardInterrupt:
        outcomes.append(execute.Outcome(ended="interrupted", message=""))
    except ValueError as error:  # Ray has no cluster there, or too small a one
        return complain(error, program)
    for reason in dict.fromkeys(one.message for one in outcomes if one.ended == "refused"):
        print(f"{program}: {reason}", file=sys.stderr)
    code = exit_code([one.ended for one in outcomes], some_done=bool(done))
    if code == 2:
        return code
    told = reported(root, program)  # also of a part
    return code or told


def complain(error: Exception, program: str = PROGRAM) -> int:
    """Says what was wrong, a line for each run that it is about; returns the exit code of wrong usage."""
    lines = str(error).splitlines() if isinstance(error, ValueError) else [one_line(error)]
    print(*(f"{program}: {line}" for line in lines), sep="\n", file=sys.stderr)
    return 2


def _execute(options: Options, stage: Sequence[Any], say: Callable[[str], None]) -> list[Any]:
    from benchmarks import execute

    if _by_ray(options):
        from benchmarks.ray_runs import with_ray

        return with_ray(
            stage,
            say,
            address=options.ray_address,
            gpus_per_run=options.gpus_per_run,
            cpus_per_run=options.cpus_per_run,
        )
    if options.jobs == 0:
        return execute.in_this_process(stage, say)
    return execute.in_processes(stage, options.jobs, say)


def exit_code(ended: Sequence[str], *, some_done: bool) -> int:
    """Of the endings of the runs that were begun."""
    if "interrupted" in ended:
        return 130
    if ended and all(one == "refused" for one in ended) and not some_done:
        return 2
    return int(any(one in ("failed", "refused") for one in ended))


def reported(folder: Path, program: str = PROGRAM) -> int:
    """Writes report and tables after runs; the exit code is 1 where none of them has anything to report."""
    from benchmarks.report import write_report

    try:
        print(f"{program}: report: {write_report(folder)}", flush=True)
    except (ValueError, OSError) as error:
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None, program: str = f"python -m benchmarks.{PROGRAM}") -> int:
    """Command line. Returns the exit code.

    Raises:
        SystemExit: code 2 for arguments the parser refuses, 0 after --help.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    if name in ("-h", "--help"):
        print(f"usage: {program} {{{','.join(COMMANDS)}}} [OPTIONS]\n\n{__doc__}")
        return 0
    if name not in COMMANDS:
        refuse(PROGRAM, f"expected one of {', '.join(COMMANDS)}, got {name or 'nothing'} (see --help)")
    if name == "report":
        from benchmarks.report import report

        return report(parse(ReportOptions, given[1:], f"{PROGRAM} report").folder)
    options: Options = parse(Options, given[1:], f"{PROGRAM} {name}")
    if name == "run":
        return run(options, shlex.join([*program.split(), *given]))
    from benchmarks.estimate import show

    return show(options)


if __name__ == "__main__":
    sys.exit(main())
