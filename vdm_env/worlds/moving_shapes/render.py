"""The MovingShapes renderer: a coloured shape moving over a plain background.

A scene is five numbers and three labels, so the true content of a video is known exactly; that is what
makes a gold score possible (`gold.py`). Shapes are drawn from signed distances, with one pixel of
anti-aliasing, in pure torch: B scenes of F frames render in one vectorised expression.

Legend: B scenes, F frames, H = W = `size` pixels, x to the right and y down, in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE_PX = 32
NUM_FRAMES = 8

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.90, 0.20),
    "purple": (0.75, 0.25, 0.85),
    "cyan": (0.20, 0.85, 0.90),
    "white": (0.95, 0.95, 0.95),
}
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt() - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.88 * r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    # Equilateral, pointing up, centroid at the origin: three half planes at the inradius.
    inradius = 0.68 * r
    slope = torch.maximum(0.8660254 * x.abs() - 0.5 * y, y)
    return slope - inradius


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    ax, ay = x.abs(), y.abs()
    wide = torch.maximum(ax - 1.12 * r, ay - 0.37 * r)
    tall = torch.maximum(ax - 0.37 * r, ay - 1.12 * r)
    return torch.minimum(wide, tall)


SHAPES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; every field has B on dimension 0.

    `colour`, `shape`, `direction` are indices into `COLOURS`, `SHAPES`, `DIRECTIONS`; `rgb` [B,3] in [0,1] is the
    colour as drawn (the palette colour with a little variation); `radius` [B], `centre` [B,2] (position in the
    middle of the clip) and `speed` [B] (pixels a frame) are in pixels; `background` [B,3] in [0,1].
    """

    colour: Tensor
    shape: Tensor
    direction: Tensor
    rgb: Tensor
    radius: Tensor
    centre: Tensor
    speed: Tensor
    background: Tensor


def caption(colour: str, shape: str, direction: str) -> str:
    """The caption of a scene, for example "a red circle moving left"."""
    return f"a {colour} {shape} moving {direction}"


def parse_caption(text: str) -> tuple[int, int, int]:
    """Indices (colour, shape, direction) of a caption.

    Raises:
        ValueError: the text is not a MovingShapes caption.
    """
    words = text.split()
    if len(words) == 5 and words[0] == "a" and words[3] == "moving":
        _, colour, shape, _, direction = words
        if colour in COLOURS and shape in SHAPES and direction in DIRECTIONS:
            return list(COLOURS).index(colour), list(SHAPES).index(shape), list(DIRECTIONS).index(direction)
    raise ValueError(
        f"{text!r} is not a MovingShapes caption; expected 'a <colour> <shape> moving <direction>' with colour in "
        f"{list(COLOURS)}, shape in {list(SHAPES)}, direction in {list(DIRECTIONS)}, as in 'a red circle moving left'"
    )


def sample_scenes(labels: Sequence[tuple[int, int, int]] | Tensor, generator: torch.Generator) -> Scenes:
    """Scenes with the given (colour, shape, direction) labels and random size, place, speed and background.

    The whole path of the shape stays inside the picture (tips of the largest shapes may graze an edge).
    """
    labels = torch.as_tensor(labels, dtype=torch.int64).reshape(-1, 3)
    b = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=generator)

    colour, shape, direction = labels.unbind(1)
    radius, speed = uniform(4.5, 6.5), uniform(1.3, 2.1)
    # Half the path along the motion plus a shape's half extent (the cross: 1.12 r, the triangle's tip: 1.36 r).
    along = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[direction].abs()
    margin = 1.2 * radius[:, None] + along * (speed[:, None] * (NUM_FRAMES - 1) / 2)
    margin = margin.clamp(max=SIZE_PX / 2 - 0.5)
    centre = margin + (SIZE_PX - 2 * margin) * torch.rand(b, 2, generator=generator)
    palette = torch.tensor(list(COLOURS.values()))
    rgb = (palette[colour] + uniform(-0.04, 0.04, 3)).clamp(0, 1)
    background = uniform(0.05, 0.30, 1) + uniform(-0.03, 0.03, 3)
    return Scenes(colour, shape, direction, rgb, radius, centre, speed, background.clamp(0, 1))


def coverage(shape: Tensor, radius: Tensor, centre_xy: Tensor, size: int = SIZE_PX) -> Tensor:
    """Share of each pixel covered by the shape.

    Args:
        shape: [B] int64, index into `SHAPES`.
        radius: [B], pixels.
        centre_xy: [B, F, 2], pixels.

    Returns:
        [B, F, size, size] in [0, 1].
    """
    grid = torch.arange(size, dtype=torch.float32, device=radius.device) + 0.5
    x = grid[None, None, None, :] - centre_xy[..., 0, None, None]
    y = grid[None, None, :, None] - centre_xy[..., 1, None, None]
    x, y = torch.broadcast_tensors(x, y)
    r = radius[:, None, None, None]
    distance = torch.empty_like(x)
    for index, sdf in enumerate(SHAPES.values()):
        of_this = shape == index
        if of_this.any():
            distance[of_this] = sdf(x[of_this], y[of_this], r[of_this])
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Scenes, num_frames: int = NUM_FRAMES, size: int = SIZE_PX) -> Tensor:
    """Draws the scenes.

    Returns:
        video [B, F, 3, size, size], float32 in [0, 1].
    """
    steps = torch.arange(num_frames, dtype=torch.float32) - (num_frames - 1) / 2
    heading = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[scenes.direction]
    path = scenes.centre[:, None] + steps[None, :, None] * (scenes.speed[:, None] * heading)[:, None]
    alpha = coverage(scenes.shape, scenes.radius, path, size)[:, :, None]
    rgb, background = scenes.rgb[:, None, :, None, None], scenes.background[:, None, :, None, None]
    return background + alpha * (rgb - background)


def random_labels(n: int, generator: torch.Generator) -> Tensor:
    """[n, 3] int64 labels, uniform over all combinations."""
    sizes = (len(COLOURS), len(SHAPES), len(DIRECTIONS))
    return torch.stack([torch.randint(k, (n,), generator=generator) for k in sizes], 1)


def captions_of(labels: Tensor) -> list[str]:
    """Captions of [B, 3] labels."""
    colours, shapes, directions = list(COLOURS), list(SHAPES), list(DIRECTIONS)
    return [caption(colours[c], shapes[s], directions[d]) for c, s, d in labels.tolist()]
