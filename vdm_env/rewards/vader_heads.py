"""VADER's small heads on the unit CLIP image feature: predicted JPEG size, and probability of rain or of snow.

    Compression = -(mean over frames of the predicted size in kB)
    Rainy, Snowy = mean over frames of sigmoid(head(e))

Source: Prabhudesai et al. 2024, arXiv:2407.08737; mihirp1998/VADER, which also tracks the three trained heads in git.
Its losses: the mean predicted size (minimised), and mean |p - 1| for the weather.

Deviation: VADER reports the predicted size itself as the reward of compression, although it minimises it; here the
score is its negative, so that more is better, and `sign=1` gives the published number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from vdm_env.rewards.aesthetic import AestheticHead, head_from
from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.clip import ClipBackbone, frame_features
from vdm_env.rewards.clip_loading import VIT_L, transformers_clip
from vdm_env.rewards.loading import RewardContext, find_files, frozen, load_strictly, published, read_tensors, seeded
from vdm_env.rewards.preprocess import Preprocess, vader_squash
from vdm_env.rewards.tensors import at_least_float32

_REPOSITORY = "mihirp1998/VADER"
FILES = {"Compression": "compression_reward.pt", "Rainy": "rainy_reward.pt", "Snowy": "snowy_reward.pt"}
_COMPRESSION_WIDTHS = (512, 256, 128, 32)
_WEATHER_WIDTHS = (1024, 128, 64, 16)
_TINY_WIDTHS = (32, 16, 8, 4)


class CompressionHead(nn.Module):
    """[..., width] unit features to [...] kB; names as in the released file (layers.0, 3, 6, 9, 12)."""

    def __init__(self, width: int = 768, hidden: Sequence[int] = _COMPRESSION_WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((width, *hidden[:-1]), hidden, strict=True):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(0.1)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.to(next(self.parameters()).dtype)).squeeze(-1)


class ClipHeadReward:
    """Mean over frames of sign * head(unit image feature), or of its sigmoid. The prompt does not matter.

    Args:
        backbone: the image tower.
        head: unit features [B,F,D] to [B,F].
        name: as it is called in logs.
        sign: -1 turns a cost into a score.
        sigmoid: whether the head gives logits of a probability.
        preprocess: resizing, see `preprocess.py`.
        frames: frame policy.
        chunk_size: images the network sees at a time; None: all.

    Raises:
        ValueError: sign is neither 1 nor -1.
    """

    differentiable = True

    def __init__(
        self,
        backbone: ClipBackbone,
        head: nn.Module,
        *,
        name: str,
        sign: int = 1,
        sigmoid: bool = False,
        preprocess: Preprocess = vader_squash,
        frames: FramePolicy = "all",
        chunk_size: int | None = None,
    ) -> None:
        if sign not in (-1, 1):
            raise ValueError(f"sign={sign}: expected 1 or -1")
        self.backbone, self.head, self.name = backbone, head.eval(), name
        self.sign, self.sigmoid, self.preprocess = sign, sigmoid, preprocess
        self.frames, self.chunk_size = frames, chunk_size
        low, high = (0.0, 1.0) if sigmoid else (-math.inf, math.inf)
        self.range: tuple[float, float] = (low, high) if sign > 0 else (-high, -low)

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        output = at_least_float32(self.head(frame_features(self.backbone, video, self.preprocess, self.chunk_size)))
        return self.sign * (output.sigmoid() if self.sigmoid else output).mean(1)


def compression(backbone: ClipBackbone, head: nn.Module, *, sign: int = -1, **options: Any) -> ClipHeadReward:
    """Minus the predicted size of the frames as JPEG files, in kB; `sign=1`: the size."""
    return ClipHeadReward(backbone, head, name="Compression", sign=sign, **options)


def weather(
    backbone: ClipBackbone, head: nn.Module, *, name: Literal["Rainy", "Snowy"] = "Rainy", **options: Any
) -> ClipHeadReward:
    """Probability in [0,1] that a frame shows rain, or snow."""
    return ClipHeadReward(backbone, head, name=name, sigmoid=True, **options)


def compression_from(tensors: dict[str, Any], path: Any) -> CompressionHead:
    """The head whose widths the stored tensors have.

    Raises:
        CorruptWeightsError: the tensors are not such a head's.
    """
    widths = [tensors[k].shape[0] for k in (f"layers.{i}.weight" for i in (0, 3, 6, 9)) if k in tensors]
    first = tensors.get("layers.0.weight")
    head = CompressionHead(first.shape[1], widths) if len(widths) == 4 and first is not None else CompressionHead()
    load_strictly(head, {k: v.float() for k, v in tensors.items()}, path)
    return head


def _build(context: RewardContext, name: Literal["Compression", "Rainy", "Snowy"]) -> ClipHeadReward:
    context = published(context)
    backbone = transformers_clip(context, name, "openai/clip-vit-large-patch14", VIT_L)
    head: nn.Module
    if context.weights == "random":
        width = VIT_L["projection_dim"]
        tiny = context.scale == "tiny"
        with seeded(context.seed + 1):
            if name == "Compression":
                head = CompressionHead(width, _TINY_WIDTHS if tiny else _COMPRESSION_WIDTHS)
            else:
                head = AestheticHead(width, _TINY_WIDTHS if tiny else _WEATHER_WIDTHS)
    else:
        (path,) = find_files(context, name, _REPOSITORY, [FILES[name]])
        head = (compression_from if name == "Compression" else head_from)(read_tensors(path), path)
    head = frozen(head, context)
    return compression(backbone, head) if name == "Compression" else weather(backbone, head, name=name)


def build_compression(context: RewardContext) -> ClipHeadReward:
    """CLIP ViT-L/14 and VADER's compression head; a differentiable stand-in for the JPEG size."""
    return _build(context, "Compression")


def build_rainy(context: RewardContext) -> ClipHeadReward:
    """CLIP ViT-L/14 and VADER's rain head."""
    return _build(context, "Rainy")


def build_snowy(context: RewardContext) -> ClipHeadReward:
    """CLIP ViT-L/14 and VADER's snow head."""
    return _build(context, "Snowy")
