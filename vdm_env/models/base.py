"""What a video diffusion model is to the environment: a spec, a network, a schedule, a codec and a text encoder.

A model is any object with the attributes and methods of `VideoModel`; nothing needs to be subclassed. The adapters of
this folder build such objects from diffusers and transformers classes through `LatentVideoModel`.

Legend: B videos, C latent channels, F latent frames, H W latent rows and columns, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vdm_env.models.codec import FrameCodec, tile_decoding
from vdm_env.models.visiting import visiting
from vdm_env.schedule import Schedule

Condition = dict[str, Tensor]
"""Tensors the network is conditioned on, each batched on dimension 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Facts about a model; sizes in pixels and frames, defaults as in the model's paper or release."""

    name: str
    """name in environment ids"""
    height: int
    width: int
    num_frames: int
    spatial_stride: int
    """pixels a latent cell covers in each direction"""
    temporal_stride: int = 1
    """video frames a latent frame covers"""
    latent_channels: int = 4
    max_frames: int | None = None
    """most frames that the release is made for, or that the network's positions reach; None: no limit is known"""
    max_side: int | None = None
    """longest height and width that the network's positions reach; None: no limit is known"""
    size_multiple: int = 1
    """height and width must be multiples of this (at least `spatial_stride`)"""
    num_steps: int = 50
    sampler: str = "ddim"
    noise_level: float = 1.0
    """eta of DDIM, a of the flow SDEs"""
    guidance_scale: float = 1.0
    """classifier-free guidance w; 1 is none"""
    fps: float = 8.0
    """frames a second of the decoded video, for playing"""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """names of the linear layers that get a LoRA by default"""
    world: str | None = None
    """the embedded world whose small reward models and gold score belong to this model, if any"""
    conditioned_on: str = "text"
    """"text", or "image": then the model has `encode_images(images, noise)` beside `encode_prompts`, see `svd.py`"""

    def __post_init__(self) -> None:
        if self.conditioned_on not in ("text", "image"):
            raise ValueError(f"{self.name}: conditioned_on={self.conditioned_on!r}; expected 'text' or 'image'")


@runtime_checkable
class VideoModel(Protocol):
    """The contract; `vdm_env.check_model` tests it."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def denoiser(self) -> nn.Module:
        """The network that is aligned; LoRA goes in here."""

    @property
    def schedule(self) -> Schedule: ...

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Network output [B,C,F,H,W] at latents x_t [B,C,F,H,W] and timesteps t [B], each video at its own t."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Conditions of B prompts; "" is the unconditional one."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """Latents [B,C,F',h,w] of a video [B,F,3,H,W] in [0,1]."""
        ...

    def decode(self, latents: Tensor, frames: Tensor | None = None) -> Tensor:
        """Video [B,F,3,H,W] in [0,1]; `frames` [B,n] int64 picks each video's frames (all if None)."""
        ...

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents of such a video; raises ValueError where the model cannot make it."""
        ...


TINY_STEPS = 4
"""Denoising steps of a shrunken model by default: enough for both networks of Wan 2.2 to have their turn."""


def tiny_spec(spec: ModelSpec, num_frames: int, height: int, width: int) -> ModelSpec:
    """The spec of a shrunken model: such videos by default, and few steps; what else the release is stays."""
    steps = min(spec.num_steps, TINY_STEPS)
    return replace(spec, num_frames=num_frames, height=height, width=width, num_steps=steps)


def check_frames(spec: ModelSpec, num_frames: int) -> None:
    """Refuses more frames than the model is made for.

    Raises:
        ValueError: it is more than `spec.max_frames`.
    """
    if spec.max_frames is not None and num_frames > spec.max_frames:
        raise ValueError(
            f"{spec.name}: num_frames={num_frames} is more than the {spec.max_frames} frames that it is made for; try "
            f"num_frames={spec.max_frames}, or give a model object whose spec has another max_frames (None: no limit)"
        )


def latent_shape(spec: ModelSpec, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(C, F, H, W) for models whose strides divide the size.

    Raises:
        ValueError: a size that is not a positive multiple of the model's strides, or too many frames.
    """
    check_frames(spec, num_frames)
    multiple = max(spec.size_multiple, spec.spatial_stride)
    for name, value in (("height", height), ("width", width)):
        if value <= 0 or value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise ValueError(f"{spec.name}: {name}={value} is not a positive multiple of {multiple}; try {name}={near}")
        if spec.max_side is not None and value > spec.max_side:
            raise ValueError(
                f"{spec.name}: {name}={value}, but its positions reach {spec.max_side} pixels; "
                f"try {name}={spec.max_side}"
            )
    if num_frames <= 0 or (num_frames - 1) % spec.temporal_stride:
        stride = spec.temporal_stride
        near = max(0, round((num_frames - 1) / stride)) * stride + 1
        raise ValueError(
            f"{spec.name}: num_frames={num_frames} is not 1 plus a multiple of {stride}; try num_frames={near}"
            if num_frames > 0
            else f"{spec.name}: num_frames={num_frames}; at least one frame is needed"
        )
    frames = (num_frames - 1) // spec.temporal_stride + 1
    return spec.latent_channels, frames, height // spec.spatial_stride, width // spec.spatial_stride


@dataclass(frozen=True, kw_only=True)
class TokenTextEncoder:
    """A transformers text encoder and a function from texts to token ids.

    Every prompt is embedded once by the environment, which keeps the result.
    """

    encoder: Any
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device | None = None
    """where it runs; it rests in main memory otherwise. None: it stays where it is"""

    def visit(self) -> AbstractContextManager[None]:
        """Inside, the encoder stays on the device from one call to the next."""
        return nullcontext() if self.device is None else visiting(self.encoder, self.device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Condition:
        ids = self.tokenize(list(prompts))
        with self.visit():
            return {"text": self.encoder(ids.to(self.encoder.device)).last_hidden_state}


@dataclass(frozen=True, kw_only=True)
class LatentVideoModel:
    """A `VideoModel` put together from parts; `call` runs the network in its own conventions and returns ours."""

    spec: ModelSpec
    denoiser: nn.Module
    schedule: Schedule
    codec: FrameCodec
    text: TokenTextEncoder
    call: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.call(self.denoiser, x_t, t, condition)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return self.text(prompts)

    def embedding(self) -> AbstractContextManager[None]:
        """Inside, several `encode_prompts` move the text encoder to its device and back only once."""
        return embedding(self.text)

    def tile_decoding(self, on: bool = True) -> None:
        """Encodes and decodes large pictures in overlapping tiles: less memory, slightly other pixels at the seams."""
        tile_decoding(self.codec.vae, on)

    def encode(self, video: Tensor) -> Tensor:
        return self.codec.encode(video)

    def decode(self, latents: Tensor, frames: Tensor | None = None) -> Tensor:
        return self.codec.decode(latents, frames)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return latent_shape(self.spec, num_frames, height, width)


def embedding(text: Any) -> AbstractContextManager[None]:
    """The visit of a text encoder that rests in main memory; nothing where it has none."""
    visit = getattr(text, "visit", None)
    return nullcontext() if visit is None else visit()


def frozen(module: nn.Module) -> nn.Module:
    """In eval mode and without gradients to its parameters: dropout would make log-probabilities noisy.

    (`UNet3DConditionModel` has dropout hard-wired in its temporal layers.)
    """
    return module.eval().requires_grad_(False)
