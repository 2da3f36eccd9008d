"""How fast rewards are: videos a second of every registered reward, with random weights.

    python -m benchmarks.reward_speed                                              # tiny networks, CPU
    python -m benchmarks.reward_speed --scale full --device cuda --dtype bfloat16  # published sizes
    python -m benchmarks.reward_speed --rewards HPS VideoAlign --gradients

A batch is scored as one call; the first call warms up and does not count, the figure is the median of the rest.
With gradients the time is of score and backward pass to the pixels. Full-size weights take their memory: VideoScore's
are 17 GB in half precision. Each row is in the file as soon as it is measured; a reward that runs out of memory gets a
row that says so, and the others are measured all the same.
"""

from __future__ import annotations

import csv
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from vdm_env import list_rewards
from vdm_env.registry import make_reward
from vdm_env.rewards import Reward, select_frames

PROMPTS = ("playing piano in the rain", "riding scooter past a book")
COLUMNS: tuple[str, ...] = (
    "reward",
    "videos_per_s",
    "seconds_median",
    "seconds_min",
    "frames_scored",
    "batch",
    "size",
    "scale",
)
COLUMNS += ("device", "device_name", "dtype", "num_threads", "backward", "repeats", "peak_gib", "torch", "error")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Videos a second of each reward."""

    rewards: tuple[str, ...] = ()
    """names; none given: all"""
    scale: Literal["tiny", "full"] = "tiny"
    """of the networks"""
    device: str = "cpu"
    """where they run"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the networks"""
    batch: int = 4
    """videos in a call"""
    num_frames: int = 8
    """frames of a video, before the reward's frame policy"""
    height: int = 64
    """pixels"""
    width: int = 64
    """pixels"""
    repeats: int = 3
    """timed calls"""
    gradients: bool = False
    """time the backward pass to the pixels too, where there is one"""
    num_threads: int = 2
    """CPU threads"""
    out: Path | None = None
    """CSV file to write; one that is there is replaced"""


def timed(reward: Reward, video: torch.Tensor, prompts: list[str], backward: bool) -> float:
    """Seconds of one call, with the device's queue drained at both ends."""
    drain = partial(torch.cuda.synchronize, video.device) if video.is_cuda else (lambda: None)
    drain()
    started = time.perf_counter()
    if backward:
        pixels = video.clone().requires_grad_()
        torch.autograd.grad(reward(pixels, prompts).sum(), pixels)
    else:
        with torch.no_grad():
            reward(video, prompts)
    drain()
    return time.perf_counter() - started


def measure(name: str, config: Config) -> dict[str, object]:
    """One reward's row, {column: value}."""
    cuda = torch.device(config.device).type == "cuda"
    row: dict[str, object] = {
        "reward": name,
        "batch": config.batch,
        "size": f"{config.num_frames}x{config.height}x{config.width}",
        "scale": config.scale,
        "device": config.device,
        "device_name": torch.cuda.get_device_name(config.device) if cuda else "",
        "dtype": config.dtype,
        "num_threads": config.num_threads,
        "repeats": config.repeats,
        "torch": torch.__version__,
    }
    if cuda:
        torch.cuda.reset_peak_memory_stats(config.device)
    try:
        row |= _times(name, config)
    except torch.OutOfMemoryError as error:
        row["error"] = str(error).splitlines()[0]
    if cuda:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated(config.device) / 2**30, 2)
        torch.cuda.empty_cache()
    return {column: row.get(column, "") for column in COLUMNS}


def _times(name: str, config: Config) -> dict[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that random weights mean nothing
        reward = make_reward(
            name,
            weights="random",
            scale=config.scale,
            device=config.device,
            dtype=getattr(torch, config.dtype),
            num_frames=config.num_frames,
        )
    frames = len(select_frames(reward.frames, config.num_frames, 0))
    shape = (config.batch, frames, 3, config.height, config.width)
    video = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(config.device)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(config.batch)]
    backward = config.gradients and reward.differentiable
    times = [timed(reward, video, prompts, backward) for _ in range(config.repeats + 1)][1:]
    seconds = statistics.median(times)
    return {
        "videos_per_s": round(config.batch / seconds, 2),
        "seconds_median": round(seconds, 7),
        "seconds_min": round(min(times), 7),
        "frames_scored": frames,
        "backward": backward,
    }


def rows(config: Config) -> Iterator[dict[str, object]]:
    """The row of each reward, as it is measured.

    Raises:
        ValueError: an unknown reward.
    """
    unknown = sorted({name.partition(":")[0] for name in config.rewards} - set(list_rewards()))
    if unknown:  # before the others take their time
        raise ValueError(f"unknown rewards {unknown}; expected some of {', '.join(list_rewards())}")
    for name in config.rewards or list_rewards():
        yield measure(name, config)


def main(config: Config) -> list[dict[str, object]]:
    """Prints (and writes) one row a reward, as each is measured.

    Raises:
        ValueError: no call, no video or an unknown reward.
    """
    if config.repeats < 1 or config.batch < 1:
        raise ValueError(f"repeats={config.repeats}, batch={config.batch}: expected at least 1")
    torch.set_num_threads(config.num_threads)
    found = []
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        _write(config.out, None)
    for row in rows(config):
        found.append(row)
        print(", ".join(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)
        if config.out is not None:
            _write(config.out, row)
    return found


def _write(path: Path, row: dict[str, object] | None) -> None:
    """The head of the file (None), or one more row, on the disk before the next reward is measured."""
    with path.open("w" if row is None else "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if row is None:
            writer.writeheader()
        else:
            writer.writerow(row)


if __name__ == "__main__":
    main(tyro.cli(Config))
