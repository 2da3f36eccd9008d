"""The parts of DEVIL's dynamics that need no network: likeness and hashes of neighbouring frames, and what time costs.

Source: DEVIL (Liao et al. 2024, arXiv:2407.01094), MingXiangL/DEVIL. For evaluation: only `ssim` has gradients.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vdm_env.metrics.devil import Mode, check_mode
from vdm_env.metrics.temporal import check_video
from vdm_env.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalise
from vdm_env.rewards.tensors import at_least_float32
from vdm_env.video import to_uint8

WINDOW_PX, SIGMA_PX = 11, 1.5
HASH_SIDE, _HASH_INPUT_PX = 8, 32
ENTROPY_SIDE_PX, BLUR_PX = 128, 5.0
_X264 = (
    "no-psy=1:aq-mode=1:aq-strength=1.0:rc-lookahead=40:bframes=3:me=umh:subme=9:partitions=all:ref=5:b-adapt=2:"
    "direct=auto:trellis=2:seed=1"
)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity of images [N,C,H,W] in [0,1], mean over channels and places: [N] in [-1,1]; 1 if equal.

    Gaussian window of 11 pixels and deviation 1.5, only where it fits into the image; constants 0.01 and 0.03.

    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861, equation 13.

    Raises:
        ValueError: shapes that differ, or sides below 11 pixels.
    """
    if first.ndim != 4 or first.shape != second.shape or min(first.shape[-2:]) < WINDOW_PX:
        raise ValueError(
            f"images {tuple(first.shape)} and {tuple(second.shape)}: expected two of one shape [N,C,H,W], with sides "
            f"of at least {WINDOW_PX} pixels"
        )
    first, second = at_least_float32(first), at_least_float32(second)
    place = torch.arange(WINDOW_PX, dtype=first.dtype, device=first.device) - WINDOW_PX // 2
    window = torch.exp(-place.square() / (2 * SIGMA_PX**2))
    window = window / window.sum()

    def local_mean(images: Tensor) -> Tensor:
        flat = images.flatten(0, 1)[:, None]
        flat = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return flat.view(*images.shape[:2], *flat.shape[-2:])

    mean1, mean2 = local_mean(first), local_mean(second)
    var1, var2 = local_mean(first.square()) - mean1.square(), local_mean(second.square()) - mean2.square()
    cov = local_mean(first * second) - mean1 * mean2
    light = (2 * mean1 * mean2 + 0.01**2) / (mean1.square() + mean2.square() + 0.01**2)
    return (light * (2 * cov + 0.03**2) / (var1 + var2 + 0.03**2)).mean((1, 2, 3))


def frame_similarity(video: Tensor, *, mode: Mode = "corrected") -> Tensor:
    """Mean `ssim` of neighbouring frames: [B,F,3,H,W] in [0,1], F >= 2 -> [B].

    "devil" compares frames from which ImageNet's mean and deviation were taken, cut off at 0 and 1, as its code does.

    Raises:
        ValueError: another shape.
    """
    check_mode(mode)
    check_video(video, 2)
    frames = normalise(video, IMAGENET_MEAN, IMAGENET_STD).clamp(0, 1) if mode == "devil" else video
    found = ssim(frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1))
    return found.unflatten(0, (len(video), -1)).mean(1)


def perceptual_hash(frames: Tensor) -> Tensor:
    """64 bits a frame that stay when a picture changes little: [N,3,H,W] in [0,1] -> bool [N,8,8].

    Grey, 32 x 32 pixels (Lanczos), cosine transform, the 8 x 8 slowest: which of them are above their median. Equal to
    the `phash` of the package imagehash.
    """
    grey = [
        np.asarray(
            Image.fromarray(f).convert("L").resize((_HASH_INPUT_PX,) * 2, Image.Resampling.LANCZOS), dtype=np.float64
        )
        for f in to_uint8(frames)
    ]
    slow = scipy.fft.dctn(np.stack(grey), axes=(1, 2))[:, :HASH_SIDE, :HASH_SIDE]
    return torch.from_numpy(slow > np.median(slow, axis=(1, 2), keepdims=True))


