"""What a run shows while it works, and how it is stopped from outside."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm import tqdm


class Progress:
    """A bar whose total is the budget, or one line an update where standard output is no terminal.

    Args:
        name: what stands before the bar.
        limit: budget in device-seconds, or None.
        updates: budget in updates, or None.
        enabled: False shows nothing.
        silent: says nothing either: another process of the run does.
    """

    def __init__(
        self, name: str, limit: float | None, updates: int | None, *, enabled: bool = True, silent: bool = False
    ) -> None:
        enabled = enabled and not silent
        self.name, self.limit, self.updates, self.enabled, self.silent = name, limit, updates, enabled, silent
        self.bar: Any = None
        self._before: Mapping[str, Any] = {"videos_sampled": 0, "train_s": 0.0}
        if enabled and sys.stdout.isatty():
            unit = "updates" if limit is None else "device-s"
            self.bar = tqdm(
                total=updates if limit is None else limit,
                desc=name,
                file=sys.stdout,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} "
                + unit
                + " left {remaining}{postfix}",
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, row: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """After an update: the budget that is spent and left, and how the training stands.

        Reward, KL to the reference (where the algorithm reports it), videos sampled per second of training since the
        last update that was shown, peak memory since then (of the GPU, otherwise of the process), and the last
        evaluation's scores, "eval kl" among them where it measured the KL.

        Args:
            row: of train.jsonl.
            scores: of the last evaluation, by name.
        """
        update, device_s = row["update"], row["device_s"]
        values = {"reward": _number(row["reward_mean"])}
        if row["kl_ref_nats"] is not None:
            values["kl"] = _number(row["kl_ref_nats"])
        videos, took = (row[name] - self._before[name] for name in ("videos_sampled", "train_s"))
        self._before = row
        if videos and took > 0:
            values["videos/s"] = f"{videos / took:.3g}"
        memory = row["peak_allocated_gib"] if row["peak_allocated_gib"] is not None else row["peak_rss_gib"]
        values["GiB"] = f"{memory:.3g}"
        values |= {f"eval {name}": _number(value) for name, value in scores.items()}
        if self.bar is not None:
            done = update if self.limit is None else min(device_s, self.limit)
            self.bar.set_postfix(update=update, **values, refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.enabled:
            if self.limit is not None:
                of = f"{device_s:.1f}/{self.limit:.0f} device-s ({max(self.limit - device_s, 0.0):.1f} left)"
            else:
                of = f"{update}/{self.updates} updates ({(self.updates or update) - update} left)"
            print(self.name, f"update {update}", of, *(f"{k} {v}" for k, v in values.items()), sep="  ", flush=True)

    def say(self, text: str) -> None:
        """Something out of the ordinary, in a line of its own on standard error, also where nothing else is shown."""
        if self.silent:
            return
        tqdm.write(f"{self.name}  {text}", file=sys.stderr)
        sys.stderr.flush()

    def evaluated(self, update: int, scores: Mapping[str, float]) -> None:
        """After an evaluation, where there is no bar to show it."""
        if self.enabled and self.bar is None:
            values = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            print(self.name, f"evaluation at update {update}", values, sep="  ", flush=True)


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"


_ECHO_S = 2.0
"""within which a launcher passes on the Ctrl-C that its processes have got from the terminal themselves"""


class Stop:
    """Turns Ctrl-C and SIGTERM into a request to end after the update that is under way.

    The second signal raises KeyboardInterrupt inside `droppable()`, the first one already inside
    `droppable(at_once=True)`. Outside of these nothing is raised, so that no file is left half written. Signals are
    Python's business only in the main thread: in any other, this class does nothing.

    Under `accelerate launch` and `torchrun` a Ctrl-C comes twice, and counts once.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._last = 0.0
        self._raise_from: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @contextmanager
    def droppable(self, *, at_once: bool = False) -> Iterator[None]:
        """Its body may be broken off: by the first signal if `at_once`, otherwise by the second."""
        self._raise_from = 1 if at_once else 2
        try:
            yield
        finally:
            self._raise_from = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before, self._last = self._last, time.monotonic()
        if self.requested and self._last - before < _ECHO_S and "TORCHELASTIC_RUN_ID" in os.environ:
            return
        self.requested += 1
        if self._raise_from is not None and self.requested >= self._raise_from:
            raise KeyboardInterrupt
        if self.requested == 1:
            print("\nstopping after this update; once more to stop now", file=sys.stderr, flush=True)
