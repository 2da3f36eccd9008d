"""The ceiling that speeds are compared with: how fast this device multiplies large matrices, as measured here and now.

A dense product of two n x n matrices takes 2 n^3 operations (a multiply-add is two). Each size is timed several times;
its rate is that of the median, and the ceiling is the best size's. A published peak would be higher: it knows no
clocks, no memory and no other programs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.benchmark import Timer

CPU_SIZES = (256, 512, 1024)
CUDA_SIZES = (4096, 8192)


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The best rate among some sizes."""

    flop_per_s: float
    """operations a second"""
    size: int
    """rows and columns of the matrices that reached it"""
    seconds: float
    """median of one product of that size"""
    rates: dict[int, float]
    """operations a second of every size"""


def matmul_flops(size: int) -> int:
    """Operations of a product of two square matrices with so many rows."""
    return 2 * size**3


def measure_ceiling(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    sizes: Sequence[int] | None = None,
    repeats: int = 5,
    calls: int = 4,
    timer: Callable[[], float] | None = None,
) -> Ceiling:
    """Measures the rate of dense matrix products with the process's number of threads.

    Args:
        device: where.
        dtype: of the matrices.
        sizes: rows of the matrices; None: `CUDA_SIZES` on a graphics card, else `CPU_SIZES`.
        repeats: timings of each size.
        calls: products in a timing; two more before it warm up and do not count.
        timer: seconds with the device's queue drained; replaced in tests.

    Raises:
        ValueError: no size, or no timing.
    """
    device = torch.device(device)
    if sizes is None:
        sizes = CUDA_SIZES if device.type == "cuda" else CPU_SIZES
    if not sizes or repeats < 1 or calls < 1:
        raise ValueError(f"sizes={tuple(sizes)}, repeats={repeats}, calls={calls}: expected at least one of each")
    if timer is None and device.type == "cuda":  # the Timer's own drains the current device, which may be another
        timer = partial(_drained, device)
    chosen: dict[str, Any] = {} if timer is None else {"timer": timer}
    seconds = {}
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
        names = {"mm": torch.mm, "a": a, "b": b, "c": torch.empty_like(a)}
        clock = Timer("mm(a, b, out=c)", globals=names, num_threads=torch.get_num_threads(), **chosen)
        seconds[size] = statistics.median(clock.timeit(calls).median for _ in range(repeats))
    rates = {size: matmul_flops(size) / spent for size, spent in seconds.items()}
    best = max(rates, key=lambda size: rates[size])
    return Ceiling(flop_per_s=rates[best], size=best, seconds=seconds[best], rates=rates)


def _drained(device: torch.device) -> float:
    """Seconds, once the device has done what was asked of it."""
    torch.cuda.synchronize(device)
    return time.perf_counter()
