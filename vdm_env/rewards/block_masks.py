"""Which tokens of a video a V-JEPA sees and which it predicts: blocks in space that run through the whole time.

Source: Bardes et al. 2024, arXiv:2404.08471, section 3.2; facebookresearch/jepa (8 blocks that cover 0.15 of a frame
each, and 2 that cover 0.7, height to width between 0.75 and 1.5).

Deviation: size and places of the blocks come from one seed, and every video gets the same masks. In training the places
differ from video to video and masks are cut to the shortest of the batch, which would make a score depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Mask = tuple[Tensor, Tensor]
"""(tokens that are seen [K], tokens to predict [M]), int64, counted time first, then rows, then columns"""

_ATTEMPTS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """Blocks of one size at random places; their union is to be predicted, the rest is seen."""

    num_blocks: int
    scale: float
    """part of a frame that one block covers, in (0, 1)"""
    aspect: tuple[float, float] = (0.75, 1.5)
    """height to width, lowest and highest"""

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or not 0 < self.scale < 1 or not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(
                "expected num_blocks >= 1, scale in (0, 1) and 0 < lowest <= highest aspect, got "
                f"{self.num_blocks}, {self.scale}, {self.aspect}"
            )


TRAINING_BLOCKS = (BlockSpec(num_blocks=8, scale=0.15), BlockSpec(num_blocks=2, scale=0.7))


def block_masks(grid: tuple[int, int, int], specs: Sequence[BlockSpec] = TRAINING_BLOCKS, seed: int = 0) -> list[Mask]:
    """One mask for each spec on a grid of (time, rows, columns) tokens; the same seed gives the same masks.

    Raises:
        ValueError: the blocks leave nothing to see, however they are placed.
    """
    depth, rows, columns = grid
    generator = torch.Generator().manual_seed(seed)
    masks: list[Mask] = []
    for spec in specs:
        low, high = spec.aspect
        aspect = low + float(torch.rand((), generator=generator)) * (high - low)
        area = int(rows * columns * spec.scale)
        height = min(max(1, round(math.sqrt(area * aspect))), rows)
        width = min(max(1, round(math.sqrt(area / aspect))), columns)
        for _ in range(_ATTEMPTS):
            seen = torch.ones(rows, columns, dtype=torch.bool)
            for _ in range(spec.num_blocks):
                top = int(torch.randint(rows - height + 1, (), generator=generator))
                left = int(torch.randint(columns - width + 1, (), generator=generator))
                seen[top : top + height, left : left + width] = False
            if bool(seen.any()):
                break
        else:
            raise ValueError(
                f"{spec.num_blocks} blocks of {height} x {width} tokens leave nothing to see of {rows} x {columns}; "
                "use fewer or smaller blocks, or larger frames"
            )
        tokens = torch.arange(depth * rows * columns).view(depth, rows, columns)
        masks.append((tokens[:, seen].flatten().sort().values, tokens[:, ~seen].flatten().sort().values))
    return masks


def check_masks(masks: Sequence[Mask], num_tokens: int) -> None:
    """Raises ValueError unless each mask has both parts, within 0..num_tokens-1, and none overlaps its other part."""
    if not masks:
        raise ValueError("masked prediction needs at least one mask")
    for i, (seen, predicted) in enumerate(masks):
        both = torch.cat([seen.flatten(), predicted.flatten()])
        bad = not len(seen) or not len(predicted) or int(both.min()) < 0 or int(both.max()) >= num_tokens
        if bad or set(seen.tolist()) & set(predicted.tolist()):
            raise ValueError(
                f"mask {i} is not usable: expected tokens that are seen and tokens to predict, at least one of each, "
                f"in 0..{num_tokens - 1}, none in both"
            )
