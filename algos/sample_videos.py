"""The videos of an evaluation as files that people open: samples/eval_<update>/<prompt>.mp4."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdm_env.video import save_mp4

_NAME = 100  # characters; file systems take 255 bytes, and a character may be four


def save_samples(folder: Path, videos: np.ndarray, captions: Sequence[str], fps: float) -> list[Path]:
    """Writes one mp4 a video, all of them or none.

    Args:
        folder: that they are put into; one of this name is replaced.
        videos: uint8 [n, F, H, W, 3].
        captions: n; they are the names, as far as a file system takes them.
        fps: frames per second.

    Returns:
        The n files.

    Raises:
        OSError: they cannot be written, and nothing is left of them.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    names = distinct([file_name(text) for text in captions])
    try:
        part.mkdir(parents=True)
        for video, name in zip(videos, names, strict=True):
            save_mp4(part / f"{name}.mp4", as_video(video), fps)
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
    except Exception:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return [folder / f"{name}.mp4" for name in names]


def file_name(caption: str) -> str:
    """A caption without what some file system refuses, cut at a word; "video" where nothing is left."""
    text = " ".join(re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', " ", caption).split())
    if len(text) > _NAME:
        text = text[:_NAME].rsplit(" ", 1)[0]
    return text.strip(". ") or "video"


def distinct(captions: Sequence[str]) -> list[str]:
    """The captions, with a number behind each that was there before, whatever the case of its letters."""
    found: list[str] = []
    for text in captions:
        name, number = text, 1
        while name.lower() in [other.lower() for other in found]:
            number += 1
            name = f"{text} ({number})"
        found.append(name)
    return found


def as_video(frames: np.ndarray) -> Tensor:
    """Uint8 [F, H, W, 3] to [F, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
