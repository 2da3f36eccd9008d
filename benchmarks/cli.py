"""The console command `vdm-env`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from benchmarks.arguments import parse
from benchmarks.demo import DemoConfig, demo


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvsConfig:
    """List the environment ids, models and rewards there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Write report.html and report.md again from the files of earlier runs."""

    folder: Annotated[str, tyro.conf.Positional]
    """folder with runs, such as runs/demo"""


Command = (
    Annotated[DemoConfig, tyro.conf.subcommand("demo")]
    | Annotated[EnvsConfig, tyro.conf.subcommand("envs")]
    | Annotated[ReportConfig, tyro.conf.subcommand("report")]
)


def envs() -> int:
    """Prints what `vdm_env.make` knows."""
    import vdm_env

    for title, names in (
        ("models", vdm_env.list_models()),
        ("rewards", vdm_env.list_rewards()),
        ("environments", vdm_env.list_envs()),
    ):
        print(f"{title}:", *names, sep="\n  ")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Raises:
        SystemExit: code 2 for arguments the parser refuses, 0 after --help.
    """
    command = parse(Command, arguments, "vdm-env")
    if isinstance(command, DemoConfig):
        return demo(command)
    if isinstance(command, ReportConfig):
        from benchmarks.report import main as report

        return report([command.folder])
    return envs()


if __name__ == "__main__":
    sys.exit(main())
