"""Training data of MovingShapes' reward networks: pictures good and bad, and how good each of them is.

A reward trained on clean pictures only is soon fooled by the policy it trains: adversarial pixels raise the score while
the shapes fall apart. So the networks see every kind of picture a policy may produce on its way: wrong colours, shapes
between two shapes, noise, blur, blotches, round trips through the autoencoder with noisy latents, and videos of the
diffusion models. The targets of synthetic pictures follow from how they were made; those of generated pictures are
measured against templates.

Legend: N frames, B videos, F frames a video, pixels in [0,1], H = W = 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_env.worlds.moving_shapes.render import (
    COLOURS,
    DIRECTIONS,
    NUM_FRAMES,
    SHAPES,
    SIZE_PX,
    coverage,
    random_labels,
    sample_scenes,
)

PALETTE = torch.tensor(list(COLOURS.values()))
HEADINGS = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)
_AREAS = torch.stack(
    [coverage(torch.tensor([i]), torch.tensor([8.0]), torch.full((1, 1, 2), 16.0)).sum() / 64 for i in range(4)]
)
_COLOUR_WIDTH = 0.30  # RGB distance at which a colour counts e^-1 as much as the palette's
_CLEAN_WIDTH = 0.05  # mean pixel error at which a picture counts e^-1 as much as a clean one
_SPEED_SCALE = 2.8  # per px/frame: at the slowest true motion (1.3 px a frame) the direction is 95 % sure


@dataclass(frozen=True)
class Targets:
    """What a frame is worth: match with each colour [N,7] and shape [N,4] and cleanness [N], all in [0,1]."""

    colour: Tensor
    shape: Tensor
    clean: Tensor

    def preference(self) -> Tensor:
        """The cosine each of the 28 (colour, shape) captions should have with the frame, [N,7,4]."""
        match = 0.1 + 0.4 * self.colour[:, :, None] + 0.4 * self.shape[:, None, :]
        return self.clean[:, None, None] * match

    def classes(self) -> Tensor:
        """Soft label over the 28 (colour, shape) captions, [N,7,4]; uniform where nothing can be told."""
        weight = self.colour[:, :, None] * self.shape[:, None, :] + 1e-3
        return weight / weight.sum((1, 2), keepdim=True)

    def __getitem__(self, rows: Tensor) -> Targets:
        return Targets(self.colour[rows], self.shape[rows], self.clean[rows])

    def replaced(self, rows: Tensor | slice, by: Targets) -> Targets:
        """A copy in which `rows` are those of `by`."""
        new = Targets(self.colour.clone(), self.shape.clone(), self.clean.clone())
        new.colour[rows], new.shape[rows], new.clean[rows] = by.colour, by.shape, by.clean
        return new

    def seen_as(self, frames: Tensor, ideal: Tensor) -> Targets:
        """The same content, as clean as `frames` are against `ideal`; where there was no shape, none appears."""
        return Targets(self.colour, self.shape, (self.clean > 0) * cleanness(frames, ideal))


def cleanness(frames: Tensor, ideal: Tensor) -> Tensor:
    """exp(-mean |frame - ideal| / 0.05), [N]."""
    return (-(frames - ideal).abs().mean((1, 2, 3)) / _CLEAN_WIDTH).exp()


@torch.no_grad()
def measure_frames(frames: Tensor) -> tuple[Targets, Tensor]:
    """Measures [N,3,H,W] against templates: its targets and the ideal picture of what it shows."""
    edge = torch.cat([frames[..., 0, :], frames[..., -1, :], frames[..., :, 0], frames[..., :, -1]], -1)
    background = edge.median(-1).values
    distance = (frames - background[:, :, None, None]).square().sum(1).sqrt()
    core = distance.flatten(1).topk(24, -1).indices
    foreground = frames.flatten(2).gather(2, core[:, None].expand(-1, 3, -1)).median(-1).values
    contrast = foreground - background
    strength = contrast.square().sum(1)
    mask = ((frames - background[:, :, None, None]) * contrast[:, :, None, None]).sum(1) / (strength + 1e-6)[
        :, None, None
    ]
    mask = torch.where(mask < 0.25, torch.zeros_like(mask), mask.clamp(max=1))
    area = mask.sum((1, 2)).clamp(min=1)
    grid = torch.arange(SIZE_PX) + 0.5
    centre = torch.stack([(mask.sum(1) * grid).sum(1), (mask.sum(2) * grid).sum(1)], -1) / area[:, None]
    templates = []
    for index in range(len(SHAPES)):
        radius = (area / _AREAS[index]).sqrt().clamp(1, SIZE_PX / 2)
        templates.append(coverage(torch.full((len(frames),), index), radius, centre[:, None])[:, 0])
    template = torch.stack(templates, 1)
    overlap = torch.minimum(mask[:, None], template).sum((2, 3)) / torch.maximum(mask[:, None], template).sum((2, 3))
    present = ((strength.sqrt() - 0.10) / 0.10).clamp(0, 1)
    fit = ((overlap.amax(1) - 0.5) / 0.35).clamp(0, 1) * present
    shape = (25 * overlap).softmax(1) * fit[:, None]
    colour = (-(torch.cdist(foreground, PALETTE) / _COLOUR_WIDTH).square()).exp() * present[:, None]
    alpha = template[torch.arange(len(frames)), overlap.argmax(1)][:, None]
    ideal = background[:, :, None, None] + alpha * contrast[:, :, None, None]
    return Targets(colour, shape, cleanness(frames, ideal) * present), ideal


class Random:
    """Short names for draws from one generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def chance(self, p: float, n: int) -> Tensor:
        return torch.rand(n, generator=self.generator) < p

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


