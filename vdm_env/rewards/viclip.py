"""ViCLIP: cosine of a whole video and its prompt, in a joint embedding learned from video-text pairs.

    score_i = cos(video(frames of i), text(prompt_i))

A CLIP whose image tower attends jointly over the patches of eight frames, with a position table for time beside the one
for space. The blocks of both towers are open_clip's. Legend: B videos, T frames, P patches of a frame, D embedding.

Source: Wang et al. 2023, arXiv:2307.06942 (InternVid); OpenGVLab/InternVideo (names of parameters, sizes). VADER
(arXiv:2407.08737) reports a ViCLIP reward; its code is not public, and the plain cosine is the form chosen here.

Two pre-processings are in use: that of VBench (the default), short side bicubic without anti-aliasing, centre crop,
CLIP mean and deviation; and that of InternVid's demo, squashed bilinear without anti-aliasing, ImageNet mean and
deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm_env.errors import CorruptWeightsError
from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.loading import (
    RewardContext,
    as_tensors,
    find_files,
    frozen,
    load_strictly,
    published,
    read_checkpoint,
    seeded,
    warn_random,
)
from vdm_env.rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocess, normalise
from vdm_env.rewards.tensors import at_least_float32, check_enough_frames, fit_frames, in_chunks

NAME = "ViCLIP"
FILE = "ViClip-InternVid-10M-FLT.pth"
_REPOSITORY = "OpenGVLab/ViCLIP"


@dataclass(frozen=True, kw_only=True, slots=True)
class ViClipConfig:
    """Sizes; the defaults are those of ViCLIP-L/14."""

    image_size: int = 224
    patch_size: int = 14
    num_frames: int = 8
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    embed_dim: int = 768
    context_length: int = 32
    vocab_size: int = 49408
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12

    def __post_init__(self) -> None:
        for part, whole in (
            ("patch_size", "image_size"),
            ("vision_heads", "vision_width"),
            ("text_heads", "text_width"),
        ):
            if getattr(self, part) < 1 or getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole}={getattr(self, whole)} is no multiple of {part}={getattr(self, part)}")


FULL = ViClipConfig()
TINY = ViClipConfig(
    image_size=32,
    patch_size=8,
    num_frames=4,
    vision_width=32,
    vision_layers=2,
    vision_heads=2,
    embed_dim=32,
    text_width=32,
    text_layers=2,
    text_heads=2,
)


class _VideoTower(nn.Module):
    """[B,T,3,S,S] to [B,D], not of unit length; T is the configured number of frames, or 1."""

    def __init__(self, config: ViClipConfig) -> None:
        from open_clip.transformer import LayerNorm, QuickGELU, Transformer

        super().__init__()
        width, size = config.vision_width, (1, config.patch_size, config.patch_size)
        patches = (config.image_size // config.patch_size) ** 2
        scale = width**-0.5
        self.conv1 = nn.Conv3d(3, width, size, stride=size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(patches + 1, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, config.num_frames, width))
        self.ln_pre = LayerNorm(width)
        self.transformer: Any = Transformer(
            width, config.vision_layers, config.vision_heads, act_layer=QuickGELU, norm_layer=LayerNorm
        )
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels.transpose(1, 2).to(self.proj.dtype)).flatten(3).permute(0, 3, 2, 1)  # [B,P,T,width]
        table = self.temporal_positional_embedding
        # A single frame stands for the whole clip: it gets the mean of the table.
        time = table.mean(1, keepdim=True) if x.shape[2] == 1 else table
        x = (x + self.positional_embedding[1:, None] + time).flatten(1, 2)
        first = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = self.transformer(self.ln_pre(torch.cat([first, x], 1)))
        return self.ln_post(x[:, 0]) @ self.proj


class ViClip(nn.Module):
    """Both towers; parameters named as in the release."""

    def __init__(self, config: ViClipConfig = FULL) -> None:
        from open_clip.transformer import QuickGELU, TextTransformer

        super().__init__()
        self.config = config
        self.vision_encoder = _VideoTower(config)
        self.text_encoder: Any = TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.text_width,
            heads=config.text_heads,
            layers=config.text_layers,
            output_dim=config.embed_dim,
            act_layer=QuickGELU,
        )
        self.temp = nn.Parameter(torch.tensor(0.01))  # of training; a cosine does without

    def video_features(self, pixels: Tensor) -> Tensor:
        """[B,T,3,S,S], normalised, to [B,D], not of unit length."""
        return self.vision_encoder(pixels)

    def text_features(self, tokens: Tensor) -> Tensor:
        """[B,context_length] to [B,D], not of unit length; the state at the largest token, which ends a text."""
        return self.text_encoder(tokens)


class Preset(NamedTuple):
    """How frames become inputs."""

    resize: Preprocess
    mean: tuple[float, ...]
    std: tuple[float, ...]


def short_side_crop(frames: Tensor, side: int) -> Tensor:
    """The short side to `side`, bicubic without anti-aliasing, then a centre crop, as VBench prepares it."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    size = (height * side // short, width * side // short)
    resized = F.interpolate(at_least_float32(frames), size=size, mode="bicubic", align_corners=False, antialias=False)
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return resized[..., top : top + side, left : left + side]


