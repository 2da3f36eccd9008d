"""An estimate of the size of frames as JPEG files that has gradients everywhere; no network, no weights.

JPEG's own steps up to the last: luma and chroma, chroma at half size, 8 x 8 cosine transform, division by the tables of
the quality. The last two, rounding and Huffman codes, are replaced by the bits that a coefficient q = c / table takes:

    size = (1 / 8000) sum over coefficients of  BITS * log2(1 + (q / KNEE)^2) / 2     in kB of 1000 bytes,  plus HEADER

A coefficient well below half a step costs nothing, one of n steps costs about log2(n) bits; both are what run-length
and category codes do. The two constants were fitted to Pillow's files at quality 95: for smooth and noisy pictures of
64 to 256 pixels nine in ten estimates are within a tenth of the real size. Report the real one, "JPEGCompressibility".

Source: ITU-T T.81 (the transform; Annex K for the tables); Black et al. 2023, arXiv:2305.13301, for the reward.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.loading import RewardContext

NAME = "JPEGSurrogate"
HEADER = 0.62
"""kB that a file has besides its picture: the tables"""
BITS, KNEE = 1.8, 0.3
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)
# Rows of luma, blue difference, red difference out of red, green, blue (JFIF; ITU-R BT.601).
_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


def quantisation(quality: int) -> tuple[Tensor, Tensor]:
    """Tables [8,8] of luma and chroma at a quality of 1..100, scaled as the reference encoder scales them."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = (torch.tensor(t, dtype=torch.float64) for t in (_LUMA, _CHROMA))
    luma, chroma = (((t * percent + 50) / 100).floor().clamp(1, 255) for t in tables)
    return luma, chroma


def cosine_basis() -> Tensor:
    """The orthonormal cosine transform of 8 samples, [frequency, sample]."""
    k, n = torch.arange(8, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)[None]
    basis = torch.cos(math.pi * (2 * n + 1) * k / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis


class JPEGSurrogateReward:
    """Minus the mean estimated size of the frames as JPEG files, in kB of 1000 bytes.

    Args:
        quality: of the encoder, 1..100.
        sign: -1 rewards small files, +1 large ones.
        frames: frame policy.

    Raises:
        ValueError: quality or sign outside these.
    """

    name = NAME
    differentiable = True

    def __init__(self, *, quality: int = 95, sign: int = -1, frames: FramePolicy = "all") -> None:
        if not 1 <= quality <= 100 or sign not in (-1, 1):
            raise ValueError(f"expected quality in 1..100 and sign -1 or 1, got quality={quality}, sign={sign}")
        self.quality, self.sign, self.frames = quality, sign, frames
        self.range = (-math.inf, 0.0) if sign < 0 else (0.0, math.inf)

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        pixels = video if video.dtype == torch.float64 else video.float()
        return self.sign * kilobytes(pixels.flatten(0, 1), self.quality).unflatten(0, video.shape[:2]).mean(1)


def kilobytes(frames: Tensor, quality: int) -> Tensor:
    """Estimated sizes [N] of frames [N,3,H,W] in [0,1] (float32 or float64)."""
    mix = torch.tensor(_YCC, dtype=frames.dtype, device=frames.device)
    planes = torch.einsum("yc,nchw->nyhw", mix, frames * 255)
    luma, chroma = (t.to(frames) for t in quantisation(quality))
    half = F.avg_pool2d(planes[:, 1:], 2, ceil_mode=True, count_include_pad=False)
    bits = _bits(planes[:, :1] - 128, luma) + _bits(half, chroma)
    return bits / 8000 + HEADER


def _bits(planes: Tensor, table: Tensor) -> Tensor:
    """Estimated bits [N] of planes [N,C,H,W] under one table."""
    height, width = planes.shape[-2:]
    padded = F.pad(planes, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = padded.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8))  # [N,C,rows,8,columns,8]
    basis = cosine_basis().to(planes)
    steps = torch.einsum("ka,ncrasb,lb->ncrskl", basis, blocks, basis) / table
    flat = steps.flatten(2, 3)
    # Neighbouring blocks share their mean: what is coded is the difference from the block before.
    mean = flat[..., 0, 0]
    change = torch.cat([mean[..., :1], mean[..., 1:] - mean[..., :-1]], dim=-1)
    rest = flat.flatten(-2)[..., 1:]
    return _cost(change).sum((1, 2)) + _cost(rest).sum((1, 2, 3))


def _cost(steps: Tensor) -> Tensor:
    return BITS / (2 * math.log(2)) * torch.log1p((steps / KNEE).square())


def build_jpeg_surrogate(context: RewardContext) -> JPEGSurrogateReward:
    """Needs no weights; the context does not matter."""
    return JPEGSurrogateReward()
