"""Noise keyed by (video seed, step): the same video gets the same noise wherever it stands in a batch.

A video's initial latents are the noise of step `INITIAL`; the exploration noise of denoising step k is the noise of
step k. Nothing here touches the global random state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vdm_env.host import on_host

INITIAL = -1
"""Step number that keys the initial latents."""
CONDITIONING = -2
"""Step number that keys noise drawn once at reset (for example SVD's noise on the conditioning image)."""
FRAMES = -3
"""Step number that keys the choice of frames the reward sees."""


def of_clip(step: int, clip: int) -> int:
    """The key of the three above for a clip of a longer video; clip 0 has the key of a single video."""
    return step - 16 * clip


_MASK = (1 << 64) - 1


def mix(*keys: int) -> int:
    """Mixes integers into a 63-bit seed; neighbours land far apart (splitmix64's finaliser, Steele et al. 2014)."""
    state = 0x9E3779B97F4A7C15
    for key in keys:
        state = (state + 0x9E3779B97F4A7C15 + (key & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator_for(*keys: int) -> torch.Generator:
    """A CPU generator seeded by the mixed keys."""
    return torch.Generator().manual_seed(mix(*keys))


def normal(video_seeds: Tensor | Sequence[int], steps: Tensor | int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of each video at its step.

    Args:
        video_seeds: [B] int64.
        steps: one step for all, or [B] int64.
        shape: shape of one video's noise.

    Returns:
        [B, *shape] float32 on the CPU: drawn there so that a seed means the same on every device.
    """
    seeds = on_host(video_seeds).tolist() if isinstance(video_seeds, Tensor) else [int(s) for s in video_seeds]
    at = [steps] * len(seeds) if isinstance(steps, int) else on_host(steps).tolist()
    noise = torch.empty(len(seeds), *shape)
    for row, (seed, step) in enumerate(zip(seeds, at, strict=True)):
        torch.randn(tuple(shape), generator=generator_for(seed, step), out=noise[row])
    return noise
