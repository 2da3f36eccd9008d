"""Rewards without networks: brightness, whose gradient is known, and JPEG compressibility, which has none."""

from __future__ import annotations

import io
import math

import torch
from PIL import Image
from torch import Tensor

from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.loading import RewardContext


class BrightnessReward:
    """Mean of all pixels and channels; its gradient is 1 / (F * 3 * H * W) everywhere. For tests and first steps."""

    name = "Brightness"
    differentiable = True
    range = (0.0, 1.0)

    def __init__(self, frames: FramePolicy = "all") -> None:
        self.frames = frames

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        return (video if video.dtype == torch.float64 else video.float()).mean((1, 2, 3, 4))


class JPEGCompressibilityReward:
    """Minus the mean size of the frames as JPEG files, in kB of 1000 bytes; simple pictures score near zero.

    Args:
        quality: of the encoder; chroma is subsampled 4:2:0, Pillow's default.
        sign: -1 rewards small files, +1 large ones (incompressibility).

    Source: Black et al. 2023, arXiv:2305.13301 (quality 95, one image a sample).
    """

    name = "JPEGCompressibility"
    differentiable = False

    def __init__(self, *, quality: int = 95, sign: int = -1, frames: FramePolicy = "all") -> None:
        if not 1 <= quality <= 100 or sign not in (-1, 1):
            raise ValueError(f"expected quality in 1..100 and sign -1 or 1, got quality={quality}, sign={sign}")
        self.quality, self.sign, self.frames = quality, sign, frames
        self.range = (-math.inf, 0.0) if sign < 0 else (0.0, math.inf)

    def _kilobytes(self, image: Tensor) -> float:
        buffer = io.BytesIO()
        Image.fromarray(image.numpy()).save(buffer, "JPEG", quality=self.quality)
        return buffer.tell() / 1000

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        pixels = video.detach().float().nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
        images = pixels.permute(0, 1, 3, 4, 2).contiguous()
        sizes = torch.tensor([[self._kilobytes(f) for f in v] for v in images], dtype=torch.float64)
        return (self.sign * sizes.mean(1)).to(device=video.device, dtype=torch.float32)


def build_brightness(context: RewardContext) -> BrightnessReward:
    """Needs no weights; the context does not matter."""
    return BrightnessReward()


def build_jpeg(context: RewardContext) -> JPEGCompressibilityReward:
    """Needs no weights; the context does not matter."""
    return JPEGCompressibilityReward()
