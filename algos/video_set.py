"""Given videos with their texts, for algorithms that start from videos instead of noise.

A `VideoSet` holds them as one tensor; `from_folder` reads films, `rendered_shapes` draws MovingShapes scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_env import noise
from vdm_env.rewards.base import select_frames
from vdm_env.worlds.moving_shapes import render

FILM_ENDINGS = (".mp4", ".gif", ".webm", ".avi", ".mov", ".mkv")


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoSet:
    """N videos of one size and their N texts, on the CPU.

    Raises:
        TypeError: videos that are neither floats nor uint8.
        ValueError: another shape, floats outside [0, 1], another number of texts, or an empty text.
    """

    videos: Tensor
    """[N,F,3,H,W], floats in [0, 1], or uint8 to save memory"""
    prompts: tuple[str, ...]
    """N texts; several videos may share one"""

    def __post_init__(self) -> None:
        video = self.videos
        if not isinstance(video, Tensor) or not (video.is_floating_point() or video.dtype == torch.uint8):
            kind = video.dtype if isinstance(video, Tensor) else type(video).__name__
            raise TypeError(f"videos is {kind}, expected floats in [0, 1] or uint8, [N,F,3,H,W]")
        if video.ndim != 5 or video.shape[2] != 3 or 0 in video.shape:
            raise ValueError(f"videos has shape {tuple(video.shape)}, expected [N,F,3,H,W] with N >= 1")
        if video.is_floating_point() and not bool((video.min() >= 0) & (video.max() <= 1)):
            raise ValueError(
                f"videos has values {float(video.min()):.3g}..{float(video.max()):.3g}, expected [0, 1]; "
                f"pixels of a decoder in [-1, 1] become (x + 1) / 2"
            )
        if isinstance(self.prompts, str) or len(self.prompts) != len(video):
            given = "one text" if isinstance(self.prompts, str) else f"{len(self.prompts)} texts"
            raise ValueError(f"{given} for {len(video)} videos; give one text for each video")
        if not all(isinstance(text, str) and text.strip() for text in self.prompts):
            raise ValueError("every video needs a text that is not empty")

    def __len__(self) -> int:
        return len(self.videos)

    def take(self, index: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Videos [b,F,3,H,W], floats in [0, 1], and their texts."""
        video = self.videos[list(index)]
        return (video.float() / 255 if video.dtype == torch.uint8 else video), [self.prompts[i] for i in index]


def order(size: int, seed: int, start: int, count: int) -> list[int]:
    """Places start..start+count-1 of an endless walk through `size` things: all of them before any again.

    A pure function of its arguments, so that a run goes on from the number of things it has drawn.
    """
    picked = []
    for place in range(start, start + count):
        epoch, i = divmod(place, size)
        picked.append(int(torch.randperm(size, generator=noise.generator_for(seed, epoch))[i]))
    return picked


def read_film(path: str | Path, *, num_frames: int, height: int, width: int) -> Tensor:
    """A film as uint8 [F,3,H,W]: frames evenly spread over it, the largest centred crop of the aspect, resized.

    Raises:
        ValueError: fewer frames than asked for, or no film that can be read.
    """
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a film ({error}); remove it, or write it again as mp4") from error
    if len(frames) < num_frames:
        raise ValueError(f"{path} has {len(frames)} frames, expected at least {num_frames}; take a longer film")
    chosen = [frames[i] for i in select_frames(num_frames, len(frames)).tolist()]
    video = torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).float()
    rows, columns = video.shape[-2:]
    scale = min(rows / height, columns / width)
    crop = max(1, min(rows, round(height * scale))), max(1, min(columns, round(width * scale)))
    top, left = (rows - crop[0]) // 2, (columns - crop[1]) // 2
    video = video[..., top : top + crop[0], left : left + crop[1]]
    if crop != (height, width):
        video = F.interpolate(video, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    return video.round().clamp(0, 255).to(torch.uint8)


def from_folder(folder: str | Path, *, num_frames: int, height: int, width: int) -> VideoSet:
    """All films of a folder, in the order of their names; the text of `name.mp4` is in `name.txt`.

    Args:
        folder: where they are.
        num_frames, height, width: what they are brought to, see `read_film`; those of the env
            (`env.mdp.num_frames`, `env.mdp.height`, `env.mdp.width`).

    Raises:
        FileNotFoundError: no films, or a film without a text.
        ValueError: a film that cannot be read, or is too short; an empty text.
    """
    films = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in FILM_ENDINGS)
    if not films:
        raise FileNotFoundError(f"no films in {folder}; expected files ending in {', '.join(FILM_ENDINGS)}")
    texts = [film.with_suffix(".txt") for film in films]
    missing = [text.name for text in texts if not text.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing[:4])} ({len(missing)} in all): the films' texts")
    videos = torch.stack([read_film(film, num_frames=num_frames, height=height, width=width) for film in films])
    return VideoSet(videos=videos, prompts=tuple(text.read_text(encoding="utf-8").strip() for text in texts))


def rendered_shapes(prompts: Sequence[str], copies: int = 1, seed: int = 0) -> VideoSet:
    """True videos of the MovingShapes world: `copies` scenes of random size, place and speed for each caption.

    Args:
        prompts: captions, for training those of `prompt_splits()["train"]`.
        copies: >= 1.
        seed: of the scenes.

    Raises:
        ValueError: a text that is no caption of this world, or copies < 1.
    """
    if copies < 1:
        raise ValueError(f"copies is {copies}, expected at least 1")
    texts = [text for text in prompts for _ in range(copies)]
    labels = [render.parse_caption(text) for text in texts]
    scenes = render.sample_scenes(labels, torch.Generator().manual_seed(seed))
    video = (render.render(scenes) * 255).round().to(torch.uint8)
    return VideoSet(videos=video, prompts=tuple(texts))
