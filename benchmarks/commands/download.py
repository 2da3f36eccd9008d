"""`vdm-env download`: see `vdm_env.download`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from benchmarks.arguments import parse, refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """Fetch the published weights of models and rewards to where their loaders look.

    Files that are there already stay as they are, and an interrupted download goes on where it stopped. Read the
    licences it prints: they are those of the publishers.
    """

    names: tyro.conf.Positional[tuple[str, ...]]
    """models or rewards, as in environment ids, such as VideoCrafter2 or HPSv2.1"""
    folder: str | None = None
    """where to; None: the folder that VDM_WEIGHTS names, else the hub's local cache. Set VDM_WEIGHTS to it
    afterwards"""
    dry_run: bool = False
    """only list files, sizes and licences"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    config = parse(DownloadConfig, arguments, "vdm-env download")
    if not config.names:
        refuse(
            "vdm-env download", "fetch what? Name models or rewards, such as VideoCrafter2 (vdm-env envs lists them)"
        )
    from vdm_env.download import fetch_all

    return fetch_all(config.names, folder=config.folder, dry_run=config.dry_run)
