"""Algorithms of the zoo on Gaussian data in float64, trained in one process or in several that share the work.

`spread` starts processes as a launcher does, by environment variables. They are forked from a server that has imported
everything (`multiprocessing`'s forkserver), because importing takes longer than all that is tested.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from dataclasses import fields, replace
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import torch
from gaussian import START, full_policy, gaussian_env
from killing import SMALL, start
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import algos
from algos.ddpo import DDPO, DDPOConfig
from algos.distributed import announcing, current
from algos.fsdp import shard_network
from algos.training import start_stream

UPDATES = 5
TOGETHER = 8
"""videos simulated side by side, by all processes"""
CASES = {name: (name, {}) for name in algos.ZOO} | {
    "ddpo per prompt": ("ddpo", {"advantage": "per_prompt", "updates_per_rollout": 2}),
    "flow_grpo window": ("flow_grpo", {"window_size": 2, "best_of_n": 2, "filter_equal_groups": True}),
    "d3po random": ("d3po", {"pairs": "random", "steps_per_update": 3}),
    "ppo_torchrl critic": ("ppo_torchrl", {"critic": True, "baseline": "batch"}),
    "diffusion_kto singles": ("diffusion_kto", {"videos_per_step": 2, "labels": "update"}),
    "rwr best": ("rwr", {"weighting": "best_of_group", "videos_per_step": 3}),
}
"""name: of the zoo, and settings unlike the preset's"""


