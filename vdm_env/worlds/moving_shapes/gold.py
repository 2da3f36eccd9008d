"""The gold score of MovingShapes: does the video truly show what the caption says?

Because the world is synthetic the true preference can be measured instead of learned. No algorithm may optimise this
score; it stands beside the proxy reward in every report, so that over-optimisation becomes visible (Gao et al. 2023,
arXiv:2210.10760, call it gold against proxy). It is not differentiable and runs without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_env.worlds.moving_shapes.render import COLOURS, DIRECTIONS, SHAPES, coverage, parse_caption

# Areas of the shapes at radius 1, to find the radius that fits a measured area.
_AREAS = torch.tensor([3.14159265, (2 * 0.88) ** 2, 5.19615242 * 0.68**2, 4 * (2 * 1.12 * 0.37 - 0.37**2)])
_MIN_CONTRAST = 0.15  # a foreground nearer to the background than this, in RGB distance, counts as no shape at all
_MIN_TRAVEL_PX = 2.0  # a centroid that moves less over the whole clip counts as standing still
WEIGHTS = {"colour": 0.25, "shape": 0.25, "direction": 0.25, "smooth": 0.125, "clean": 0.125}


@dataclass(frozen=True)
class GoldScore:
    """Parts of the gold score, each [B] in [0, 1]; `total` is their weighted mean (`WEIGHTS`).

    colour, shape, direction: 1 where the video's is the caption's, else 0. smooth: exp(-residual of the centroid from
    uniform motion / 1 px). clean: exp(-mean distance of the video from the ideal picture of what it shows / 0.05).
    """

    colour: Tensor
    shape: Tensor
    direction: Tensor
    smooth: Tensor
    clean: Tensor

    @property
    def total(self) -> Tensor:
        return sum((w * getattr(self, part) for part, w in WEIGHTS.items()), torch.zeros_like(self.smooth))


def _measure(video: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Background [B,3], foreground colour [B,3], soft mask [B,F,H,W] and whether there is a shape at all [B]."""
    border = torch.cat([video[..., 0, :], video[..., -1, :], video[..., :, 0], video[..., :, -1]], -1)  # B F 3 P
    background = border.transpose(1, 2).flatten(2).median(-1).values
    distance = (video - background[:, None, :, None, None]).square().sum(2).sqrt()  # B F H W
    flat = distance.flatten(2)
    top = flat.topk(24, dim=-1).indices  # the shape's core: the smallest shape covers about 40 pixels
    pixels = video.flatten(3)  # B F 3 P
    core = pixels.gather(3, top[:, :, None].expand(-1, -1, 3, -1))
    foreground = core.transpose(1, 2).flatten(2).median(-1).values
    contrast = foreground - background
    strength = contrast.square().sum(1)
    projected = ((video - background[:, None, :, None, None]) * contrast[:, None, :, None, None]).sum(2)
    mask = (projected / strength.clamp(min=1e-6)[:, None, None, None]).clamp(0, 1)
    # Faint noise all over the picture must not pull the centroid to the middle.
    mask = torch.where(mask < 0.25, torch.zeros_like(mask), mask)
    return background, foreground, mask, strength.sqrt() > _MIN_CONTRAST


@torch.no_grad()
def gold_score(video: Tensor, prompts: Sequence[str]) -> GoldScore:
    """Measures videos against their captions.

    Args:
        video: [B, F, 3, H, W] in [0, 1], any float dtype.
        prompts: B MovingShapes captions.

    Returns:
        The parts, [B] float32 each.

    Raises:
        ValueError: wrong shape, or a prompt that is not a MovingShapes caption.
    """
    if video.ndim != 5 or video.shape[2] != 3 or len(prompts) != len(video):
        raise ValueError(
            f"expected video [B, F, 3, H, W] and B prompts, got {tuple(video.shape)} and {len(prompts)} prompts"
        )
    video = video.float().cpu().clamp(0, 1)
    colour, shape, direction = torch.tensor([parse_caption(p) for p in prompts]).unbind(1)
    background, foreground, mask, present = _measure(video)
    b, f, h, w = mask.shape

    palette = torch.tensor(list(COLOURS.values()))
    colour_ok = torch.cdist(foreground, palette).argmin(1) == colour

    grid_y, grid_x = torch.arange(h) + 0.5, torch.arange(w) + 0.5
    area = mask.sum((2, 3)).clamp(min=1e-6)
    cx = (mask.sum(2) * grid_x).sum(-1) / area
    cy = (mask.sum(3) * grid_y).sum(-1) / area
    centre = torch.stack([cx, cy], -1)  # B F 2

    overlap, ideal = [], []
    for index in range(len(SHAPES)):
        radius = (area / _AREAS[index]).sqrt().flatten().clamp(1.0, w / 2)
        template = coverage(torch.full((b * f,), index), radius, centre.reshape(b * f, 1, 2), w).reshape(b, f, h, w)
        overlap.append((torch.minimum(mask, template).sum((2, 3)) / torch.maximum(mask, template).sum((2, 3))).mean(1))
        ideal.append(template)
    best = torch.stack(overlap, 1).argmax(1)
    shape_ok = best == shape

    time = torch.arange(f) - (f - 1) / 2
    velocity = (time[None, :, None] * centre).sum(1) / time.square().sum()
    headings = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)
    moved = velocity.abs().amax(1) * (f - 1) > _MIN_TRAVEL_PX
    direction_ok = ((velocity @ headings.T).argmax(1) == direction) & moved
    residual = (centre - centre.mean(1, keepdim=True) - time[None, :, None] * velocity[:, None]).square().sum(2)
    smooth = (-residual.mean(1).sqrt()).exp()

    alpha = torch.stack(ideal, 1)[torch.arange(b), best][:, :, None]
    bg, fg = background[:, None, :, None, None], foreground[:, None, :, None, None]
    clean = (-(video - (bg + alpha * (fg - bg))).abs().mean((1, 2, 3, 4)) / 0.05).exp()

    parts = [part.float() * present for part in (colour_ok, shape_ok, direction_ok, smooth, clean)]
    return GoldScore(*parts)
