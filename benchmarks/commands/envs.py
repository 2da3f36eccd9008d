"""`vdm-env envs`: what `vdm_env.make` knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.arguments import parse


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvsConfig:
    """List the models and rewards there are; an environment is called <Model>-<Reward>."""

    ids: bool = False
    """list every id of one model and one reward instead, a line each"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    config = parse(EnvsConfig, arguments, "vdm-env envs")
    import vdm_env
    from vdm_env.models import MODELS
    from vdm_env.rewards import REWARDS

    if config.ids:
        print(*vdm_env.list_envs(), sep="\n")
        return 0
    tables = (("models", vdm_env.list_models(), MODELS), ("rewards", vdm_env.list_rewards(), REWARDS))
    for title, names, known in tables:
        width = max(map(len, names))
        print(f"{title}:")
        for name in names:
            summary = known[name].summary if name in known else "plug-in"  # type: ignore[attr-defined]  # entries of both
            print(f"  {name:<{width}}  {summary}".rstrip())
    print(
        "environments:\n  <Model>-<Reward>, such as MovingShapes-HPS; rewards combine, as in "
        "MovingShapes-HPS+0.1*Aesthetic\n  vdm-env envs --ids lists those of one reward"
    )
    return 0
