"""Videos for people: strips, mp4 and gif. Uint8 arrays out, PyAV and Pillow underneath."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

MIN_SIDE_PX = 96
REPEATABLE = "mbtree=0"
"""Setting of x264: its macroblock tree reads memory that nobody wrote, and the same video gives now these, now those
bytes (seen with 8 frames of 96 x 96 pixels under MALLOC_PERTURB_)."""


def to_uint8(video: Tensor) -> np.ndarray:
    """[F,3,H,W] in [0,1] to uint8 [F,H,W,3]."""
    return (video.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def enlarge(frames: np.ndarray, min_side_px: int = MIN_SIDE_PX) -> np.ndarray:
    """Repeats pixels of [F,H,W,3] until the shorter side has at least `min_side_px`: small worlds stay sharp."""
    factor = -(-min_side_px // min(frames.shape[1:3]))
    return frames.repeat(factor, 1).repeat(factor, 2) if factor > 1 else frames


def frame_row(video: Tensor, min_side_px: int = MIN_SIDE_PX) -> np.ndarray:
    """The frames of [F,3,H,W] side by side, uint8 [H,F*W,3] with even sides (as H.264 wants them)."""
    frames = enlarge(to_uint8(video), min_side_px)
    row = np.concatenate(list(frames), axis=1)
    return np.ascontiguousarray(row[: row.shape[0] // 2 * 2, : row.shape[1] // 2 * 2])


def save_mp4(path: str | Path, video: Tensor, fps: float = 8.0) -> Path:
    """Writes [F,3,H,W] in [0,1] as H.264 that browsers play; small videos are enlarged."""
    path, frames = Path(path), enlarge(to_uint8(video))
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps), options={"x264-params": REPEATABLE})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


def save_gif(path: str | Path, video: Tensor, fps: float = 8.0) -> Path:
    """Writes [F,3,H,W] in [0,1] as an endless gif."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(f) for f in enlarge(to_uint8(video)))
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return path
