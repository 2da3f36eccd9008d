"""Open-Sora 1.2: STDiT3 with rectified flow, a spatial and a temporal autoencoder, T5-XXL.

The network emits x0 - eps; here the sign is turned, so that actions are eps - x0 as everywhere in this package. Three
things depend on the size of the video that is asked for: the noise grid (its shift), the network's positions and the
number of decoded frames. A model is therefore made for one size, and `with_size` gives another on the same networks.

Deviation: the release's script holds height, width and frames in bfloat16, which moves its timesteps by up to 0.5 of
1000; here they are in float32.

Legend: B videos, C latent channels, F latent frames, H W latent rows and columns, L text tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vdm_env.models.base import Condition, ModelSpec, check_frames, embedding, frozen, tiny_spec
from vdm_env.models.codec import tile_decoding
from vdm_env.models.opensora_vae import SPATIAL_STRIDE, OpenSoraVAE, TemporalVAEConfig, VideoVAEConfig
from vdm_env.models.opensora_weights import NAME, T5Text, byte_tokenizer, find_release, read_stdit3, read_text, read_vae
from vdm_env.models.parts import random_t5
from vdm_env.models.stdit3 import STDiT3, STDiT3Config, exact
from vdm_env.models.untrained import seeded
from vdm_env.models.visiting import resting_place
from vdm_env.schedule import FlowSchedule, opensora_shift

MIN_FRAMES, MAX_FRAMES = 17, 408
"""One chunk of the autoencoder (below it the noise grid is not defined) to 16 seconds, the longest of training."""
OPENSORA12 = ModelSpec(
    name=NAME,
    height=240,
    width=426,
    num_frames=51,
    spatial_stride=SPATIAL_STRIDE,
    temporal_stride=4,
    max_frames=MAX_FRAMES,
    size_multiple=SPATIAL_STRIDE,
    num_steps=30,
    sampler="flow_grpo",
    noise_level=0.7,
    guidance_scale=7.0,
    fps=24.0,
    lora_targets=("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"),
)
"""The release at 240p, 9:16, two seconds; VADER's and the release's script sample with `sampler="flow_ode"`."""

NOMINAL_SIZES = (426, 854)
"""Sides of 240p and 480p in 16:9 that no 8 divides; the decoded side is 424 and 848."""
IMAGE_FPS = 120.0
"""What the release conditions single frames on."""


# --------------------------------------------------------------------------------------------------------- the model


def call_stdit3(
    denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, fps: float, height: float, width: float
) -> Tensor:
    """Flow eps - x0 [B,C,F,H,W] at latents x_t and t [B] in [0, 1000].

    Args:
        denoiser: an `STDiT3`.
        x_t: latents [B,C,F,H,W].
        t: timesteps [B], 1000 being pure noise.
        condition: `text` [B,L,D], `mask` [B,L], and optionally `x_mask` [B,F], False on frames that are given clean.
        fps: frames a second.
        height: of the video in pixels, as asked for.
        width: likewise.
    """
    size = {"fps": fps, "height": height, "width": width, "x_mask": condition.get("x_mask")}
    velocity = denoiser(x_t, t, condition["text"], condition["mask"], **size)
    return -velocity[:, : x_t.shape[1]].to(x_t.dtype)


def release_schedule(num_frames: int, height: int, width: int) -> FlowSchedule:
    """Rectified flow with the release's shift for videos of this size (pixels)."""
    return FlowSchedule(shift=opensora_shift(height, width, num_frames, dtype=torch.float32))