def plain_squash(frames: Tensor, side: int) -> Tensor:
    """Bilinear without anti-aliasing straight to a square, as InternVid's demo prepares it (there on 8-bit pixels)."""
    frames = at_least_float32(frames)
    return F.interpolate(frames, size=(side, side), mode="bilinear", align_corners=False, antialias=False)


PRESETS: dict[str, Preset] = {
    "vbench": Preset(short_side_crop, CLIP_MEAN, CLIP_STD),
    "internvid": Preset(plain_squash, IMAGENET_MEAN, IMAGENET_STD),
}


class ViClipReward:
    """Cosine of video and prompt, in [-1,1]; a single frame is scored as a still, more are thinned out evenly.

    Args:
        model: both towers.
        tokenizer: texts to int64 [B,context_length].
        preset: "vbench" or "internvid", see the head of this file.
        chunk_size: videos the network sees at a time; None: all.

    Raises:
        ValueError: an unknown preset.
    """

    differentiable = True
    name = NAME
    range = (-1.0, 1.0)

    def __init__(
        self,
        model: ViClip,
        tokenizer: Callable[[Sequence[str]], Tensor],
        *,
        preset: Literal["vbench", "internvid"] = "vbench",
        chunk_size: int | None = None,
    ) -> None:
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is unknown; expected one of {sorted(PRESETS)}")
        self.model, self.tokenizer, self.preset, self.chunk_size = model, tokenizer, PRESETS[preset], chunk_size
        self.frames: FramePolicy = f"middle{model.config.num_frames}"

    def check_num_frames(self, count: int) -> None:
        """Raises ValueError for fewer frames than the network takes, except for one, which is a still."""
        if count != 1:
            check_enough_frames(count, self.model.config.num_frames, self.name)

    def _features(self, video: Tensor) -> Tensor:
        frames = self.preset.resize(video.flatten(0, 1), self.model.config.image_size)
        pixels = normalise(frames, self.preset.mean, self.preset.std).unflatten(0, video.shape[:2])
        return unit(self.model.video_features(pixels))

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        if video.shape[1] != 1:
            video = fit_frames(video, self.model.config.num_frames, self.name)
        features = in_chunks(self._features, video, size=self.chunk_size)
        # Groups share a prompt: each different text is encoded once.
        different = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        with torch.no_grad():
            tokens = self.tokenizer(list(different)).to(video.device)
            text = unit(self.model.text_features(tokens))[[different[p] for p in prompts]]
        return (features * text).sum(-1).clamp(-1, 1)


def unit(features: Tensor) -> Tensor:
    """Of unit length, in float32 or better."""
    return F.normalize(at_least_float32(features), dim=-1)


def viclip_from(tensors: dict[str, Tensor], config: ViClipConfig, path: Any) -> ViClip:
    """The network with the released weights.

    Raises:
        CorruptWeightsError: a tensor or a shape is missing or too much.
    """
    model = ViClip(config)
    load_strictly(model, {k: v.float() for k, v in tensors.items()}, path)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    content = read_checkpoint(path)
    if not isinstance(content, dict) or "model" not in content:
        raise CorruptWeightsError(f"{path} has no entry 'model', under which ViCLIP is released; fetch the file again")
    return as_tensors(content["model"], path)


def build_viclip(context: RewardContext) -> ViClipReward:
    """ViCLIP-L/14 trained on InternVid-10M-FLT (hub OpenGVLab/ViCLIP)."""
    import open_clip

    context = published(context)
    config = TINY if context.scale == "tiny" else FULL
    if context.weights == "pretrained":
        (path,) = find_files(context, NAME, _REPOSITORY, [FILE])
        with seeded(context.seed):
            model = viclip_from(_read(path), config, path)
    else:
        warn_random(NAME)
        with seeded(context.seed):
            model = ViClip(config)
    tokenizer = open_clip.SimpleTokenizer(context_length=config.context_length)
    return ViClipReward(frozen(model, context), tokenizer)
