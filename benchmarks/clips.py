"""Small videos for a page: uint8 frames to an mp4 in a data URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np


def mp4(video: np.ndarray, *, fps: int = 8, scale: int = 4, crf: int = 20) -> bytes:
    """H.264 of a video, enlarged without smoothing.

    Args:
        video: uint8 [F, H, W, 3].
        fps: frames per second.
        scale: whole-number enlargement; H and W times scale must be even.
        crf: constant rate factor of H.264, 0 (lossless) to 51.

    Raises:
        ValueError: another shape or type, or an odd size.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise ValueError(f"expected uint8 [F, H, W, 3], got {video.dtype} {list(video.shape)}")
    height, width = video.shape[1] * scale, video.shape[2] * scale
    if height % 2 or width % 2:
        raise ValueError(f"H.264 needs an even size, got {height} x {width} px: choose an even scale")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": str(crf), "preset": "veryfast", "x264-params": "mbtree=0"}  # see `vdm_env.video.REPEATABLE`
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in video.repeat(scale, 1).repeat(scale, 2):
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def data_uri(encoded: bytes) -> str:
    """`mp4` as the source of a <video> element, so that the page needs no second file."""
    return "data:video/mp4;base64," + base64.b64encode(encoded).decode()


def for_page(video: np.ndarray, *, least: int = 128, most: int = 256) -> np.ndarray:
    """A video of even size and `least` to about `most` pixels wide: small ones are enlarged without smoothing.

    Of large ones whole rows and columns are left out.
    """
    scale, step = -(-least // video.shape[2]), max(1, video.shape[2] // most)
    video = video[:, ::step, ::step].repeat(scale, 1).repeat(scale, 2)
    return video[:, : video.shape[1] // 2 * 2, : video.shape[2] // 2 * 2]


def fit(rows: Sequence[Sequence[np.ndarray]], most: int) -> list[list[bytes]]:
    """Rows of videos encoded for a page, as many whole rows as fit into `most` bytes.

    If not even the first one fits, it is compressed harder; it stays in at the hardest, whatever its size.

    Args:
        rows: uint8 [F, H, W, 3] videos.
        most: bytes of the encoded videos together.
    """
    for crf in (20, 30, 40):
        kept: list[list[bytes]] = []
        left = most
        for row in rows:
            encoded = [mp4(for_page(video), scale=1, crf=crf) for video in row]
            left -= sum(map(len, encoded))
            if left < 0 and (kept or crf < 40):
                break
            kept.append(encoded)
        if kept or not rows:
            return kept
    return []
