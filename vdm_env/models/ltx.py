"""LTX-Video (arXiv 2501.00103): flow matching on strongly compressed latents (32x32x8 pixels a cell), T5-XXL.

The network takes latents as a list of cells [B, F H W, C] and positions in seconds and pixels. The noise grid depends
on the number of cells and ends at sigma 0.1, from where one step leads to clean latents.

Verified: sampling against diffusers' own pipeline on random weights. Not verified: released files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
from torch import Tensor, nn
from transformers import T5EncoderModel

from vdm_env.models.base import Condition, ModelSpec
from vdm_env.models.parts import (
    TINY_TOKENS,
    PipelineModel,
    TokenStates,
    all_latents,
    network_type,
    random_t5,
    video_codec,
)
from vdm_env.models.releases import load_parts, release
from vdm_env.schedule import FlowSchedule

LTX_VIDEO = ModelSpec(
    name="LTXVideo",
    height=512,
    width=704,
    num_frames=161,
    spatial_stride=32,
    temporal_stride=8,
    latent_channels=128,
    max_frames=257,  # what the release's page gives as the most (from memory)
    size_multiple=32,
    num_steps=50,
    sampler="flow_grpo",
    noise_level=0.7,
    guidance_scale=3.0,
    fps=25.0,
)
"""The 2B network of the first release, text to video."""
TEXT_TOKENS = 128
TERMINAL = 0.1
"""Smallest noise level of the grid before 0."""
_CELLS, _LOG_SHIFTS = (1024, 4096), (0.95, 2.05)
"""The logarithm of the shift is a straight line through these points, and goes on beyond them."""
RELEASE = release(
    "LTXVideo",
    "Lightricks/LTX-Video",
    "about 14 GB in bfloat16",
    "LTX-Video open weights licence",
    ("transformer", "vae", "text_encoder"),
    num_layers=28,
    cross_attention_dim=2048,
)


def noise_schedule(num_frames: int, height: int, width: int) -> FlowSchedule:
    """The schedule for videos of this size, in frames and pixels."""
    stride = LTX_VIDEO.spatial_stride
    cells = ((num_frames - 1) // LTX_VIDEO.temporal_stride + 1) * (height // stride) * (width // stride)
    slope = (_LOG_SHIFTS[1] - _LOG_SHIFTS[0]) / (_CELLS[1] - _CELLS[0])
    shift = math.exp(_LOG_SHIFTS[0] + slope * (cells - _CELLS[0]))
    return FlowSchedule(shift=shift, terminal=TERMINAL)


def call_ltx(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, fps: float) -> Tensor:
    """Flow eps - x0 [B,C,F,H,W].

    Args:
        denoiser: an `LTXVideoTransformer3DModel` with patches of one cell.
        x_t: latents [B,C,F,H,W].
        t: timesteps [B] in [0, 1000].
        condition: `text` [B,L,D] and `mask` [B,L].
        fps: frames a second: positions in time are in seconds.
    """
    dtype = network_type(denoiser)
    frames, height, width = x_t.shape[2:]
    output = denoiser(
        hidden_states=x_t.flatten(2).transpose(1, 2).to(dtype),
        encoder_hidden_states=condition["text"].to(dtype),
        timestep=t,
        encoder_attention_mask=condition["mask"],
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(
            LTX_VIDEO.temporal_stride / fps,
            LTX_VIDEO.spatial_stride,
            LTX_VIDEO.spatial_stride,
        ),
        return_dict=False,
    )[0]
    return output.transpose(1, 2).unflatten(2, (frames, height, width)).to(x_t.dtype)


def untrained(tiny: bool) -> dict[str, Callable[[], nn.Module]]:
    """What makes untrained networks, by part; full sizes are diffusers' defaults, those of the first release."""
    sizes: dict[str, Any] = {}
    vae: dict[str, Any] = {}
    if tiny:
        sizes = dict(num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=1)
        sizes |= dict(caption_channels=16)
        vae = dict(block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8))
        vae |= dict(layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1))
    return {
        "transformer": lambda: LTXVideoTransformer3DModel(**sizes),
        "vae": lambda: AutoencoderKLLTXVideo(**vae),
        "text_encoder": lambda: random_t5(tiny),
    }


def load(
    spec: ModelSpec, *, weights: str, scale: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> PipelineModel:
    """`LTX_VIDEO`; see `vdm_env.models.releases.load_parts`."""
    tiny = scale == "tiny"
    loaded = load_parts(
        spec,
        RELEASE,
        {"transformer": LTXVideoTransformer3DModel, "vae": AutoencoderKLLTXVideo, "text_encoder": T5EncoderModel},
        untrained(tiny),
        weights=weights,
        tiny=(17, 64, 64) if tiny else None,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    spec = loaded.spec
    return PipelineModel(
        spec=spec,
        denoiser=loaded.networks["transformer"],
        schedule=noise_schedule(spec.num_frames, spec.height, spec.width),
        schedule_for=noise_schedule,
        codec=video_codec(loaded.networks["vae"], all_latents),
        text=TokenStates(
            encoder=loaded.networks["text_encoder"],
            tokenize=loaded.tokenizer(TINY_TOKENS if tiny else TEXT_TOKENS),
            device=torch.device(device),
            attend_mask=False,
            give_mask=True,
        ),
        call=partial(call_ltx, fps=spec.fps),
    )
