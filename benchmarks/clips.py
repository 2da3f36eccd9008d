"""Small videos for a page: uint8 frames to an mp4 in a data URI."""

from __future__ import annotations

import base64
import io
from fractions import Fraction

import av
import numpy as np


def mp4(video: np.ndarray, *, fps: int = 8, scale: int = 4) -> bytes:
    """H.264 of a video, enlarged without smoothing.

    Args:
        video: uint8 [F, H, W, 3].
        fps: frames per second.
        scale: whole-number enlargement; H and W times scale must be even.

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
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "20", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in video.repeat(scale, 1).repeat(scale, 2):
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def data_uri(video: np.ndarray, *, fps: int = 8, scale: int = 4) -> str:
    """`mp4` as the source of a <video> element, so that the page needs no second file."""
    return "data:video/mp4;base64," + base64.b64encode(mp4(video, fps=fps, scale=scale)).decode()
