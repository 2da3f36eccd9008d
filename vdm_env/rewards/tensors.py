"""Small tensor helpers that the learned rewards share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vdm_env.rewards.base import select_frames


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def in_chunks(function: Callable[..., Tensor], *tensors: Tensor, size: int | None) -> Tensor:
    """`function(*tensors)`, computed over `size` rows at a time and put together; all at once if None.

    Raises:
        ValueError: size is below 1.
    """
    if size is None:
        return function(*tensors)
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for everything at once, got {size}")
    return torch.cat([function(*parts) for parts in zip(*(t.split(size) for t in tensors), strict=True)])


def check_enough_frames(count: int, num_frames: int, name: str) -> None:
    """Raises ValueError where a video has fewer frames than the network looks at."""
    if count < num_frames:
        raise ValueError(
            f"reward {name!r} looks at {num_frames} frames, got {count}: decode at least as many "
            f"(decode_frames='middle{num_frames}' repeats frames of a shorter video)"
        )


def fit_frames(video: Tensor, num_frames: int, name: str) -> Tensor:
    """[B,F,3,H,W] with F >= num_frames, thinned out evenly to [B,num_frames,3,H,W].

    Raises:
        ValueError: there are fewer frames than the network looks at.
    """
    check_enough_frames(video.shape[1], num_frames, name)
    if video.shape[1] == num_frames:
        return video
    return video[:, select_frames(num_frames, video.shape[1]).to(video.device)]
