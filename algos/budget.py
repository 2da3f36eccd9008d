"""How long a run is and when it is evaluated: durations, and intervals in updates or device-seconds."""

from __future__ import annotations

import math
import re

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def seconds(text: str | float) -> float:
    """Seconds of a duration: "90s", "2min", "1.5h", "5e-2s", or a number of seconds.

    Raises:
        ValueError: anything else, nothing positive, or what is not finite.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([a-z]*)\s*", str(text))
    try:
        value = float(match[1]) * _UNITS[match[2] or "s"] if match else 0.0
    except (KeyError, ValueError):
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"{text!r} is no duration: write a positive number and s, min or h, such as '90s' or '2min'")
    return value


class Schedule:
    """When the next evaluation is due, in updates or in device-seconds."""

    def __init__(self, every: str | int | None, limit: float | None, updates: int | None) -> None:
        if every is None:
            every = max(1, (updates or 1) // 8) if limit is None else f"{limit / 8}s"
        self.in_updates = isinstance(every, int)
        self.every = float(every) if isinstance(every, int) else seconds(every)
        if self.every <= 0:
            raise ValueError(f"eval_every must be positive, got {every}")
        self.next = self.every

    def __str__(self) -> str:
        return f"{self.every:g} {'updates' if self.in_updates else 'device-s'}"

    def __call__(self, update: int, device_s: float) -> bool:
        now = update if self.in_updates else device_s
        if now < self.next:
            return False
        # An update longer than the interval must not be followed by a row of late evaluations.
        self.next = (now // self.every + 1) * self.every
        return True
