"""What a run shows while it works, and how it is stopped from outside."""

from __future__ import annotations

import signal
import sys
import threading
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
    """

    def __init__(self, name: str, limit: float | None, updates: int | None, *, enabled: bool = True) -> None:
        self.name, self.limit, self.updates, self.enabled = name, limit, updates, enabled
        self.bar: Any = None
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

    def show(self, update: int, device_s: float, reward: float | None, scores: Mapping[str, float]) -> None:
        """After an update: how much of the budget is spent, the training reward and the last evaluation's scores."""
        found = {"reward": reward, **{f"eval {name}": value for name, value in scores.items()}}
        values = {key: "nan" if value is None else f"{value:.4g}" for key, value in found.items()}
        if self.bar is not None:
            done = update if self.limit is None else min(device_s, self.limit)
            self.bar.set_postfix(update=update, **values, refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.enabled:
            of = (
                f"{update}/{self.updates} updates"
                if self.limit is None
                else f"{device_s:.1f}/{self.limit:.0f} device-s"
            )
            print(self.name, f"update {update}", of, *(f"{k} {v}" for k, v in values.items()), sep="  ", flush=True)

    def say(self, text: str) -> None:
        """Something out of the ordinary, in a line of its own on standard error, also where nothing else is shown."""
        tqdm.write(f"{self.name}  {text}", file=sys.stderr)
        sys.stderr.flush()

    def evaluated(self, update: int, scores: Mapping[str, float]) -> None:
        """After an evaluation, where there is no bar to show it."""
        if self.enabled and self.bar is None:
            values = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            print(self.name, f"evaluation at update {update}", values, sep="  ", flush=True)


class Stop:
    """Turns Ctrl-C and SIGTERM into a request to end after the update that is under way.

    The second signal raises KeyboardInterrupt inside `droppable()`, the first one already inside
    `droppable(at_once=True)`. Outside of these nothing is raised, so that no file is left half written. Signals are
    Python's business only in the main thread: in any other, this class does nothing.
    """

    def __init__(self) -> None:
        self.requested = 0
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
        self.requested += 1
        if self._raise_from is not None and self.requested >= self._raise_from:
            raise KeyboardInterrupt
        if self.requested == 1:
            print("\nstopping after this update; once more to stop now", file=sys.stderr, flush=True)
