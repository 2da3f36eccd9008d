"""What the names and shapes of reference vectors say, however large they are."""

from __future__ import annotations

import math
import re


def stride(name: str, whole: int, kept: int) -> int:
    """Every how-manieth of `whole` pixels was kept: the number in the name that fits, else what the shapes say."""
    fitting = [int(n) for n in re.findall(r"\d+", name) if int(n) > 0 and math.ceil(whole / int(n)) == kept]
    return fitting[0] if fitting else math.ceil(whole / kept)


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]