def build(case, folder, **changes):
    """A zoo algorithm with its preset, made small; num_envs and micro_batch are divided among the processes."""
    (name, settings), world = CASES[case], current().world
    entry = algos.ZOO[name]
    algorithm_class, config_class = algos.load(name)
    options = {"group_size": 1, "num_steps": 3, **entry.env, "num_envs": TOGETHER // world, "dtype": torch.float64}
    options["group_size"] = 2 if options["group_size"] > 1 else 1
    rank = 2
    if name == "ppo_sb3":  # it has float32 observations only; the weights are float64 all the same
        options |= {"dtype": torch.float32, "means": START}
        rank = 0
    env = gaussian_env(**options)
    if rank == 0:
        env.model.denoiser.double()
    policy = env.make_policy(lora_rank=rank, seed=0)
    config = config_class.preset("MovingShapes")
    small = {**SMALL, "micro_batch": 4 // world, "learning_rate": 1e-3, "tracker_min_count": 3, **settings, **changes}
    names = {field.name for field in fields(config)}
    config = replace(config, **{key: value for key, value in small.items() if key in names})
    if "folder" in names:
        config = replace(config, folder=str(folder))
    return algorithm_class(env, policy, config)


def train(algorithm, updates=UPDATES):
    """The gradients of the first optimiser step, how far the weights have moved in the end, and the updates' metrics.

    Tables of tensors: "gradient.<n>", "moved.<n>", and "metric.<name>" [updates].
    """
    found = {}
    start = [p.detach().clone() for p in algorithm.policy.trainable_parameters()]

    def remember(optimizer, *_):
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            found.setdefault(f"gradient.{i}", torch.zeros_like(p) if p.grad is None else p.grad.clone())

    optimizer = getattr(algorithm, "optimizer", None) or algorithm.learner.optimizer
    handle = optimizer.register_step_pre_hook(remember)
    rows = [algorithm.update() for _ in range(updates)]
    handle.remove()
    for i, (before, after) in enumerate(zip(start, algorithm.policy.trainable_parameters(), strict=True)):
        found[f"moved.{i}"] = after.detach() - before
    for key in set.intersection(*(set(row) for row in rows)):
        found[f"metric.{key}"] = torch.tensor([row[key] for row in rows], dtype=torch.float64)
    return found


def difference(a, b):
    """Largest difference between two tables of `train` by kind ("gradient", "moved", "metric.<name>").

    Relative to the largest number of its kind; of metrics at least to 1e-3, because some are 0 but for rounding.
    """
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    off, scale = {}, {}
    for key in a:
        assert a[key].isfinite().all() and b[key].isfinite().all(), key
        kind = key if key.startswith("metric") else key.partition(".")[0]
        off[kind] = max(off.get(kind, 0.0), float((a[key] - b[key]).abs().max()))
        scale[kind] = max(scale.get(kind, 1e-3 if kind == key else 0.0), float(a[key].abs().max()))
    return {kind: off[kind] / scale[kind] for kind in off}


def train_cases(out, cases):
    """A job: what `train` returns for each case, to out/<case>_<rank>.safetensors; their folders are out/<case>."""
    for case in cases:
        found = train(build(case, Path(out) / case))
        save_file({k: v.contiguous() for k, v in found.items()}, f"{out}/{case}_{current().rank}.safetensors")


class Sabotaged:
    """An algorithm in one of whose updates something happens to one of the processes."""

    def __init__(self, algorithm, rank, update, what):
        self.algorithm, self.config, self.env, self.policy = (
            algorithm,
            algorithm.config,
            algorithm.env,
            algorithm.policy,
        )
        self.rank, self.left, self.what = rank, update, what

    def update(self):
        self.left -= 1
        if self.left == 0 and current().rank == self.rank:
            if isinstance(self.what, Exception):
                raise self.what
            os.kill(os.getpid(), self.what)
        return self.algorithm.update()

    def state_dict(self):
        return self.algorithm.state_dict()

    def load_state_dict(self, state):
        self.algorithm.load_state_dict(state)


def run_case(out, case, *sabotage):
    """A job: `algos.run` in out/run, continued where there is one already; sabotage: rank, update and what happens."""
    algorithm = build(case, Path(out) / case)
    ended = start(Sabotaged(algorithm, *sabotage) if sabotage else algorithm, Path(out) / "run", algo=case).ended
    (Path(out) / f"ended_{current().rank}").write_text(ended)


class Alone:
    """Trains on its part of the videos without telling the others."""

    def __init__(self, env, policy):
        self.env, self.policy, self.parameters = env, policy, policy.trainable_parameters()
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1)
        start_stream(env, 0)

    def update(self):
        obs, _ = self.env.reset()
        for _ in range(self.env.num_steps):
            obs, reward, *_ = self.env.step(self.policy(obs))
        (-reward.mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"reward_mean": float(reward.detach().mean())}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def mistakes(out):
    """A job: what is said where processes would not train together, to out/said_<rank>, a line each."""
    rank = current().rank
    env = gaussian_env(num_envs=4, group_size=2)

    def other_weights():
        DDPO(env, env.make_policy(lora_rank=2, seed=rank), DDPOConfig.preset("MovingShapes"))

    def alone():
        algos.run(Alone(env, full_policy(env)), out=f"{out}/alone", updates=2, progress=False)

    def other_arguments():
        algos.run(Alone(env, full_policy(env)), out=f"{out}/other", updates=2 + rank, progress=False)

    def foreign_env():
        start_stream(SimpleNamespace(num_envs=4), 0)

    _say(out, other_weights, alone, other_arguments, foreign_env)


def sharded_mistakes(out):
    """A job: likewise of processes that share one network."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    env = gaussian_env(num_envs=4, group_size=2)

    def all_weights():
        shard_network(env, full_policy(env))

    def uneven_rows():
        current().rows(3)

    def uneven_calls():
        current().check_even(1)
        current().check_even(2 + current().rank)

    _say(out, all_weights, uneven_rows, uneven_calls)


def _say(out, *mistakes):
    said = []
    for mistake in mistakes:
        try:
            mistake()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    (Path(out) / f"said_{current().rank}").write_text("\n".join(said))


def train_sharded(out, cases):
    """A job: as `train_cases`, with the frozen weights dealt out."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for case in cases:
        algorithm = build(case, Path(out) / case)
        shard_network(algorithm.env, algorithm.policy)
        denoiser = algorithm.env.mdp.model.denoiser
        assert all(isinstance(p, DTensor) != p.requires_grad for p in denoiser.parameters())
        save_file(
            {k: v.contiguous() for k, v in train(algorithm).items()}, f"{out}/{case}_{current().rank}.safetensors"
        )


def run_sharded(out, case):
    """A job: `run_case` with the frozen weights dealt out."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    run_case(out, case)


def trained(out, case, rank):
    return load_file(f"{out}/{case}_{rank}.safetensors")


def _server():
    """The context whose processes are forked from a server that has imported this file and all it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["spread"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()  # it is told of no other path, and leaves out what it cannot import
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


class Spread:
    """Processes that do a job together; each leaves its exception, if it ends with one, in out/error_<rank>."""

    def __init__(self, out, job, *arguments, world=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = _server()
        self.out, self.ended = Path(out), {}
        told = [(rank, world, port, str(out), job, arguments) for rank in range(world)]
        self.processes = [context.Process(target=_process, args=one) for one in told]
        for process in self.processes:
            process.start()

    def wait(self, seconds=600):
        """Exit codes and errors (None where there is none) of all; one that is still there then is ended, as -9."""
        until, self.ended = time.monotonic() + seconds, {}
        while len(self.ended) < len(self.processes):
            late = time.monotonic() > until
            for process in self.processes:
                if late:
                    process.kill()
                process.join(0.05)
                if process.exitcode is not None:
                    self.ended.setdefault(process, time.monotonic())
        errors = [self.out / f"error_{rank}" for rank in range(len(self.processes))]
        return [p.exitcode for p in self.processes], [e.read_text() if e.exists() else None for e in errors]

    def seconds_between_ends(self):
        """From the end of the first process to that of the last."""
        return max(self.ended.values()) - min(self.ended.values())


def _process(rank, world, port, out, job, arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    try:
        with announcing():
            job(out, *arguments)
    except Exception as error:
        (Path(out) / f"error_{rank}").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error
