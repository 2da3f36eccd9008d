"""The videos of an evaluation in a run's folder: as arrays for reports, and as files that people open.

samples/eval_<update>.npz and samples/eval_<update>/<prompt>.mp4.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from algos.evaluate import Evaluation
from algos.run_files import replace_file
from vdm_env.video import save_mp4

_NAME = 100  # characters; file systems take 255 bytes, and a character may be four


def save_videos(folder: Path, update: int, found: Evaluation, fps: float, *, mp4: bool = True) -> None:
    """Writes the videos that an evaluation kept; nothing where it kept none.

    Args:
        folder: of the run.
        update: after which they were made.
        found: uint8 videos [n, F, H, W, 3] with their prompts and (prompt id, noise seed) pairs.
        fps: frames per second.
        mp4: False leaves the files for people out.

    Raises:
        OSError: they cannot be written.
    """
    if found.videos is None:
        return
    prompt_ids, noise_seeds = zip(*found.pairs, strict=True)
    data = io.BytesIO()
    np.savez_compressed(
        data,
        videos=found.videos,
        prompt_ids=np.array(prompt_ids),
        noise_seeds=np.array(noise_seeds),
        prompts=np.array(found.prompts),
    )
    (folder / "samples").mkdir(exist_ok=True)
    path = folder / "samples" / f"eval_{update:06d}.npz"
    if mp4:
        save_samples(path.with_suffix(""), found.videos, found.prompts, fps)
    replace_file(path, data.getvalue())


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
