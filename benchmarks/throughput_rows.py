"""Rows of the throughput table: from timed rounds to figures, and how they are written and shown."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from algos.flops import DENOISER, Flops

TERA = 1e12
FIGURES: tuple[str, ...] = (
    "what",
    "batch",
    "group_size",
    "videos",
    "seconds",
    "seconds_min",
    "cpu_s",
    "rollout_s",
    "decode_s",
    "reward_s",
    "update_s",
    "videos_per_s",
    "tflop_guided_step",
    "tflop",
    "denoiser_tflop",
    "tflop_per_s",
    "share",
    "rollout_share",
    "passes",
    "bare_s",
    "update_per_bare",
    "grad_norm",
    "peak_allocated_gib",
    "peak_reserved_gib",
    "peak_rss_gib",
    "build_s",
    "embed_s",
)
"""What was measured: see `benchmarks.throughput`."""
CONDITIONS: tuple[str, ...] = (
    "env_id",
    "weights",
    "scale",
    "size",
    "num_steps",
    "sampler",
    "guidance_scale",
    "decode_frames",
    "lora_rank",
    "options",
    "settings",
    "device",
    "device_name",
    "dtype",
    "num_threads",
    "torch",
    "repeats",
)
"""Under which conditions."""
COLUMNS = (*FIGURES, *CONDITIONS, "note", "error")
SHOWN: tuple[str, ...] = (
    "what",
    "batch",
    "videos",
    "seconds",
    "rollout_s",
    "decode_s",
    "reward_s",
    "update_s",
    "videos_per_s",
    "tflop",
    "tflop_per_s",
    "share",
    "update_per_bare",
    "peak_gib",
)
"""Columns on the screen; `peak_gib` is the graphics card's allocated memory, else that of the process."""
_WIDTH = 10
_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Round:
    """One timed call of a sampling or an update."""

    seconds: float
    """wall time"""
    cpu_s: float
    """CPU-seconds of the process"""
    rollout_s: float
    """denoising of complete episodes"""
    decode_s: float
    """decoding for the reward"""
    reward_s: float
    """scoring"""
    counts: Mapping[str, float] = field(default_factory=dict)
    """what the environment counted, as `algos.meter.COUNTS`"""
    bare_s: float | None = None
    """see `benchmarks.throughput_calls`; None: not measured"""

    @property
    def update_s(self) -> float:
        """The rest: learning, of sampling the reset."""
        return self.seconds - self.rollout_s - self.decode_s - self.reward_s


def typical(rounds: Sequence[Round]) -> Round:
    """The round whose time is the median (of an even number the lower middle one), so that its phases add up."""
    wanted = statistics.median_low(one.seconds for one in rounds)
    return next(one for one in rounds if one.seconds == wanted)


def figures(rounds: Sequence[Round], flops: Flops, ceiling: float, num_steps: int) -> dict[str, object]:
    """The figures of a row.

    Args:
        rounds: one or more.
        flops: costs of the calls that were counted.
        ceiling: operations a second of the device.
        num_steps: denoising steps of a video.
    """
    one = typical(rounds)
    videos = one.counts["videos_sampled"]
    found: dict[str, float | None] = {
        "videos": videos,
        "seconds": one.seconds,
        "seconds_min": min(each.seconds for each in rounds),
        "cpu_s": one.cpu_s,
        "rollout_s": one.rollout_s,
        "decode_s": one.decode_s,
        "reward_s": one.reward_s,
        "update_s": one.update_s,
        "videos_per_s": videos / one.seconds if videos else None,
        "passes": one.counts["denoiser_backwards"],
    }
    whole, denoiser = flops.of(one.counts), flops.of(one.counts, DENOISER)
    if whole is not None and denoiser is not None:
        rate = whole / one.seconds
        found |= {"tflop": whole / TERA, "denoiser_tflop": denoiser / TERA, "tflop_per_s": rate / TERA}
        found |= {"share": rate / ceiling}
        if not one.counts["denoiser_backwards"] and one.rollout_s:
            found["rollout_share"] = denoiser / one.rollout_s / ceiling
            found["tflop_guided_step"] = denoiser / videos / num_steps / TERA
    ratios = [each.update_s / each.bare_s for each in rounds if each.bare_s]
    if ratios:
        found |= {"bare_s": one.bare_s, "update_per_bare": statistics.median(ratios)}
    return {name: rounded(value) for name, value in found.items() if value is not None}


def rounded(value: float) -> float | int:
    """A number with as many digits as a measurement of time may have; counts stay whole."""
    return int(value) if float(value).is_integer() else float(f"{value:.{_DIGITS}g}")


def write(path: Path, row: Mapping[str, object] | None) -> None:
    """The head of the file (None), or one more row, on the disk before the next is measured."""
    if row is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if row is None else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if row is None:
            writer.writeheader()
        else:
            writer.writerow(row)


def heading() -> str:
    """The first line of the table on the screen."""
    return _line(list(SHOWN))


def line(row: Mapping[str, Any]) -> str:
    """A row of the table on the screen; what went wrong stands in place of the figures."""
    row = {**row, "peak_gib": row.get("peak_allocated_gib", row.get("peak_rss_gib", ""))}
    if row.get("error"):
        return f"{_line([row['what'], row['batch']])} {row['error']}"
    text = _line([f"{row[name]:.4g}" if isinstance(row.get(name), float) else row.get(name, "") for name in SHOWN])
    return f"{text} {row['note']}" if row.get("note") else text


def _line(cells: Sequence[object]) -> str:
    first, *others = (str(cell) for cell in cells)
    return " ".join(
        [f"{first:<16}", *(f"{cell:>{max(_WIDTH, len(name))}}" for cell, name in zip(others, SHOWN[1:], strict=False))]
    )
