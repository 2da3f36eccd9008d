"""The `UNet3DConditionModel` family: ModelScope, VideoCrafter2 and the embedded UNet. Epsilon prediction, DDIM.

VideoCrafter2's network is diffusers' UNet3D plus a small frame-rate embedding that is added after the time embedding's MLP
(`FpsTimeEmbedding`); its latents carry the scale s_t (`vdm_env.schedule.latent_scale_lvdm`).
"""

from __future__ import annotations

import warnings
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from vdm_env.errors import MissingWeightsError
from vdm_env.models.base import Condition, FrameCodec, LatentVideoModel, ModelSpec, TokenTextEncoder, frozen
from vdm_env.schedule import VPSchedule, latent_scale_lvdm, scaled_linear_alphas_cumprod

SD_SCHEDULE = VPSchedule(alphas_cumprod=scaled_linear_alphas_cumprod(1000, 0.00085, 0.012), prediction="epsilon")
"""Stable Diffusion's noise schedule, which ModelScope and VideoCrafter2 share."""

MODELSCOPE = ModelSpec(
    name="ModelScope",
    height=256,
    width=256,
    num_frames=16,
    spatial_stride=8,
    size_multiple=8,
    num_steps=50,
    guidance_scale=9.0,
)
VIDEOCRAFTER2 = ModelSpec(
    name="VideoCrafter2",
    height=320,
    width=512,
    num_frames=16,
    spatial_stride=8,
    size_multiple=64,  # the original raises unless latents are multiples of 8
    num_steps=50,
    guidance_scale=12.0,
    fps=10.0,
)
_HUB = {
    "ModelScope": "ali-vilab/text-to-video-ms-1.7b (folders unet, vae, text_encoder, tokenizer, scheduler)",
    "VideoCrafter2": "VideoCrafter/VideoCrafter2 (file model.ckpt)",
}
CONDITIONING_FPS = 28.0  # VideoCrafter2's inference script conditions on 28 frames a second (and saves at 10)


class FpsTimeEmbedding(nn.Module):
    """Time embedding plus a frame-rate embedding of VideoCrafter2: time_mlp(emb(t)) + fps_mlp(emb(fps)).

    Args:
        time_embedding: the UNet's own MLP.
        channels: width of the sinusoid, the UNet's first block's width.
        hidden: width of the embedding.
    """

    def __init__(self, time_embedding: nn.Module, channels: int, hidden: int) -> None:
        super().__init__()
        self.time_embedding = time_embedding
        self.fps_embedding = TimestepEmbedding(channels, hidden)
        self.channels = channels
        self.fps = CONDITIONING_FPS

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        fps = torch.full((len(sample),), self.fps, device=sample.device)
        sinusoid = get_timestep_embedding(fps, self.channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.time_embedding(sample, condition) + self.fps_embedding(sinusoid.to(sample.dtype))


def call_unet3d(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """UNet3D on latents [B,C,F,H,W] and t [B] in [0, 999]."""
    dtype: Any = denoiser.dtype
    output = denoiser(x_t.to(dtype), t, encoder_hidden_states=condition["text"].to(dtype), return_dict=False)[0]
    return output.to(x_t.dtype)


def load(
    spec: ModelSpec, *, weights: str, scale: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> LatentVideoModel:
    """`MODELSCOPE` or `VIDEOCRAFTER2`, `weights="random"`: the architecture untrained; `scale="tiny"` shrinks its widths.

    Raises:
        MissingWeightsError: `weights="pretrained"`: the weights do not come with the package.
    """
    if weights == "pretrained":
        raise MissingWeightsError(
            f"pretrained weights of {spec.name} are not on this machine: they are in the hub repository {_HUB[spec.name]}, and "
            'this version cannot read them yet. What works now: make("MovingShapes-HPS") (small trained weights come with the '
            f'package) or make("{spec.name}-...", weights="random", scale="tiny")'
        )
    warnings.warn(f"{spec.name} has random weights: use it for tests, speed and memory, not for results", stacklevel=3)
    tiny = scale == "tiny"
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        width = 32 if tiny else 1024
        unet = (
            UNet3DConditionModel(
                block_out_channels=(16, 32, 32, 32),
                attention_head_dim=8,
                cross_attention_dim=width,
                norm_num_groups=8,
                layers_per_block=1,
            )
            if tiny
            else UNet3DConditionModel()
        )
        if spec.name == "VideoCrafter2":
            channels = unet.config.block_out_channels[0]
            unet.time_embedding = FpsTimeEmbedding(unet.time_embedding, channels, 4 * channels)
        blocks = (8, 8, 8, 8) if tiny else (128, 256, 512, 512)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=blocks,
            layers_per_block=1 if tiny else 2,
            latent_channels=4,
            norm_num_groups=4 if tiny else 32,
            sample_size=spec.width,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=1 if tiny else 23,  # 24 less one: the penultimate layer's states, with the final norm
                num_attention_heads=2 if tiny else 16,
                hidden_act="gelu",
                eos_token_id=49407,
            )
        )
    place = {"device": device, "dtype": dtype}
    schedule = SD_SCHEDULE
    if spec.name == "VideoCrafter2":
        schedule = VPSchedule(
            alphas_cumprod=SD_SCHEDULE.alphas_cumprod, latent_scale=latent_scale_lvdm(), spacing="lvdm"
        )
    return LatentVideoModel(
        spec=spec,
        denoiser=frozen(unet.to(**place)),
        schedule=schedule,
        codec=FrameCodec(vae=frozen(vae.to(**place))),
        text=TokenTextEncoder(encoder=frozen(text.to(**place)), tokenize=open_clip.get_tokenizer("ViT-H-14")),
        call=call_unet3d,
    )