@dataclass(frozen=True, kw_only=True)
class OpenSoraModel:
    """A `VideoModel` for videos of the spec's size."""

    spec: ModelSpec
    denoiser: nn.Module
    schedule: FlowSchedule
    vae: OpenSoraVAE
    text: T5Text

    def with_size(self, num_frames: int, height: int, width: int) -> OpenSoraModel:
        """The same networks for videos of another size, in frames and pixels.

        Raises:
            ValueError: a size the model cannot make.
        """
        self.latent_shape(num_frames, height, width)
        spec = replace(self.spec, num_frames=num_frames, height=height, width=width)
        return replace(self, spec=spec, schedule=release_schedule(num_frames, height, width))

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        spec = self.spec
        expected = self.latent_shape(spec.num_frames, spec.height, spec.width)
        if tuple(x_t.shape[1:]) != expected:
            raise ValueError(
                f"{spec.name} was made for {spec.num_frames} frames of {spec.height}x{spec.width}, latents {expected}; "
                f"got {tuple(x_t.shape[1:])}. Its noise grid and positions depend on the size: call "
                "model.with_size(num_frames, height, width)"
            )
        fps = IMAGE_FPS if spec.num_frames == 1 else spec.fps
        return call_stdit3(self.denoiser, x_t, t, condition, fps=fps, height=spec.height, width=spec.width)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """T5 states `text` [B,L,D] and `mask` [B,L]; "" is the null caption at full length, see `unconditional`."""
        null = self._null_caption()
        text = null.expand(len(prompts), -1, -1).clone()
        mask = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
        rows = [row for row, prompt in enumerate(prompts) if prompt]
        if rows:
            encoded = self.text([prompts[row] for row in rows])
            text[rows], mask[rows] = encoded["text"].to(text), encoded["mask"].to(mask)
        return {"text": text, "mask": mask}

    def embedding(self) -> AbstractContextManager[None]:
        """Inside, several `encode_prompts` move the text encoder to its device and back only once."""
        return embedding(self.text)

    def tile_decoding(self, on: bool = True) -> None:
        """The spatial stage works on large pictures in overlapping tiles: less memory, other pixels at the seams."""
        tile_decoding(self.vae.spatial_vae["module"], on)

    def unconditional(self, condition: Condition) -> Condition:
        """What guidance contrasts these with: the null caption, under each prompt's mask as in the release."""
        return {**condition, "text": self._null_caption().to(condition["text"]).expand_as(condition["text"])}

    def _null_caption(self) -> Tensor:
        return self.denoiser.y_embedder.y_embedding[None]  # type: ignore[union-attr, index, return-value]

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Latents [B,C,F,H,W] of a video [B,F,3,H,W] in [0,1] (the posteriors' means)."""
        latents = self.vae.encode(video.transpose(1, 2) * 2 - 1)
        return latents.to(exact(latents.dtype))

    def decode(self, latents: Tensor, frames: Tensor | None = None) -> Tensor:
        """Video [B,n,3,H,W] in [0,1].

        With `frames` [B,n] the spatial stage runs on these alone, and the temporal stage on their chunks.
        """
        needed = None if frames is None else sorted({int(i) for i in frames.flatten()})
        cells = self.vae.temporal_decode(latents, self.spec.num_frames, needed)
        if frames is not None:
            rows = torch.arange(len(cells), device=cells.device)[:, None]
            cells = cells.transpose(1, 2)[rows, frames.to(cells.device)].transpose(1, 2)
        video = self.vae.spatial_decode(cells).transpose(1, 2)
        return (video.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W).

        Raises:
            ValueError: sides that are neither a multiple of 8 nor nominal (426, 854), or frames that are not 1 or 17
                to 408.
        """
        name = self.spec.name
        for side, value in (("height", height), ("width", width)):
            if value <= 0 or (value % SPATIAL_STRIDE and value not in NOMINAL_SIZES):
                near = max(SPATIAL_STRIDE, round(value / SPATIAL_STRIDE) * SPATIAL_STRIDE)
                raise ValueError(
                    f"{name}: {side}={value} is neither a positive multiple of {SPATIAL_STRIDE} nor one of the "
                    f"release's {NOMINAL_SIZES}; try {side}={near}"
                )
        check_frames(self.spec, num_frames)
        if num_frames != 1 and num_frames < MIN_FRAMES:
            raise ValueError(
                f"{name}: num_frames={num_frames}; it makes a single frame or {MIN_FRAMES} to {MAX_FRAMES}; "
                f"try num_frames={MIN_FRAMES}"
            )
        return self.spec.latent_channels, *self.vae.config.latent_size(num_frames, height, width)


# ------------------------------------------------------------------------------------------------------------ loading


def load(
    spec: ModelSpec = OPENSORA12,
    *,
    weights: str,
    scale: str,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
) -> OpenSoraModel:
    """Open-Sora 1.2 for videos of the spec's size.

    Args:
        spec: `OPENSORA12`, or the same with another size.
        weights: "pretrained", or "random" for the architecture untrained, with bytes for tokens.
        scale: with random weights, "tiny" shrinks the networks and the default size (17 frames of 48x64).
        device: of all networks.
        dtype: of all networks; angles and norms stay float32 or better.
        seed: of random weights.

    Raises:
        MissingWeightsError: pretrained weights that are not on this machine.
        CorruptWeightsError: weights that cannot be read or are not this architecture's.
    """
    device = torch.device(device)
    if weights == "pretrained":
        denoiser, vae, text = _pretrained(device, dtype)
    else:
        warnings.warn(
            f"{spec.name} has random weights: use it for tests, speed and memory, not for results", stacklevel=3
        )
        if scale == "tiny" and spec == OPENSORA12:
            spec = tiny_spec(spec, 17, 48, 64)
        with seeded(seed, device, dtype):
            denoiser, vae, text = _random(scale == "tiny", device)
        _place(denoiser, vae, device, dtype)
        text.encoder.to(resting_place(device), dtype)
    frozen(text.encoder)
    model = OpenSoraModel(
        spec=spec,
        denoiser=frozen(denoiser),
        schedule=release_schedule(spec.num_frames, spec.height, spec.width),
        vae=frozen(vae),  # type: ignore[arg-type]
        text=text,
    )
    return model.with_size(spec.num_frames, spec.height, spec.width)


def _random(tiny: bool, device: torch.device) -> tuple[STDiT3, OpenSoraVAE, T5Text]:
    config, vae = STDiT3Config(), VideoVAEConfig()
    if tiny:
        config = STDiT3Config(hidden_size=32, depth=1, num_heads=2, caption_channels=16, model_max_length=48)
        vae = VideoVAEConfig(
            temporal=TemporalVAEConfig(filters=8, num_res_blocks=1, num_groups=4),
            spatial={**vae.spatial, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
        )
    text = T5Text(encoder=random_t5(tiny), tokenize=byte_tokenizer(config.model_max_length), device=device)
    return STDiT3(config), OpenSoraVAE(vae), text


def _place(denoiser: STDiT3, vae: OpenSoraVAE, device: torch.device, dtype: torch.dtype) -> None:
    """Moves and casts both; rounded to bfloat16, angles would blur the positions of late frames."""
    angles = denoiser.rope.freqs
    denoiser.to(device=device, dtype=dtype)
    vae.to(device=device, dtype=dtype)
    if dtype != torch.float64:
        denoiser.rope.freqs = angles.to(device)


def _pretrained(device: torch.device, dtype: torch.dtype) -> tuple[STDiT3, OpenSoraVAE, T5Text]:
    folders = find_release()
    denoiser, vae = read_stdit3(folders["network"]), read_vae(folders["vae"])
    text = read_text(folders["text"], denoiser.config.model_max_length, dtype, device=device)
    _place(denoiser, vae, device, dtype)
    return denoiser, vae, text