def hash_distance(video: Tensor) -> Tensor:
    """Mean number of bits in which the hashes of neighbouring frames differ: [B,F,3,H,W], F >= 2 -> [B] in [0,64].

    Raises:
        ValueError: another shape.
    """
    check_video(video, 2)
    hashes = perceptual_hash(video.flatten(0, 1)).unflatten(0, video.shape[:2])
    return (hashes[:, 1:] != hashes[:, :-1]).sum((2, 3)).float().mean(1).to(video.device)


def temporal_entropy(video: Tensor, *, fps: float = 8.0) -> Tensor:
    """How much more an encoder needs for a video than for its pictures, in bytes: [B,F,3,H,W] in [0,1] -> [B].

        entropy = video + video of the key frames - sum of the key frames alone - first frame alone

    sizes of H.264 files, after the video was made 128 x 128 pixels and blurred (sigma 5), so that what counts is how
    much changes and not how finely. A still picture has a few hundred, of the file's tables. One thread and a fixed
    seed: the same video has the same entropy, with the same version of the encoder.

    Args:
        video: F >= 1; the published code has files instead, of whatever length.
        fps: frames a second, which the encoder's choice of qualities depends on.

    Raises:
        ValueError: another shape, or fps not above 0.
    """
    check_video(video, 1)
    if not fps > 0:
        raise ValueError(f"fps is {fps}, expected a number above 0")
    rate = Fraction(fps).limit_denominator(1000)
    return torch.tensor([_entropy(to_uint8(one), rate) for one in video], dtype=torch.float32, device=video.device)


def _entropy(frames: np.ndarray, rate: Fraction) -> float:
    """Of uint8 [F,H,W,3]. Each step encodes and decodes, as the published script's files do."""
    given = [av.VideoFrame.from_ndarray(np.ascontiguousarray(f), format="rgb24") for f in frames]
    small = _filtered([f.reformat(format="yuv420p") for f in given], "scale", f"{ENTROPY_SIDE_PX}:{ENTROPY_SIDE_PX}")
    small = _decoded(_encoded(small, rate, len(given)))
    blurred = _decoded(_encoded(_filtered(small, "gblur", f"sigma={BLUR_PX}"), rate, len(given)))
    content = _encoded(blurred, rate, len(given))
    # Pictures on their own are kept in full colour, as an encoder is handed them from picture files.
    pictures = [(f.reformat(format="rgb24"), f.pict_type == av.video.frame.PictureType.I) for f in _decoded(content)]
    keys = [picture for picture, key in pictures if key]
    alone = [len(_encoded([picture], rate, 1, "yuv444p")) for picture in keys]
    first = len(_encoded([pictures[0][0]], rate, 1, "yuv444p"))
    return float(len(content) + len(_encoded(keys, rate, len(keys), "yuv444p")) - sum(alone) - first)


def _encoded(frames: Sequence[Any], rate: Fraction, distance: int, pixels: str = "yuv420p") -> bytes:
    """An H.264 file whose key frames are at most `distance` apart."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=rate, options={"x264-params": _X264})
        stream.height, stream.width, stream.pix_fmt = frames[0].height, frames[0].width, pixels
        stream.codec_context.gop_size, stream.codec_context.thread_count = distance, 1
        for i, frame in enumerate(frames):
            picture = frame.reformat(format=pixels)
            picture.pts, picture.time_base, picture.pict_type = i, 1 / rate, av.video.frame.PictureType.NONE
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def _decoded(content: bytes) -> list[Any]:
    with av.open(io.BytesIO(content), "r") as container:
        return list(container.decode(video=0))


def _filtered(frames: Sequence[Any], name: str, options: str) -> list[Any]:
    graph = av.filter.Graph()
    first = frames[0]
    source = graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=Fraction(1, 1000))
    step, sink = graph.add(name, options), graph.add("buffersink")
    source.link_to(step)
    step.link_to(sink)
    graph.configure()
    found = []
    for i, frame in enumerate(frames):
        frame.pts = i
        graph.push(frame)
        found.append(graph.pull())
    return found
