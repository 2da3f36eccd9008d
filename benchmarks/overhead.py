"""What the environment costs: `env.step` and `policy(obs)` against a bare hand-written loop over the same network.

    python -m benchmarks.overhead --num-envs 16 --repeats 15

Both sides run in the same process, in turn, with the same latents and noise; the figure is the median over repeats of
the ratio of the two sampling times, without decoding and scoring (which both would do alike). Process CPU time is
reported beside wall time.

`metering_us` is what a run's meter costs beside: microseconds of an update that does nothing, with its train phase and
its row of `train.jsonl`, the median over blocks of updates.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

import vdm_env
from algos.flops import Flops
from algos.meter import Meter
from vdm_env import noise

METERED = 200
"""Empty updates in a block"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Overhead of the environment against a bare loop."""

    models: tuple[str, ...] = ("MovingShapes", "MovingShapesUNet")
    """embedded models to measure"""
    num_envs: int = 16
    """videos side by side"""
    repeats: int = 15
    """pairs of runs"""
    num_threads: int = 2
    """CPU threads"""
    out: Path | None = None
    """CSV file to write"""


def bare_loop(env: vdm_env.DenoisingVectorEnv, seeds: list[int], prompt_ids: list[int]) -> Tensor:
    """Guided sampling as one would write it without an environment."""
    model, table, w = env.model, env.mdp.table, env.config.guidance_scale
    condition, empty = env.mdp.condition(prompt_ids), env.mdp.unconditional(len(seeds))
    both = {name: torch.cat([empty[name], condition[name]]) for name in condition}
    a, b = table.A.float(), table.B.float()
    std, t = table.action_std.float(), table.timesteps.float()
    x = noise.normal(seeds, noise.INITIAL, env.mdp.latent_shape)
    for k in range(table.num_steps):
        a_u, a_c = model.predict(torch.cat([x, x]), t[k].expand(2 * len(x)), both).chunk(2)
        mean = a_u + w * (a_c - a_u)
        x = a[k] * x + b[k] * (mean + std[k] * noise.normal(seeds, k, env.mdp.latent_shape))
    return x


def env_loop(
    env: vdm_env.DenoisingVectorEnv, policy: vdm_env.DenoisingPolicy, seeds: list[int], ids: list[int]
) -> Tensor:
    """The same through the public interface."""
    obs, _ = env.reset(seed=seeds, options={"prompt_ids": ids})
    for _ in range(env.num_steps):
        obs, *_ = env.step(policy(obs))
    return obs["latents"]


def timed(run: Callable[[], Tensor]) -> tuple[float, float, Tensor]:
    """Wall and process seconds, and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def metering_seconds(meter: Meter, blocks: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one metered update that does nothing, the median over blocks of `METERED`; one before warms up."""
    times = []
    for _ in range(blocks + 1):
        started = clock()
        for update in range(METERED):
            with meter.phase("train"):
                pass
            meter.measure_flops()
            meter.row(update, {})
        times.append((clock() - started) / METERED)
    return statistics.median(times[1:])


@torch.no_grad()
def measure(name: str, config: Config) -> dict[str, object]:
    """One model's row."""
    # A reward that costs nothing and one decoded frame: what is compared is the denoising.
    env = vdm_env.make(
        model=name, reward=lambda video, prompts: video.mean((1, 2, 3, 4)), num_envs=config.num_envs, decode_frames=[0]
    )
    policy = env.make_policy(lora_rank=0)  # the plain network, as the bare loop has it
    seeds, ids = list(range(config.num_envs)), (env.prompt_ids() * config.num_envs)[: config.num_envs]
    rows = []
    for repeat in range(config.repeats + 1):
        before = env.mdp.counters.decode_s + env.mdp.counters.reward_s
        env_wall, env_cpu, through_env = timed(lambda: env_loop(env, policy, seeds, ids))
        outcome_s = env.mdp.counters.decode_s + env.mdp.counters.reward_s - before
        bare_wall, bare_cpu, bare = timed(lambda: bare_loop(env, seeds, ids))
        if not torch.allclose(through_env, bare, atol=1e-4):
            raise RuntimeError("the two loops disagree; the comparison would be meaningless")
        if repeat:  # the first pair warms up
            rows.append((env_wall - outcome_s, env_cpu - outcome_s, bare_wall, bare_cpu))
    meter = Meter(counters=env.mdp.counters, device=env.device, flops=Flops(env=env, policy=policy))
    return {
        "model": name,
        "num_envs": config.num_envs,
        "num_steps": env.num_steps,
        "guidance": env.config.guidance_scale,
        "bare_s": round(statistics.median(r[2] for r in rows), 4),
        "env_s": round(statistics.median(r[0] for r in rows), 4),
        "overhead_wall_percent": round(100 * (statistics.median(r[0] / r[2] for r in rows) - 1), 2),
        "overhead_cpu_percent": round(100 * (statistics.median(r[1] / r[3] for r in rows) - 1), 2),
        "metering_us": round(1e6 * metering_seconds(meter, config.repeats), 1),
        "repeats": config.repeats,
        "threads": config.num_threads,
    }


def main(config: Config) -> None:
    """Prints (and writes) one row a model."""
    torch.set_num_threads(config.num_threads)
    rows = [measure(name, config) for name in config.models]
    for row in rows:
        print(", ".join(f"{key}={value}" for key, value in row.items()))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with config.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
