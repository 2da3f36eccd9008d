"""The window of denoising steps that get noise and are trained (MixGRPO, Flow-GRPO-Fast), as pure functions.

Inside the window a step is a stochastic sampler's, outside of it the ODE's: noise level 0. A window has a size and
places where it may start; a strategy moves it from update to update:

    progressive   on by `shift` after `iterations` updates, and back to the first place when there is no further one
    decay         the same, but it stays shorter at later places: linearly from `iterations` down to `min_iterations`
    exp_decay     the same with ceil( iterations exp(-decay_rate max(0, start - decay_after)) ) updates
    random        a random place after `iterations` updates (MixGRPO: after each)
    fixed         it stays where it is

Source: MixGRPO (Li et al. 2025, arXiv:2507.21802) and its released code, there 25 steps with windows of 4.

Deviations: all windows are whole, where the released ones shrink at the end of the grid; "decay" ends at the last place
(released: at the last step but one, where no whole window starts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Strategy = Literal["progressive", "decay", "exp_decay", "random", "fixed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SDEWindow:
    """A window and how it moves; `window_places` finds the places. Fields a strategy does not name have no effect."""

    size: int
    """steps inside, >= 1"""
    places: range
    """steps it may start at, ascending and at least one"""
    strategy: Strategy = "progressive"
    """see the module"""
    shift: int = 1
    """steps it moves on by, >= 1; less than `size` makes neighbours overlap"""
    iterations: int = 25
    """updates at a place, >= 1"""
    min_iterations: int = 1
    """of "decay": updates at the last place, >= 1"""
    decay_after: int = 13
    """of "exp_decay": places up to this step keep all their iterations"""
    decay_rate: float = 0.1
    """of "exp_decay", per step, >= 0"""


class Place(NamedTuple):
    """Where a window stands."""

    start: int
    """its first step"""
    age: int
    """updates it has had there"""


def window_places(size: int, first: int, last: int | None, noisy: Sequence[int], num_steps: int, name: str) -> range:
    """Where a window may start.

    Args:
        size: steps inside, >= 1.
        first: first step a window may hold, >= 0.
        last: one past the last step it may hold; None: past the last noisy one.
        noisy: the sampler's steps with noise, ascending and at least one.
        num_steps: of the grid.
        name: of the sampler, for messages.

    Raises:
        ValueError: no window fits between `first` and `last`, or it would hold a step that cannot have noise.
    """
    last = noisy[-1] + 1 if last is None else last
    if first + size > last or last > num_steps:
        raise ValueError(
            f"a window of window_size={size} has no place in steps {first}..{last - 1} of this env's 0..{num_steps - 1}"
            f"; make it smaller, change window_start or window_end, or sample with more steps"
        )
    if silent := sorted(set(range(first, last)) - set(noisy)):
        raise ValueError(
            f"the window would reach steps {silent}, which have no noise with {name!r}; "
            f"choose window_start and window_end within {noisy[0]}..{noisy[-1] + 1}"
        )
    return range(first, last - size + 1)


def window_steps(window: SDEWindow, place: Place) -> list[int]:
    """The denoising steps inside, ascending."""
    return list(range(place.start, place.start + window.size))


def levels_inside(levels: Sequence[float], steps: Sequence[int]) -> list[float]:
    """The noise levels [S] of an episode: `levels` [S] at these steps, 0 elsewhere."""
    return [level if k in steps else 0.0 for k, level in enumerate(levels)]


def first_place(window: SDEWindow, generator: torch.Generator) -> Place:
    """The first place of all, or a random one; `generator` is used by "random" only."""
    random = window.strategy == "random"
    return Place(_random_start(window, generator) if random else window.places[0], 0)


def stay(window: SDEWindow, start: int) -> int:
    """Updates that the window has at the place `start`, >= 1."""
    if window.strategy == "decay":
        last, i = window.places[-1] - window.places[0], start - window.places[0]
        return (window.iterations * (last - i) + window.min_iterations * i) // last if last else window.iterations
    if window.strategy == "exp_decay":
        return math.ceil(window.iterations * math.exp(-window.decay_rate * max(0, start - window.decay_after)))
    return window.iterations


def next_place(window: SDEWindow, place: Place, generator: torch.Generator) -> Place:
    """Where the window stands after one more update; `generator` is used by "random" only."""
    if window.strategy == "fixed":
        return place
    if place.age + 1 < stay(window, place.start):
        return Place(place.start, place.age + 1)
    if window.strategy == "random":
        return Place(_random_start(window, generator), 0)
    start = place.start + window.shift
    return Place(start if start in window.places else window.places[0], 0)


def _random_start(window: SDEWindow, generator: torch.Generator) -> int:
    return window.places[int(torch.randint(len(window.places), (), generator=generator))]
