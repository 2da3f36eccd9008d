"""Kills training runs at random moments and shows that the continued ones end with the same bits.

    python -m benchmarks.kill_and_resume --kills 50 --out runs/kill_and_resume

Each algorithm of the zoo trains once without interruption, on the small embedded model and with its preset made
smaller. Then the same run is started again and killed (SIGKILL, which no process can catch) at a random moment,
continued, perhaps killed again, until its share of the kills is used up and it may reach its end. Weights, optimiser
state, rows of the logs (times and memory apart) and videos of the two are compared bit for bit. Every process has one
thread. The exit code is 0 if all agree. Videos for the algorithms that learn from files are made first.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algos.zoo import ZOO, entry
from benchmarks.arguments import one_line, parse

# A few videos an update, so that many updates fit into the time of a kill.
_SMALL: dict[str, Any] = {
    "videos_per_update": 8,
    "videos_per_rollout": 8,
    "videos_per_step": 4,
    "pairs_per_step": 4,
    "micro_batch": 4,
    "prompts": 4,
    "refresh_every": 2,
}
_OWN: dict[str, dict[str, Any]] = {"d3po": {"micro_batch": 8}}  # trains the videos of a group together
_SAMPLING: dict[str, Any] = {"num_envs": 8, "num_steps": 3, "guidance_scale": 1.0}
_GROUPS = 4
_STATES = ("before the first file", "rows after the checkpoint", "a half-written file", "a checkpoint and no more")


@dataclass(frozen=True, kw_only=True, slots=True)
class KillConfig:
    """Kill training runs at random moments, continue them and compare."""

    algos: tuple[str, ...] = ()
    """which algorithms of the zoo; none: all"""
    kills: int = 50
    """SIGKILLs in total, dealt out evenly"""
    updates: int = 6
    """of each run"""
    checkpoint_every: int = 2
    """updates between checkpoints"""
    env_id: str = "MovingShapes-HPS"
    """environment"""
    seed: int = 0
    """of the moments of the kills and of training"""
    out: str = "runs/kill_and_resume"
    """folder of the runs; what an earlier call left there is removed"""


def train(name: str, env_id: str, out: str, data: str, updates: int, checkpoint_every: int, seed: int) -> None:
    """One process of a run: begins it, or continues it where it was killed. Writes to `out` only."""
    import torch

    import algos

    torch.set_num_threads(1)
    env, policy, algorithm = build(name, env_id, data, seed)
    held_out = env.derive(split="test", num_envs=4, group_size=1, decode_frames=None)
    algos.run(
        algorithm,
        out=out,
        updates=updates,
        evaluate=algos.Evaluator(held_out, held_out.prompt_ids("test")[:4], num_videos=1),
        eval_every=3,
        checkpoint_every=checkpoint_every,
        seed=seed,
        algo=name,
        env=env,
        policy=policy,
        resume="auto",
        progress=False,
    )


def build(name: str, env_id: str, data: str, seed: int) -> tuple[Any, Any, Any]:
    """Environment, policy and algorithm of a run; `data` are preferences, for the algorithms that read them."""
    import algos
    import vdm_env

    algorithm_class, config_class = algos.load(name)
    env = vdm_env.make(env_id, seed=seed, **_SAMPLING, **entry(name).env)
    policy = env.make_policy(seed=seed)
    config = config_class.preset(env.model.spec.name)
    names = {field.name for field in dataclasses.fields(config)}
    wanted = {**_SMALL, **_OWN.get(name, {}), "folder": data, "seed": seed}
    config = dataclasses.replace(config, **{key: value for key, value in wanted.items() if key in names})
    return env, policy, algorithm_class(env, policy, config)


def make_data(env_id: str, folder: str, seed: int) -> None:
    """Preference data, complete, for the algorithms that learn from them."""
    import torch

    import vdm_env
    from algos.preference_sampling import build_preferences

    torch.set_num_threads(1)
    env = vdm_env.make(env_id, seed=seed, **_SAMPLING)
    build_preferences(folder, env, env.make_policy(seed=seed), groups=_GROUPS, candidates=4, seed=seed)


def compare(whole: Path, killed: Path) -> list[str]:
    """What differs between two finished runs; times and memory are left out."""
    from algos.checkpoint import load_checkpoint
    from algos.checkpoint_store import newest_checkpoint

    found = []
    for name in ("train.jsonl", "eval.jsonl"):
        if _rows(whole / name) != _rows(killed / name):
            found.append(name)
    ends = [newest_checkpoint(folder) for folder in (whole, killed)]
    states = [load_checkpoint(end)["algorithm"] for end in ends]
    if not _same(*states):
        found.append("state of the algorithm")
    for what, (a, b) in (
        ("weights", [end / "policy" for end in ends]),
        ("videos", [folder / "samples" for folder in (whole, killed)]),
    ):
        names = [sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()) for folder in (a, b)]
        if names[0] != names[1] or any((a / name).read_bytes() != (b / name).read_bytes() for name in names[0]):
            found.append(what)
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_s") and not k.startswith("peak_")} for row in rows]


def _same(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _left(folder: Path) -> str:
    """What a killed process left, one of `_STATES`."""
    if not (folder / "run.json").exists():
        return _STATES[0]
    if [*folder.rglob("*.new"), *folder.rglob("*.part"), *folder.rglob("*.old")]:
        return _STATES[2]
    log = folder / "train.jsonl"
    written = log.read_bytes().count(b"\n") if log.exists() else 0
    saved = max((int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()), default=0)
    return _STATES[1] if written > saved else _STATES[3]


class Killer:
    """Starts the processes of runs and kills them."""

    def __init__(self, config: KillConfig) -> None:
        self.config, self.out = config, Path(config.out)
        self.data = self.out / "preferences"
        self.draw = random.Random(config.seed)
        # Forked from a server that has imported everything: a process starts at once, with no thread inherited.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["vdm_env", "algos.preference_sampling", "algos.ddpo"])
        self.left: Counter[str] = Counter()

    def start(self, name: str, out: Path) -> Any:
        """A process at work on a run."""
        c = self.config
        given = (name, c.env_id, str(out), str(self.data), c.updates, c.checkpoint_every, c.seed)
        return self._process(train, given)

    def _process(self, target: Any, given: tuple[Any, ...]) -> Any:
        process = self.context.Process(target=target, args=given)
        process.start()
        return process

    def prepare(self) -> None:
        """Makes the preference data."""
        process = self._process(make_data, (self.config.env_id, str(self.data), self.config.seed))
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the preference data were not made (exit code {process.exitcode})")

    def whole(self, name: str, out: Path) -> float:
        """An uninterrupted run; returns its seconds from run.json to the end."""
        process = self.start(name, out)
        while process.is_alive() and not (out / "run.json").exists():
            time.sleep(0.002)
        begun = time.perf_counter()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{name} failed without having been killed (exit code {process.exitcode})")
        return time.perf_counter() - begun

    def killed(self, name: str, out: Path, kills: int, lasts: float) -> int:
        """A run that is killed so many times, each after a random part of `lasts` seconds, and then ends.

        A process that is done before its moment comes is not counted: the run begins anew in the next folder.

        Returns:
            Kills that hit.
        """
        hits = 0
        while True:
            begun = out / "run.json"
            before = begun.stat().st_mtime_ns if begun.exists() else None
            process = self.start(name, out)
            if hits == kills:
                process.join()
                break
            while process.is_alive() and (not begun.exists() or begun.stat().st_mtime_ns == before):
                time.sleep(0.002)
            # Later kills find less left to do; what is drawn is a part of that.
            process.join(self.draw.uniform(0, lasts * 0.8 / (1 + hits)))
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            hits += 1
            self.left[_left(out)] += 1
        if process.exitcode:
            raise RuntimeError(f"{name} failed after {hits} kills (exit code {process.exitcode})")
        return hits


def kill_and_resume(config: KillConfig) -> int:
    """Runs everything and prints one line for each algorithm.

    Returns:
        The exit code: 0 if all continued runs agree with the uninterrupted ones, 1 if not, 2 for wrong usage.
    """
    try:
        names = [name for name in config.algos or ZOO if entry(name)]
        if min(config.kills, config.updates, config.checkpoint_every) < 1:
            raise ValueError("--kills, --updates and --checkpoint-every must be at least 1")
    except ValueError as error:
        print(f"kill_and_resume: {one_line(error)}", file=sys.stderr)
        return 2
    killer = Killer(config)
    if killer.out.exists() and not (killer.out / "preferences").exists() and any(killer.out.iterdir()):
        print(f"kill_and_resume: {killer.out} holds other files: choose another --out", file=sys.stderr)
        return 2
    shutil.rmtree(killer.out, ignore_errors=True)
    killer.prepare()
    total, different = 0, 0
    for number, name in enumerate(names):
        share = config.kills // len(names) + (number < config.kills % len(names))
        lasts = killer.whole(name, killer.out / name / "whole")
        hits, attempt, found = 0, 0, []
        while hits < share:
            folder = killer.out / name / f"killed_{attempt}"
            hits += killer.killed(name, folder, min(share - hits, 3), lasts)
            found += compare(killer.out / name / "whole", folder)
            attempt += 1
        total, different = total + hits, different + bool(found)
        says = f"DIFFERENT: {', '.join(sorted(set(found)))}" if found else "same bits"
        print(f"{name:15} {hits} kills in {attempt} runs of {config.updates} updates  {says}", flush=True)
    print(f"{total} kills; they left " + ", ".join(f"{word}: {killer.left[word]}" for word in _STATES))
    print(f"{len(names) - different} of {len(names)} algorithms ended with the same bits")
    return int(different > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.kill_and_resume`."""
    return kill_and_resume(parse(KillConfig, arguments, "kill_and_resume"))


if __name__ == "__main__":
    sys.exit(main())