def sample_colours(n: int, draw: Random) -> tuple[Tensor, Tensor]:
    """Foreground and background [n,3]: half as in true videos, the others between two colours, or any."""
    scenes = sample_scenes(random_labels(n, draw.generator), draw.generator)
    between = torch.lerp(scenes.rgb, PALETTE[draw.integers(7, n)], draw.uniform(n, 1))
    kind = draw.uniform(n, 1)
    foreground = torch.where(kind < 0.5, scenes.rgb, torch.where(kind < 0.8, between, draw.uniform(n, 3)))
    foreign = draw.chance(0.15, n)[:, None]
    return foreground, torch.where(foreign, draw.uniform(n, 3, high=0.6), scenes.background)


def sample_outlines(n: int, draw: Random) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two shapes [n], how far from the first to the second [n], stretch [n] and waviness in px [n].

    Half are true shapes.
    """
    mixed, bent = draw.chance(0.3, n), draw.chance(0.3, n)
    blend = draw.uniform(n) * mixed
    stretch = 1 + 0.35 * draw.normal(n).clamp(-2, 2) * 0.5 * bent
    return draw.integers(4, n), draw.integers(4, n), blend, stretch, draw.uniform(n, high=2.5) * bent


def draw_outline(outline: tuple[Tensor, ...], radius: Tensor, centre: Tensor, phase: Tensor) -> Tensor:
    """Share of each pixel covered [n,H,W] by a possibly deformed shape of `radius` [n] px at `centre` [n,2] px."""
    first, second, blend, stretch, wave = outline
    grid = torch.arange(SIZE_PX) + 0.5
    x = (grid[None, None, :] - centre[:, 0, None, None]) * stretch[:, None, None]
    y = (grid[None, :, None] - centre[:, 1, None, None]) / stretch[:, None, None]
    x, y = torch.broadcast_tensors(x, y)
    all_distances = torch.stack([sdf(x, y, radius[:, None, None]) for sdf in SHAPES.values()], 1)
    rows = torch.arange(len(radius))
    distance = torch.lerp(all_distances[rows, first], all_distances[rows, second], blend[:, None, None])
    ripple = torch.sin(5 * torch.atan2(y, x) + phase[:, None, None])
    return (0.5 - distance - wave[:, None, None] * ripple).clamp(0, 1)


def degrade(frames: Tensor, draw: Random, share: float = 0.7) -> Tensor:
    """Noise, blur and blotches of random strength on a `share` of [N,3,H,W]; the others stay as they are."""
    n = len(frames)

    def strength(p: float, high: float) -> Tensor:
        on = draw.chance(p, n) & draw.chance(share, n)
        return (draw.uniform(n) * on * high)[:, None, None, None]

    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
    kernel = (kernel[:, None] * kernel / 256).expand(3, 1, 5, 5)
    soft = F.conv2d(F.pad(frames, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    frames = torch.lerp(frames, soft, strength(0.35, 1.0))
    blotches = F.interpolate(draw.normal(n, 3, 5, 5), size=SIZE_PX, mode="bicubic", align_corners=False)
    frames = frames + strength(0.35, 0.2) * blotches
    frames = frames + strength(0.4, 0.15) * draw.normal(*frames.shape)
    return frames.clamp(0, 1)


def synthetic_frames(n: int, draw: Random) -> tuple[Tensor, Targets, Tensor]:
    """Pictures [n,3,H,W] with possibly wrong colours and deformed shapes; targets and ideals measured on them."""
    foreground, background = sample_colours(n, draw)
    radius = draw.uniform(n, low=4.5, high=6.5)
    centre = 1.2 * radius[:, None] + (SIZE_PX - 2.4 * radius[:, None]) * draw.uniform(n, 2)
    outline = sample_outlines(n, draw)
    alpha = draw_outline(outline, radius, centre, draw.uniform(n, high=6.28))
    ghost = draw_outline(sample_outlines(n, draw), radius * 0.7, draw.uniform(n, 2, high=SIZE_PX), draw.uniform(n))
    alpha = torch.where(draw.chance(0.04, n)[:, None, None], torch.zeros_like(alpha), alpha)[:, None]
    clean = background[:, :, None, None] + alpha * (foreground - background)[:, :, None, None]
    targets, ideal = measure_frames(clean)
    add = (draw.uniform(n) * draw.chance(0.08, n))[:, None, None, None] * ghost[:, None]
    return torch.lerp(clean, foreground.flip(0)[:, :, None, None].expand_as(clean), add), targets, ideal


def synthetic_videos(n: int, draw: Random) -> tuple[Tensor, Tensor]:
    """Videos [n,F,3,H,W] of moving, wandering or resting shapes, and the mean velocity [n,2] in px a frame."""
    foreground, background = sample_colours(n, draw)
    radius = draw.uniform(n, low=4.5, high=6.5)
    kind = draw.uniform(n, 1)
    axis = HEADINGS[draw.integers(4, n)] * draw.uniform(n, 1, low=0.8, high=2.2)
    slow = HEADINGS[draw.integers(4, n)] * draw.uniform(n, 1, high=0.8)
    velocity = torch.where(kind < 0.7, axis, torch.where(kind < 0.85, slow, draw.uniform(n, 2, low=-1.8, high=1.8)))
    steps = torch.arange(NUM_FRAMES) - (NUM_FRAMES - 1) / 2
    path = velocity[:, None] * steps[None, :, None]
    wander = draw.normal(n, NUM_FRAMES, 2) * (draw.uniform(n) * draw.chance(0.4, n))[:, None, None]
    path = path + wander
    margin = (1.1 * radius[:, None] + path.abs().amax(1)).clamp(max=SIZE_PX / 2 - 0.5)
    path = path + (margin + (SIZE_PX - 2 * margin) * draw.uniform(n, 2))[:, None]
    outline = tuple(part.repeat_interleave(NUM_FRAMES) for part in sample_outlines(n, draw))
    alpha = draw_outline(
        outline, radius.repeat_interleave(NUM_FRAMES), path.flatten(0, 1), draw.uniform(n).repeat_interleave(NUM_FRAMES)
    ).view(n, NUM_FRAMES, 1, SIZE_PX, SIZE_PX)
    video = background[:, None, :, None, None] + alpha * (foreground - background)[:, None, :, None, None]
    return video, fitted_velocity(path)


def fitted_velocity(path: Tensor) -> Tensor:
    """Least-squares velocity [B,2] of positions [B,F,2]."""
    steps = torch.arange(path.shape[1]) - (path.shape[1] - 1) / 2
    return (steps[None, :, None] * path).sum(1) / steps.square().sum()


def direction_targets(velocity: Tensor) -> Tensor:
    """Soft label over left, right, up, down [B,4]; uniform for a shape at rest."""
    return (_SPEED_SCALE * velocity @ HEADINGS.T).softmax(1)


@torch.no_grad()
def measure_velocity(video: Tensor) -> Tensor:
    """Velocity [B,2] of the brightest-against-background mass of [B,F,3,H,W], px a frame."""
    edge = torch.cat([video[..., 0, :], video[..., -1, :], video[..., :, 0], video[..., :, -1]], -1)
    background = edge.transpose(1, 2).flatten(2).median(-1).values
    distance = (video - background[:, None, :, None, None]).square().sum(2).sqrt()
    peak = distance.flatten(2).topk(24, -1).values.mean(-1).clamp(min=0.1)[..., None, None]
    mask = (distance / peak - 0.3).clamp(0, 0.5)
    grid = torch.arange(SIZE_PX) + 0.5
    total = mask.sum((2, 3)).clamp(min=1e-3)
    return fitted_velocity(
        torch.stack([(mask.sum(2) * grid).sum(-1), (mask.sum(3) * grid).sum(-1)], -1) / total[..., None]
    )
