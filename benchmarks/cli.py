"""The console command `vdm-env`. Only the module of the command that is asked for is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from benchmarks.arguments import refuse

PROGRAM = "vdm-env"
COMMANDS: dict[str, tuple[str, str]] = {
    "envs": ("benchmarks.commands.envs", "models, rewards and environments there are"),
    "algos": ("benchmarks.commands.algos", "algorithms there are, and the settings of one"),
    "demo": ("benchmarks.commands.demo", "two algorithms on a small video model, and a report"),
    "train": ("benchmarks.commands.train", "train one algorithm on one environment"),
    "bench": ("benchmarks.commands.bench", "one algorithm over several seeds, with tables"),
    "study": ("benchmarks.commands.study", "a blind comparison of two runs by a person"),
    "report": ("benchmarks.commands.report", "report.html and report.md of runs, written again"),
    "sample": ("benchmarks.commands.sample", "videos before and after training, side by side"),
    "eval": ("benchmarks.commands.evaluate", "scores on held-out prompts, with intervals"),
    "export": ("benchmarks.commands.export", "a run's LoRA with a model card, for diffusers and PEFT"),
    "download": ("benchmarks.commands.download", "fetch published weights"),
}
"""Module and one line about each command."""


def overview() -> str:
    """The help of `vdm-env` itself."""
    lines = [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [OPTIONS]",
            "",
            "Alignment of video diffusion models as reinforcement learning.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help explains the options of a command; {PROGRAM} --version says the version.",
            f"Start with: {PROGRAM} train --env MovingShapes-HPS --algo vader --budget 2min",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Raises:
        SystemExit: code 2 for arguments the parser refuses, 0 after --help.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    name = given[0] if given else ""
    if name in ("-h", "--help"):
        print(overview())
        raise SystemExit(0)
    if name == "--version":
        print(PROGRAM, _version())
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        asked = f"unknown command {name!r}" if name else "no command given"
        refuse(PROGRAM, f"{asked}: {hint} (see {PROGRAM} --help)")
    try:
        return import_module(COMMANDS[name][0]).main(given[1:])
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print(f"\n{PROGRAM} {name}: interrupted", file=sys.stderr)
        return 130


def _version() -> str:
    try:
        return version("vdm-env")
    except PackageNotFoundError:  # run from a copy that is not installed
        import vdm_env

        return vdm_env.__version__


if __name__ == "__main__":
    sys.exit(main())
