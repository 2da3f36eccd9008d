"""What a training run has cost so far: seconds per phase, device-seconds, counts, operations and memory.

The budget of every comparison is `device_s`, the time a device worked or was held for rollout, decoding, reward and
update. On a GPU that is the wall time of the train phase times the devices held. On a CPU it is the CPU-seconds of
this process in the train phase, over all its threads: what other programs do on the machine does not enter, two
threads count twice, and time spent waiting for another process counts nothing. Set-up, evaluation and checkpoints are
timed too, but apart, so that anyone may add them back.

Of several processes that train together every meter shows the costs of all: counts and CPU-seconds are sums, wall times
are those of the first process, and a phase is over when all have ended it. Memory is each process's own.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from algos import distributed
from algos.flops import DENOISER, Flops

COUNTS = ("videos_sampled", "reward_queries", "reward_backward_queries", "denoiser_forwards", "denoiser_backwards")
"""Counters of the environment, cumulative over training only: what evaluation adds is left out."""

PHASES = ("setup", "train", "eval", "checkpoint")

METRICS = (
    "reward_mean",
    "reward_std",
    "reward_group_std_mean",
    "zero_std_fraction",
    "kl_ref_nats",
    "kl_old_nats",
    "ratio_mean",
    "ratio_std",
    "clip_fraction_low",
    "clip_fraction_high",
    "loss",
    "grad_norm",
    "learning_rate",
)
"""Metrics every row has; `null` where an algorithm does not report one. It may report others besides."""

_TIMES = (
    "rollout_s",
    "decode_s",
    "reward_s",
    "update_s",
    "train_s",
    "eval_s",
    "checkpoint_s",
    "setup_s",
    "wall_s",
    "device_s",
    "cpu_s",
)
_MEMORY = ("peak_allocated_gib", "peak_reserved_gib", "peak_rss_gib")
_FLOPS = ("flops", "denoiser_flops")
RESERVED = frozenset(("update", "nan_values", *COUNTS, *_FLOPS, *_TIMES, *_MEMORY))
_GIB = 2**30


def finite(value: Any) -> float | int | None:
    """A number for JSON: ints stay ints, one-element tensors become floats, NaN and infinities become None."""
    if isinstance(value, bool | int):
        return int(value)
    number = float(value)
    return number if abs(number) < float("inf") else None


def number(name: str, value: Any) -> float | int | None:
    """`finite` of a metric of that name.

    Raises:
        TypeError: it is no number, or more than one; the message names it.
    """
    shape = tuple(getattr(value, "shape", ()))
    if not isinstance(value, str | bytes) and math.prod(shape) == 1:
        with suppress(TypeError, ValueError):
            return finite(value)
    found = f"{type(value).__name__} of shape {list(shape)}" if shape else f"{value!r}"
    raise TypeError(f"update() returned {name} = {found}, expected one number; return its mean, or leave it out")


def _of_all(spent: Mapping[str, float]) -> dict[str, float]:
    """What all processes have spent: counts and CPU-seconds of all, wall times of the first."""
    ranks = distributed.current()
    summed = ("cpu", *COUNTS)
    return ranks.totals({name: value if ranks.main or name in summed else 0.0 for name, value in spent.items()})


def _snapshot(counters: Any) -> dict[str, float]:
    missing = [name for name in (*COUNTS, "decode_s", "reward_s") if not hasattr(counters, name)]
    if missing:
        raise TypeError(f"counters {type(counters).__name__} lack {', '.join(missing)}: give env.mdp.counters")
    names = (*COUNTS, "decode_s", "reward_s", *(("rollout_s",) if hasattr(counters, "rollout_s") else ()))
    return {name: getattr(counters, name) for name in names}


@dataclass(kw_only=True)
class Meter:
    """Adds up phases and counters and turns them into rows of `train.jsonl`.

    Use `with meter.phase("train"): algorithm.update()` around every update, `"eval"`, `"setup"` and `"checkpoint"`
    around the rest. Counter changes outside `"train"` do not count: an evaluation on the same networks costs nothing.

    Wall seconds of the train phase are `train_s`, split by the environment's own clocks: `decode_s` and `reward_s`
    from its counters; `rollout_s` too where it keeps one (it must not contain the other two), otherwise `rollout_s` is
    null and its time is part of `update_s`. Their sum is always `train_s`.
    """

    counters: Any
    """Live counters of the training environment (`env.mdp.counters`)."""
    device: torch.device | str = "cpu"
    """The device that is synchronised at the edges of a phase."""
    num_devices: int = 1
    """Devices held during training, those that only serve rewards included; on a CPU it changes nothing."""
    flops: Flops | None = None
    """Costs of one call each; without them the columns `flops` and `denoiser_flops` are null."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds; replaced in tests."""
    nan_values: int = 0
    """Rewards and metrics that were NaN or infinite so far, written as null."""
    cpu_clock: Callable[[], float] = time.process_time
    """CPU-seconds of this process over all its threads: on a busy CPU the honest cost, beside a GPU a part of it"""
    cpu_s: float = 0.0
    """CPU-seconds of training so far"""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    totals: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        self.totals = {name: type(value)(0) for name, value in _snapshot(self.counters).items()} | self.totals
        self._started = self.clock()
        self._wall_before = 0.0

    @property
    def device_s(self) -> float:
        """Device-seconds of training so far, what budgets are counted in: see the module for those of a CPU."""
        if torch.device(self.device).type == "cpu":
            return self.cpu_s
        return self.seconds["train"] * self.num_devices

    @property
    def wall_s(self) -> float:
        """Seconds since the start, summed over resumes."""
        return self._wall_before + self.clock() - self._started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of its body to a phase, also when the body raises.

        Args:
            name: "setup", "train", "eval" or "checkpoint".

        Raises:
            ValueError: another name.
        """
        if name not in PHASES:
            raise ValueError(f"unknown phase {name!r}: expected one of {', '.join(PHASES)}")
        before, whole = _snapshot(self.counters), False
        self._synchronise()
        start, cpu_start = self.clock(), self.cpu_clock()
        try:
            yield
            whole = True
        finally:
            self._synchronise()
            spent = {key: value - before[key] for key, value in _snapshot(self.counters).items()}
            spent |= {"wall": self.clock() - start, "cpu": self.cpu_clock() - cpu_start}
            if whole:  # the others may not come here otherwise
                spent = _of_all(spent)
            if name == "eval" and torch.device(self.device).type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)  # the next row is about training
            self.seconds[name] += spent.pop("wall")
            cpu = spent.pop("cpu")
            if name == "train":
                self.cpu_s += cpu
                for key, value in spent.items():
                    self.totals[key] += value

    def add_setup(self, seconds: float) -> None:
        """Adds set-up that was done before this meter, or before a state was loaded, to set-up and to the whole."""
        self.seconds["setup"] += seconds
        self._wall_before += seconds

    def measure_flops(self) -> str:
        """Measures, in the setup phase, what calls that were made in training cost and is not known yet.

        Returns:
            Why something of it could not be measured; empty where all could, or nothing was to be measured.
        """
        if self.flops is None or not (missing := self.flops.missing(self.totals)):
            return ""
        with self.phase("setup"):
            self.flops.measure(missing)
        return self.flops.note()

    def operations(self) -> dict[str, int | None]:
        """Floating-point operations of training so far, `flops`, and the denoiser's part, `denoiser_flops`.

        Null where the cost of a call is unknown.
        """
        if self.flops is None:
            return dict.fromkeys(_FLOPS)
        return dict(zip(_FLOPS, (self.flops.of(self.totals), self.flops.of(self.totals, DENOISER)), strict=True))

    def row(self, update: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """One row of `train.jsonl`: cumulative costs, peak memory since the last row, and the metrics of an update.

        Memory of a GPU is that since the last row or evaluation; `peak_rss_gib` is the process's since its start.

        Args:
            update: optimiser updates so far.
            metrics: what `algorithm.update()` returned; NaN and infinities become null and are counted.

        Raises:
            TypeError: a metric is no number.
            ValueError: a metric carries the name of one of the meter's own columns.
        """
        clash = sorted(RESERVED & metrics.keys())
        if clash:
            raise ValueError(
                f"update() returned {', '.join(clash)}: the meter writes these itself, rename or drop them"
            )
        values = {name: number(name, value) for name, value in metrics.items()}
        self.nan_values += sum(value is None for value in values.values())
        return {
            "update": update,
            **{name: int(self.totals[name]) for name in COUNTS},
            **self.operations(),
            **self._times(),
            **self._memory(),
            "nan_values": self.nan_values,
            **dict.fromkeys(METRICS),
            **values,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything cumulative, as plain numbers."""
        return {
            "seconds": dict(self.seconds),
            "totals": dict(self.totals),
            "nan_values": self.nan_values,
            "cpu_s": self.cpu_s,
            "wall_s": self.wall_s,
            "flops": None if self.flops is None else self.flops.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from an earlier process's `state_dict()`."""
        self.seconds = dict(state["seconds"])
        self.totals = dict(state["totals"])
        self.nan_values = int(state["nan_values"])
        self.cpu_s = float(state["cpu_s"])
        if self.flops is not None and state["flops"] is not None:
            self.flops.load_state_dict(state["flops"])
        self._wall_before = float(state["wall_s"])
        self._started = self.clock()

    def _times(self) -> dict[str, float | None]:
        parts = {name: self.totals.get(name) for name in ("rollout_s", "decode_s", "reward_s")}
        rounded = {name: None if value is None else round(value, 4) for name, value in parts.items()}
        # Of the rounded ones, so that the columns of a row add up.
        train = round(self.seconds["train"], 4)
        rest = {
            "update_s": train - sum(value for value in rounded.values() if value is not None),
            "train_s": train,
            "eval_s": self.seconds["eval"],
            "checkpoint_s": self.seconds["checkpoint"],
            "setup_s": self.seconds["setup"],
            "wall_s": self.wall_s,
            "device_s": self.device_s,
            "cpu_s": self.cpu_s,
        }
        return {**rounded, **{name: round(value, 4) for name, value in rest.items()}}

    def _memory(self) -> dict[str, float | None]:
        # ru_maxrss is in KiB on Linux and in bytes on macOS.
        peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        allocated = reserved = None
        if torch.device(self.device).type == "cuda":
            allocated = round(torch.cuda.max_memory_allocated(self.device) / _GIB, 4)
            reserved = round(torch.cuda.max_memory_reserved(self.device) / _GIB, 4)
            torch.cuda.reset_peak_memory_stats(self.device)
        return dict(zip(_MEMORY, (allocated, reserved, round(peak_rss / _GIB, 4)), strict=True))

    def _synchronise(self) -> None:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
