"""Classifier-free guidance, at every step or only in an interval of noise levels.

The guided output is a_u + w (a_c - a_u), of a pass without the prompt and one with it. Guidance at high noise takes
variety away and at low noise it does little, so a limited interval costs fewer passes and can look better
(Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval", arXiv 2404.07724).

An interval (lo, hi) guides where lo < sigma <= hi, as in that paper. Here sigma is the standard deviation of the noise
in relation to the clean latents', a function of t alone: it holds on every grid, and in an update as in the rollout.

Deviation: the paper is about EDM, where that is sigma itself. On other schedules x_t is divided by the factor of x0
first, as EDM does with them: sqrt((1 - alpha) / alpha) of a variance-preserving process (VideoCrafter2's latent scale
divided out too), sigma / (1 - sigma) of a flow; infinite where nothing of x0 is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from vdm_env.host import on_host
from vdm_env.schedule import Schedule

Interval = tuple[float, float]
"""(lo, hi) in sigma; hi may be infinite"""


def check_guidance(scale: float) -> None:
    """Raises ValueError unless the guidance scale is a finite number."""
    if not isinstance(scale, Real) or isinstance(scale, bool) or not math.isfinite(scale):
        raise ValueError(f"guidance_scale={scale!r}: expected a finite number; 1.0 is no guidance")


def as_interval(given: Sequence[float] | None) -> Interval | None:
    """A guidance interval from what a caller gave; None is every step.

    Raises:
        ValueError: not two numbers with 0 <= lo < hi.
    """
    if given is None:
        return None
    numbers = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    fine = len(numbers) == 2 and all(isinstance(v, Real) and not isinstance(v, bool) for v in numbers)
    if not fine or not 0 <= numbers[0] < numbers[1]:
        raise ValueError(
            f"guidance_interval={given!r}: expected two noise levels (lo, hi) with 0 <= lo < hi, such as (0.2, 5.0), "
            "where hi may be infinite; None guides every step"
        )
    return float(numbers[0]), float(numbers[1])


def check_some_guidance(interval: Sequence[float] | None, scale: float) -> None:
    """Refuses an interval for a guidance that is not there.

    Raises:
        ValueError: the scale is 1.
    """
    if interval is not None and scale == 1.0:
        raise ValueError(
            f"guidance_interval={interval} says where guidance acts, but guidance_scale is 1.0, which is none; give "
            "guidance_scale too, or leave guidance_interval out (a scale that is an input of the network, as "
            "T2V-Turbo's, acts at every step)"
        )


def check_grid(interval: Interval | None, scale: float, schedule: Schedule, timesteps: Tensor) -> None:
    """Refuses an interval that no step of a grid lies in.

    Raises:
        ValueError: there is none; the grid's noise levels are named.
    """
    if interval is None or scale == 1.0 or bool(inside(schedule, timesteps, interval).any()):
        return
    levels = relative_noise(schedule, timesteps).tolist()
    shown = ", ".join(f"{level:.3g}" for level in (levels if len(levels) <= 8 else [*levels[:4], *levels[-4:]]))
    raise ValueError(
        f"guidance_interval={interval} holds none of the {len(levels)} steps, whose noise levels are {shown}"
        f"{' (first and last)' if len(levels) > 8 else ''}; give one around some of them, or guidance_scale=1.0"
    )


def relative_noise(schedule: Schedule, t: Tensor) -> Tensor:
    """Sigma at timesteps t [B], float64 on the CPU: the noise's factor in x_t over that of x0."""
    t = on_host(t)
    one = torch.ones(len(t), 1, dtype=torch.float64)
    noise, clean = schedule.add_noise(0 * one, one, t), schedule.add_noise(one, 0 * one, t)
    return (noise / clean).squeeze(1)


def inside(schedule: Schedule, t: Tensor, interval: Interval) -> Tensor:
    """Whether timesteps t [B] are guided; bool on the CPU."""
    sigma = relative_noise(schedule, t)
    return (sigma > interval[0]) & (sigma <= interval[1])
