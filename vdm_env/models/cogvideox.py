"""CogVideoX (arXiv 2408.06072), 2B and 5B: v-prediction with zero terminal SNR, DDIM on the trailing grid, T5-XXL.

The network wants latents as [B,F,C,H,W]. 2B adds sine and cosine positions itself; 5B turns queries and keys by angles
that are made here from the size of the latents. Text is not masked: padding is part of the prompt.

Deviation: releases sample 5B with a two-step solver (not Markov in x, see `vdm_env.samplers.refuse_sampler`) and a
guidance scale that changes with t; DDIM and constant guidance stand in. CogVideoX 1.5 (latents patched in time) and the
image-to-video networks are not read.

Verified: sampling against diffusers' own pipeline and scheduler on random weights. Not verified: released files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn
from transformers import T5EncoderModel

from vdm_env.models.base import Condition, ModelSpec
from vdm_env.models.parts import (
    TINY_TOKENS,
    PipelineModel,
    TokenStates,
    causal_latents,
    network_type,
    random_t5,
    video_codec,
)
from vdm_env.models.releases import load_parts, release
from vdm_env.schedule import VPSchedule, rescale_zero_terminal_snr, scaled_linear_alphas_cumprod, snr_shift

_COMMON: dict[str, Any] = dict(
    height=480,
    width=720,
    num_frames=49,
    spatial_stride=8,
    temporal_stride=4,
    latent_channels=16,
    max_frames=49,  # of training, six seconds
    size_multiple=16,  # the network patches latents 2x2
    num_steps=50,
    guidance_scale=6.0,
    fps=8.0,
)
COGVIDEOX_2B = ModelSpec(name="CogVideoX2B", **_COMMON)
COGVIDEOX_5B = ModelSpec(name="CogVideoX5B", **_COMMON)
TEXT_TOKENS = 226
SNR_SHIFT = {"CogVideoX2B": 3.0, "CogVideoX5B": 1.0}
LATENT_FACTOR = {"CogVideoX2B": 1.15258426, "CogVideoX5B": 0.7}
_PARTS = ("transformer", "vae", "text_encoder")
_TEXT_TO_VIDEO: dict[str, Any] = dict(in_channels=16, patch_size_t=None)  # neither image to video nor 1.5
RELEASES = {
    "CogVideoX2B": release(
        "CogVideoX2B",
        "THUDM/CogVideoX-2b",
        "about 13 GB in float16",
        "Apache-2.0",
        _PARTS,
        num_layers=30,
        **_TEXT_TO_VIDEO,
    ),
    "CogVideoX5B": release(
        "CogVideoX5B",
        "THUDM/CogVideoX-5b",
        "about 21 GB in bfloat16",
        "CogVideoX licence",
        _PARTS,
        num_layers=42,
        **_TEXT_TO_VIDEO,
    ),
}


def noise_schedule(name: str) -> VPSchedule:
    """Stable Diffusion's betas with the release's shift of the signal-to-noise ratio, then a terminal one of 0."""
    alphas = rescale_zero_terminal_snr(snr_shift(scaled_linear_alphas_cumprod(), SNR_SHIFT[name]))
    return VPSchedule(alphas_cumprod=alphas, prediction="v", spacing="trailing", final_alpha_cumprod=1.0)


def rotary(config: Any, frames: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [F H W / p^2, head dim] of 5B's positions, for latents of this size.

    Positions of another shape than 480x720 are squeezed into the grid of training, keeping their proportions.
    """
    p = config.patch_size
    grid = (height // p, width // p)
    crop = get_resize_crop_region_for_grid(grid, config.sample_width // p, config.sample_height // p)
    return get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim, crops_coords=crop, grid_size=grid, temporal_size=frames, device=device
    )


def call_cogvideox(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Network output v [B,C,F,H,W] at latents [B,C,F,H,W] and t [B] in [0, 999]."""
    config: Any = denoiser.config
    dtype = network_type(denoiser)
    angles = None
    if config.use_rotary_positional_embeddings:
        angles = rotary(config, x_t.shape[2], x_t.shape[3], x_t.shape[4], x_t.device)
    output = denoiser(
        hidden_states=x_t.transpose(1, 2).to(dtype),
        encoder_hidden_states=condition["text"].to(dtype),
        timestep=t,
        image_rotary_emb=angles,
        return_dict=False,
    )[0]
    return output.transpose(1, 2).to(x_t.dtype)


def decoded_latents(vae: Any, total: int, last: int) -> int:
    """How many leading latents the decoder needs for the frames up to `last`; it is causal, in pairs of latents.

    Its group norms average over the frames of a pair (the first pair takes the odd one along), so a pair is decoded
    whole, and pairs must fall where they fall in the whole video.
    """
    pair = vae.num_latent_frames_batch_size
    needed = max(causal_latents(4)(vae, total, last), min(total, pair + total % pair))
    return needed + (total - needed) % pair


def untrained(spec: ModelSpec, tiny: bool) -> dict[str, Callable[[], nn.Module]]:
    """What makes untrained networks, by part; full sizes are diffusers' defaults (5B's not confirmed by its files)."""
    large = spec.name == "CogVideoX5B"
    sizes: dict[str, Any] = dict(num_layers=42, num_attention_heads=48) if large else {}
    vae: dict[str, Any] = {}
    if tiny:
        sizes = dict(
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            time_embed_dim=16,
            text_embed_dim=16,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            max_text_seq_length=TINY_TOKENS,
        )
        vae = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    return {
        "transformer": lambda: CogVideoXTransformer3DModel(**sizes, use_rotary_positional_embeddings=large),
        "vae": lambda: AutoencoderKLCogVideoX(**vae, scaling_factor=LATENT_FACTOR[spec.name]),
        "text_encoder": lambda: random_t5(tiny),
    }


def load(
    spec: ModelSpec, *, weights: str, scale: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> PipelineModel:
    """`COGVIDEOX_2B` or `COGVIDEOX_5B`; see `vdm_env.models.releases.load_parts`."""
    tiny = scale == "tiny"
    loaded = load_parts(
        spec,
        RELEASES[spec.name],
        {"transformer": CogVideoXTransformer3DModel, "vae": AutoencoderKLCogVideoX, "text_encoder": T5EncoderModel},
        untrained(spec, tiny),
        weights=weights,
        tiny=(9, 32, 32) if tiny else None,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    return PipelineModel(
        spec=loaded.spec,
        denoiser=loaded.networks["transformer"],
        schedule=noise_schedule(spec.name),
        codec=video_codec(loaded.networks["vae"], decoded_latents),
        text=TokenStates(
            encoder=loaded.networks["text_encoder"],
            tokenize=loaded.tokenizer(TINY_TOKENS if tiny else TEXT_TOKENS),
            device=torch.device(device),
            attend_mask=False,
        ),
        call=call_cogvideox,
    )
