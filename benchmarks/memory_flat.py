"""Shows that a long run does not eat memory: resident memory over many updates of one algorithm.

    python -m benchmarks.memory_flat --updates 1000 --algo vader

A small run on the embedded model with log, evaluations and checkpoints. Memory is read after every update; the mean of
the last tenth is compared with that of the second tenth, in which everything that grows once has grown. The exit code
is 0 if the first exceeds the second by at most 2 %.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.arguments import one_line, parse

LIMIT = 0.02
_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """Measure resident memory over a long run."""

    algo: str = "vader"
    """which algorithm of the zoo"""
    env_id: str = "MovingShapes-HPS"
    """environment"""
    updates: int = 1000
    """at least 20"""
    videos: int = 8
    """of an update"""
    num_threads: int = 1
    """CPU threads of the process"""


def resident() -> int:
    """Bytes of this process that are in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watched:
    """An algorithm whose updates are followed by a reading of the memory."""

    def __init__(self, algorithm: Any, read: Callable[[], int] = resident) -> None:
        self.env, self.policy, self.config = algorithm.env, algorithm.policy, algorithm.config
        self.state_dict, self.load_state_dict = algorithm.state_dict, algorithm.load_state_dict
        self.algorithm, self.read = algorithm, read
        self.readings: list[int] = []

    def update(self) -> Any:
        """One update of the algorithm."""
        metrics = self.algorithm.update()
        self.readings.append(self.read())
        return metrics


def growth(readings: Sequence[int]) -> float:
    """By which part the mean of the last tenth exceeds that of the second tenth."""
    tenth = len(readings) // 10
    early, late = readings[tenth : 2 * tenth], readings[-tenth:]
    return (sum(late) / tenth) / (sum(early) / tenth) - 1


def watch(algorithm: Any, evaluator: Any, updates: int, out: str | Path) -> list[int]:
    """Runs an algorithm with ten evaluations and checkpoints; returns the bytes after every update."""
    import algos

    watched = Watched(algorithm)
    algos.run(watched, out=out, updates=updates, evaluate=evaluator, eval_every=max(1, updates // 10), progress=False)
    return watched.readings


def memory_flat(config: MemoryConfig) -> int:
    """Runs and prints.

    Returns:
        The exit code: 0 if memory stays flat, 1 if it grows or the run was interrupted, 2 for wrong usage.
    """
    import torch

    import algos
    import vdm_env

    try:
        if config.updates < 20:
            raise ValueError(f"--updates must be at least 20, got {config.updates}")
        torch.set_num_threads(config.num_threads)
        algorithm_class, config_class = algos.load(config.algo)
        sampling = {"num_envs": config.videos, "num_steps": 3, "guidance_scale": 1.0}
        env = vdm_env.make(config.env_id, **{**sampling, **algos.ZOO[config.algo].env})
        preset = config_class.preset(env.model.spec.name)
        names = {field.name for field in dataclasses.fields(preset)} & {"videos_per_update", "videos_per_rollout"}
        algorithm = algorithm_class(
            env, env.make_policy(), dataclasses.replace(preset, **dict.fromkeys(names, config.videos))
        )
        held_out = env.derive(split="validation", group_size=1, decode_frames=None)
        evaluator = algos.Evaluator(held_out, held_out.prompt_ids("validation")[:8], num_videos=2)
    except (ValueError, TypeError) as error:
        print(f"memory_flat: {one_line(error)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as out:
        readings = watch(algorithm, evaluator, config.updates, out)
    if len(readings) < config.updates:
        print(f"memory_flat: interrupted after {len(readings)} updates", file=sys.stderr)
        return 1
    tenth = config.updates // 10
    for start in range(0, config.updates - tenth + 1, tenth):
        part = readings[start : start + tenth]
        print(f"updates {start + 1:5} to {start + tenth:5}: {sum(part) / tenth / _MIB:8.1f} MiB")
    found = growth(readings)
    print(f"{config.algo}: resident memory grew by {found:+.2%} from the second tenth to the last (limit {LIMIT:.0%})")
    return int(found > LIMIT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.memory_flat`."""
    return memory_flat(parse(MemoryConfig, arguments, "memory_flat"))


if __name__ == "__main__":
    sys.exit(main())
