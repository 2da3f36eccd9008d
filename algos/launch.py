"""How many processes a launcher has started, by its environment variables. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FOREIGN = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
HOW = "start it with `accelerate launch --multi_gpu --num_processes N ...` or `torchrun --nproc-per-node N ...`"


class LaunchError(ValueError):
    """The processes of a run were not started so that they could find each other."""


def launched(environ: Mapping[str, str]) -> int:
    """How many processes the environment variables of a launcher speak of, 1 without a launcher.

    Raises:
        LaunchError: they are there in part, contradict each other, or are those of a launcher of processes that could
            not find each other: each would train by itself.
    """
    if not any(environ.get(name) for name in _NEEDED[:3]):
        for name in _FOREIGN:
            if environ.get(name, "1").strip() not in ("", "1"):
                raise LaunchError(
                    f"{name}={environ[name]}: several processes were started, but {', '.join(_NEEDED)} are not set, "
                    f"and each would train by itself; {HOW}"
                )
        return 1
    if environ.get("WORLD_SIZE") == "1" and environ.get("RANK", "0") == "0":
        return 1
    missing = [name for name in _NEEDED if not environ.get(name)]
    if missing:
        there = [f"{name}={environ[name]}" for name in _NEEDED if environ.get(name)]
        raise LaunchError(
            f"{', '.join(there)} is set, but {', '.join(missing)} is not: half a launch environment, with which the "
            f"processes would train apart; {HOW}, or unset all of them for a single process"
        )
    try:
        rank, world, local = (int(environ[name]) for name in _NEEDED[:3])
    except ValueError:
        rank, world, local = -1, 0, -1
    if not (0 <= rank < world and 0 <= local < world):
        found = ", ".join(f"{name}={environ[name]}" for name in _NEEDED[:3])
        raise LaunchError(f"{found}: expected whole numbers with 0 <= RANK, LOCAL_RANK < WORLD_SIZE; {HOW}")
    return world
