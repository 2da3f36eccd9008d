"""Videos side by side with words above them, for people."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vdm_env.video import enlarge

_MIN_SIDE_PX, _GAP_PX, _TEXT_PX, _LINE_PX = 160, 8, 13, 17
_CHARACTER_PX = 7  # about the width of one; lines are broken a little early rather than cut off


def side_by_side(rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str]) -> np.ndarray:
    """One film of all videos: a row for each prompt below its caption, a column for each model below its name.

    Args:
        rows: caption and videos uint8 [F,H,W,3] of each row, all of one shape, one for each column.
        columns: their names.

    Returns:
        uint8 [F,h,w,3], h and w even (as H.264 wants them).

    Raises:
        ValueError: no rows, or videos of different shapes or numbers.
    """
    shapes = {video.shape for _, videos in rows for video in videos}
    if len(shapes) != 1 or any(len(videos) != len(columns) for _, videos in rows):
        raise ValueError(f"expected {len(columns)} videos of one shape in each row, got shapes {sorted(shapes)}")
    large = [(caption, [enlarge(video, _MIN_SIDE_PX) for video in videos]) for caption, videos in rows]
    frames, height, width, _ = large[0][1][0].shape
    total = len(columns) * width + (len(columns) + 1) * _GAP_PX
    total += total % 2
    bands = []
    for caption, videos in large:
        head = _head(caption, columns, total, width)
        body = np.full((frames, height, total, 3), 255, np.uint8)
        for place, video in enumerate(videos):
            left = _GAP_PX + place * (width + _GAP_PX)
            body[:, :, left : left + width] = video
        bands += [np.broadcast_to(head, (frames, *head.shape)), body]
    film = np.concatenate(bands, axis=1)
    below = np.full((frames, _GAP_PX + film.shape[1] % 2, total, 3), 255, np.uint8)
    return np.concatenate([film, below], axis=1)


def _head(caption: str, columns: Sequence[str], total: int, width: int) -> np.ndarray:
    """The caption over the whole width, and the columns' names, uint8 [h,total,3]."""
    lines = textwrap.wrap(caption, max(10, (total - 2 * _GAP_PX) // _CHARACTER_PX)) or [""]
    image = Image.new("RGB", (total, _GAP_PX + _LINE_PX * (len(lines) + 1)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_TEXT_PX)
    for number, line in enumerate(lines):
        draw.text((_GAP_PX, _GAP_PX // 2 + number * _LINE_PX), line, fill="black", font=font)
    for place, name in enumerate(columns):
        left = _GAP_PX + place * (width + _GAP_PX)
        draw.text((left, _GAP_PX // 2 + len(lines) * _LINE_PX), name, fill="#555555", font=font)
    return np.asarray(image)
