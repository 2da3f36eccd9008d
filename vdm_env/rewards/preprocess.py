"""From video frames to network inputs: resizing presets, each named after the code it reproduces. All differentiable.

"The same" CLIP reward is computed after four different resizings in the literature, and scores differ; so the choice
has a name. Legend: N frames (batch and time folded), pixels in [0,1], networks see (x - mean) / std.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Preprocess = Callable[[Tensor, int], Tensor]
"""frames [N,3,H,W] in [0,1] and the network's side in pixels -> [N,3,side,side], not normalised yet"""


def resize(frames: Tensor, height: int, width: int, mode: str, *, antialias: bool = True) -> Tensor:
    """[N,3,H,W] to [N,3,height,width], anti-aliased, "bilinear" or "bicubic". Half precision gives float32."""
    if frames.shape[-2:] == (height, width):
        return frames
    if frames.dtype in (torch.float16, torch.bfloat16):
        frames = frames.float()  # anti-aliased resizing is not there in half precision on every device
    return F.interpolate(frames, size=(height, width), mode=mode, align_corners=False, antialias=antialias)


def vader_squash(frames: Tensor, side: int = 224) -> Tensor:
    """VADER (VideoCrafter and Open-Sora scripts): bilinear with anti-aliasing straight to a square.

    The aspect is lost.
    """
    return resize(frames, side, side, "bilinear")


def clip_hf(frames: Tensor, side: int = 224) -> Tensor:
    """The CLIP processor of transformers in floating point, as VADER's PickScore does it.

    The short side to `side` (bicubic, anti-aliased), the long side to floor(long * side / short), centre crop. Bicubic
    overshoot is neither clamped nor rounded.
    """
    height, width = frames.shape[-2:]
    if height <= width:
        new_height, new_width = side, width * side // height
    else:
        new_height, new_width = height * side // width, side
    resized = resize(frames, new_height, new_width, "bicubic")
    top, left = new_height // 2 - side // 2, new_width // 2 - side // 2
    return resized[..., top : top + side, left : left + side]


def hpsv2_pad(frames: Tensor, side: int = 224, *, antialias: bool = True) -> Tensor:
    """HPSv2's own scorer: the longest side to `side` (bicubic), zero-padded to a centred square.

    Nothing is cut off or bent. The torchvision of its time resized tensors without anti-aliasing: published scores are
    those of the preset "hpsv2_pad_plain".
    """
    height, width = frames.shape[-2:]
    scale = side / max(height, width)
    new_height, new_width = round(height * scale), round(width * scale)
    resized = resize(frames, new_height, new_width, "bicubic", antialias=antialias)
    pad_y, pad_x = side - new_height, side - new_width
    return F.pad(resized, (pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2))


PRESETS: dict[str, Preprocess] = {
    "vader_squash": vader_squash,
    "clip_hf": clip_hf,
    "hpsv2_pad": hpsv2_pad,
    "hpsv2_pad_plain": partial(hpsv2_pad, antialias=False),
}


def preset(name: str) -> Preprocess:
    """The preset of that name.

    Raises:
        ValueError: no preset is called so.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown pre-processing {name!r}; expected one of {sorted(PRESETS)}")
    return PRESETS[name]


def normalise(frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std by channel, for [..., 3, H, W]; half precision gives float32."""
    frames = frames.float() if frames.dtype in (torch.float16, torch.bfloat16) else frames
    as_channels = [torch.tensor(v, dtype=frames.dtype, device=frames.device).view(3, 1, 1) for v in (mean, std)]
    return (frames - as_channels[0]) / as_channels[1]
