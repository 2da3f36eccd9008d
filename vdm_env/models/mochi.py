"""Mochi 1 preview (github.com/genmoai/models): flow matching told backwards, causal video autoencoder, T5-XXL.

The network counts time from noise (0) to data (1000) and emits x0 - eps. Here time is turned and the sign with it, so
that t = 1000 is pure noise and actions are eps - x0 as everywhere in this package. Its noise grid is linear at first,
then quadratic (`vdm_env.grids.linear_quadratic_sigmas`).

Verified: sampling against diffusers' own pipeline on random weights. Not verified: released files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
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
from vdm_env.schedule import FlowSchedule

MOCHI = ModelSpec(
    name="Mochi",
    height=480,
    width=848,
    num_frames=19,
    spatial_stride=8,
    temporal_stride=6,
    latent_channels=12,
    max_frames=163,
    size_multiple=16,
    num_steps=64,
    sampler="flow_grpo",
    noise_level=0.7,
    guidance_scale=4.5,
    fps=30.0,
)
"""19 frames as in diffusers' pipeline; the release makes up to 163."""
TEXT_TOKENS = 256
SCHEDULE = FlowSchedule(spacing="linear_quadratic")
RELEASE = release(
    "Mochi",
    "genmo/mochi-1-preview",
    "about 31 GB in bfloat16",
    "Apache-2.0",
    ("transformer", "vae", "text_encoder"),
    _class_name="MochiTransformer3DModel",
    num_layers=48,
)


def call_mochi(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Flow eps - x0 [B,C,F,H,W] at latents [B,C,F,H,W] and t [B] in [0, 1000], 1000 being pure noise."""
    dtype = network_type(denoiser)
    output = denoiser(
        hidden_states=x_t.to(dtype),
        encoder_hidden_states=condition["text"].to(dtype),
        timestep=(SCHEDULE.num_train_timesteps - t).to(x_t.dtype),
        encoder_attention_mask=condition["mask"].bool(),
        return_dict=False,
    )[0]
    return -output.to(x_t.dtype)


def untrained(tiny: bool) -> dict[str, Callable[[], nn.Module]]:
    """What makes untrained networks, by part; full sizes are diffusers' defaults."""
    sizes: dict[str, Any] = {}
    vae: dict[str, Any] = {}
    if tiny:
        sizes = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, pooled_projection_dim=16)
        sizes |= dict(text_embed_dim=16, time_embed_dim=16, max_sequence_length=TINY_TOKENS)
        vae = dict(encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32))
        vae |= dict(layers_per_block=(1, 1, 1, 1, 1))
    return {
        "transformer": lambda: MochiTransformer3DModel(**sizes),
        "vae": lambda: AutoencoderKLMochi(**vae),
        "text_encoder": lambda: random_t5(tiny),
    }


def load(
    spec: ModelSpec, *, weights: str, scale: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> PipelineModel:
    """`MOCHI`; see `vdm_env.models.releases.load_parts`. The empty prompt is padding only, as in the original."""
    tiny = scale == "tiny"
    loaded = load_parts(
        spec,
        RELEASE,
        {"transformer": MochiTransformer3DModel, "vae": AutoencoderKLMochi, "text_encoder": T5EncoderModel},
        untrained(tiny),
        weights=weights,
        tiny=(7, 32, 32) if tiny else None,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    return PipelineModel(
        spec=loaded.spec,
        denoiser=loaded.networks["transformer"],
        schedule=SCHEDULE,
        codec=video_codec(loaded.networks["vae"], causal_latents(MOCHI.temporal_stride)),
        text=TokenStates(
            encoder=loaded.networks["text_encoder"],
            tokenize=loaded.tokenizer(TINY_TOKENS if tiny else TEXT_TOKENS),
            device=torch.device(device),
            give_mask=True,
            empty_is_nothing=True,
        ),
        call=call_mochi,
    )
