"""Stable Video Diffusion's networks: untrained ones of the release's sizes or tiny, and those of the release's folders.

The release has the folders unet, vae, image_encoder, feature_extractor and scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vdm_env.models import local_weights
from vdm_env.models.base import frozen
from vdm_env.models.loading import load_folder
from vdm_env.models.local_weights import Published
from vdm_env.models.opensora_weights import read_json
from vdm_env.models.untrained import seeded

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_FILES = ("unet/*", "vae/*", "image_encoder/*", "feature_extractor/*", "scheduler/*")
_LICENCE = "Stability AI's own, gated on the hub (from memory: non-commercial community licence); read it first"
PUBLISHED = {
    name: Published(
        model=name,
        repository=f"stabilityai/stable-video-diffusion-img2vid{suffix}",
        files=_FILES,
        size="about 4.5 GB in float16, 9 GB in float32",
        licence=_LICENCE,
    )
    for name, suffix in (("SVD", ""), ("SVDXT", "-xt"))
}


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Everything of a release, frozen."""

    unet: Any
    vae: Any
    image_encoder: Any
    pixel_mean: tuple[float, ...] = CLIP_MEAN
    pixel_std: tuple[float, ...] = CLIP_STD
    scheduler: dict[str, Any] = field(default_factory=dict)
    """contents of `scheduler_config.json`; {} where there is none"""


def untrained(
    num_frames: int, tiny: bool, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> Networks:
    """Networks with random weights drawn from `seed`, of the release's sizes or tiny."""
    with seeded(seed, device, dtype):
        unet = UNetSpatioTemporalConditionModel(**unet_config(num_frames, tiny))
        vae = AutoencoderKLTemporalDecoder(**vae_config(tiny))
        image_encoder = CLIPVisionModelWithProjection(image_encoder_config(tiny))
    upcast = dtype == torch.float16 and vae.config.force_upcast
    return Networks(
        unet=frozen(_placed(unet, device, dtype)),
        vae=frozen(_placed(vae, device, torch.float32 if upcast else dtype)),
        image_encoder=frozen(_placed(image_encoder, device, dtype)),
    )


def unet_config(num_frames: int, tiny: bool = False) -> dict[str, Any]:
    """Arguments of the release's UNet (diffusers' defaults), or of a small one."""
    if not tiny:
        return {"sample_size": 96, "num_frames": num_frames}
    return dict(
        sample_size=8,
        num_frames=num_frames,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),  # GroupNorm has 32 groups
        num_attention_heads=2,
        cross_attention_dim=16,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
    )


def vae_config(tiny: bool = False) -> dict[str, Any]:
    """Arguments of the release's autoencoder, or of a small one."""
    return dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32,) * 4 if tiny else (128, 256, 512, 512),
        layers_per_block=1 if tiny else 2,
        latent_channels=4,
        sample_size=64 if tiny else 768,
        scaling_factor=0.18215,
    )


def image_encoder_config(tiny: bool = False) -> CLIPVisionConfig:
    """CLIP ViT-H/14's image tower, or a small one."""
    if tiny:
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        return CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=16, hidden_act="gelu")
    sizes = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16)
    return CLIPVisionConfig(**sizes, image_size=224, patch_size=14, projection_dim=1024, hidden_act="gelu")


def _placed(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    # Diffusers' own `to` logs a warning even where there is nothing to cast. Its mixing factors of space and time are
    # made in main memory, wherever the rest of a network is made.
    return nn.Module.to(module, device, dtype)


def released(model: str, num_frames: int, *, device: torch.device | str, dtype: torch.dtype) -> Networks:
    """Networks of the release on this machine.

    Raises:
        MissingWeightsError: it is not on this machine.
        CorruptWeightsError: a damaged file, or one of another architecture.
    """
    published = PUBLISHED[model]
    folder = local_weights.find_folder(published, lambda place: _is_release(place, num_frames))
    if folder is None:
        cached = local_weights.find_cached(published, "unet/config.json")
        if cached is None:
            raise local_weights.missing(published)
        folder = cached.parents[1]
    upcast = dtype == torch.float16 and _settings(folder / "vae" / "config.json").get("force_upcast", True)
    pixels = _settings(folder / "feature_extractor" / "preprocessor_config.json")
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    return Networks(
        unet=load_folder(UNetSpatioTemporalConditionModel, folder / "unet", **place),
        vae=load_folder(
            AutoencoderKLTemporalDecoder, folder / "vae", device=device, dtype=torch.float32 if upcast else dtype
        ),
        image_encoder=load_folder(CLIPVisionModelWithProjection, folder / "image_encoder", **place),
        pixel_mean=tuple(pixels.get("image_mean", CLIP_MEAN)),
        pixel_std=tuple(pixels.get("image_std", CLIP_STD)),
        scheduler=_settings(folder / "scheduler" / "scheduler_config.json"),
    )


def _is_release(place: Path, num_frames: int) -> bool:
    """Whether a folder holds the release with this number of frames: the two differ in nothing else."""
    if not (place / "image_encoder" / "config.json").is_file() or not (place / "unet" / "config.json").is_file():
        return False
    return read_json(place / "unet" / "config.json").get("num_frames", num_frames) == num_frames


def _settings(file: Path) -> dict[str, Any]:
    """Of a file that may be absent, because the release's own settings are known here."""
    return read_json(file) if file.is_file() else {}
