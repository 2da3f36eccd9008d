"""Wan 2.1 and 2.2 text-to-video (arXiv 2503.20314): flow matching, causal video autoencoder, UMT5-XXL.

2.1 has one network (1.3B or 14B). Of 2.2, A14B has two of 14B: one for timesteps from 875 up, one for those below, each
with its own guidance scale; a batch with videos on both sides is split. 5B has an autoencoder that divides sides by 16.

Deviation: releases sample with a multistep solver (not Markov in x, see `vdm_env.samplers.refuse_sampler`); first-order
steps on the same noise levels stand in. The unconditional prompt is "", not the release's list of unwanted things.

Verified: sampling against diffusers' own pipeline on random weights. Not verified: released files.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ftfy
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from vdm_env.host import on_host, take, upload
from vdm_env.models.base import Condition, ModelSpec
from vdm_env.models.dit import call_wan
from vdm_env.models.fast_path import fast
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

_COMMON: dict[str, Any] = dict(
    temporal_stride=4,
    num_frames=81,
    max_frames=81,  # of training, five seconds; rotary positions reach 1024 latent frames
    num_steps=50,
    sampler="flow_grpo",
    noise_level=0.7,
    guidance_scale=5.0,
    fps=16.0,
)
_WAN21: dict[str, Any] = _COMMON | dict(height=480, width=832, spatial_stride=8, latent_channels=16, size_multiple=16)
WAN21_1B = ModelSpec(name="Wan2.1_1.3B", **_WAN21)
WAN21_14B = ModelSpec(name="Wan2.1_14B", **_WAN21)
WAN22_A14B = ModelSpec(name="Wan2.2_A14B", **(_WAN21 | dict(height=720, width=1280, num_steps=40, guidance_scale=4.0)))
WAN22_5B = ModelSpec(
    name="Wan2.2_5B",
    **(
        _COMMON
        | dict(height=704, width=1280, num_frames=121, max_frames=121, fps=24.0)
        | dict(spatial_stride=16, latent_channels=48, size_multiple=32)
    ),
)
TEXT_TOKENS = 512
BOUNDARY = 875.0
"""A14B: timesteps from here up belong to the first network, those below to the second."""
LOW_NOISE_GUIDANCE = 3.0 / 4.0
"""A14B: guidance below the boundary in relation to that above (3 and 4 in the release)."""
SMALL_PICTURE = 480 * 832
"""2.1: pixels up to which the shift is 3; it is 5 above."""
_PARTS = ("transformer", "vae", "text_encoder")
RELEASES = {
    "Wan2.1_1.3B": release(
        "Wan2.1_1.3B",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "about 14 GB in bfloat16",
        "Apache-2.0",
        _PARTS,
        num_layers=30,
        in_channels=16,
    ),
    "Wan2.1_14B": replace(
        release(
            "Wan2.1_14B",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            "about 40 GB in bfloat16",
            "Apache-2.0",
            _PARTS,
            num_layers=40,
            in_channels=16,
        ),
        without=("transformer_2",),  # that one would be 2.2
    ),
    "Wan2.2_A14B": release(
        "Wan2.2_A14B",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "about 69 GB in bfloat16",
        "Apache-2.0",
        ("transformer", "transformer_2", "vae", "text_encoder"),
        num_layers=40,
        in_channels=16,
    ),
    "Wan2.2_5B": release(
        "Wan2.2_5B",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "about 23 GB in bfloat16",
        "Apache-2.0",
        _PARTS,
        num_layers=30,
        in_channels=48,
    ),
}


def noise_schedule(name: str) -> Callable[[int, int, int], FlowSchedule]:
    """The schedule for (num_frames, height, width): 2.1's shift grows with the picture, 2.2's are fixed."""

    def schedule(num_frames: int, height: int, width: int) -> FlowSchedule:
        shift = {"Wan2.2_A14B": 12.0, "Wan2.2_5B": 5.0}.get(name, 3.0 if height * width <= SMALL_PICTURE else 5.0)
        return FlowSchedule(shift=shift)

    return schedule


class WanExperts(nn.Module):
    """Two Wan networks as one: each video of a batch goes to the one that its timestep belongs to.

    Args:
        high: for timesteps from `BOUNDARY` up.
        low: for those below.
    """

    _supports_gradient_checkpointing = True

    def __init__(self, high: nn.Module, low: nn.Module) -> None:
        super().__init__()
        self.high, self.low = high, low

    @property
    def dtype(self) -> torch.dtype:
        return network_type(self.high)

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes every block in the backward pass."""
        for expert in (self.high, self.low):
            expert.enable_gradient_checkpointing()  # type: ignore[operator]

    def disable_gradient_checkpointing(self) -> None:
        """Stores activations again."""
        for expert in (self.high, self.low):
            expert.disable_gradient_checkpointing()  # type: ignore[operator]

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Flow [B,C,F,H,W]; a network that no video belongs to is not run."""
        noisy = on_host(t) >= BOUNDARY
        sides = [(rows.nonzero().flatten(), expert) for rows, expert in ((noisy, self.high), (~noisy, self.low))]
        outputs = []
        for rows, expert in sides:
            if len(rows):
                part = take({"x_t": x_t, "t": t}, rows)
                outputs.append(call_wan(expert, part["x_t"], part["t"], take(condition, rows)))
        places = torch.cat([rows for rows, _ in sides])
        return torch.cat(outputs)[upload(places.argsort(), x_t.device)]


def call_experts(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """`call_wan` for `WanExperts`."""
    return denoiser(x_t, t, condition)


def expert_guidance(w: float, t: Tensor) -> Tensor:
    """Guidance [B] at t [B] of a policy with guidance w: w above the boundary, three quarters of it below."""
    return torch.where(t >= BOUNDARY, w, w * LOW_NOISE_GUIDANCE)


def clean_text(text: str) -> str:
    """Repaired characters, no HTML entities, single spaces."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def untrained(spec: ModelSpec, tiny: bool) -> dict[str, Callable[[], nn.Module]]:
    """What makes untrained networks, by part.

    Sizes of 14B are diffusers' defaults, those of 1.3B, 5B and 5B's autoencoder give the published numbers of
    parameters (the autoencoder's is not confirmed). The mean and standard deviation of 5B's latents come with its
    files; untrained they are 0 and 1.
    """
    name = spec.name
    sizes: dict[str, Any] = {
        "Wan2.1_1.3B": dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        "Wan2.2_5B": dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
    }.get(name, {})
    vae: dict[str, Any] = {}
    if name == "Wan2.2_5B":
        vae = dict(
            base_dim=160,
            decoder_base_dim=256,
            z_dim=48,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=[0.0] * 48,
            latents_std=[1.0] * 48,
        )
    if tiny:
        channels = spec.latent_channels
        sizes = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=1, freq_dim=16, text_dim=16)
        sizes |= dict(in_channels=channels, out_channels=channels, rope_max_seq_len=32)
        vae |= dict(base_dim=4, num_res_blocks=1) | (dict(decoder_base_dim=4) if name == "Wan2.2_5B" else {})

    def transformer() -> nn.Module:
        return WanTransformer3DModel(**sizes)

    two = {"transformer_2": transformer} if name == "Wan2.2_A14B" else {}
    return {
        "transformer": transformer,
        **two,
        "vae": lambda: AutoencoderKLWan(**vae),
        "text_encoder": lambda: random_t5(tiny, UMT5EncoderModel, UMT5Config, vocab_size=256384),
    }


def load(
    spec: ModelSpec, *, weights: str, scale: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> PipelineModel:
    """One of the four specs of this module; see `vdm_env.models.releases.load_parts`."""
    tiny, two = scale == "tiny", spec.name == "Wan2.2_A14B"
    transformers = {"transformer": WanTransformer3DModel} | ({"transformer_2": WanTransformer3DModel} if two else {})
    loaded = load_parts(
        spec,
        RELEASES[spec.name],
        transformers | {"vae": AutoencoderKLWan, "text_encoder": UMT5EncoderModel},
        untrained(spec, tiny),
        weights=weights,
        tiny=(9, 32, 32) if tiny else None,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    parts, spec = loaded.networks, loaded.spec
    experts = [fast(parts[name]) for name in transformers]
    schedule_for = noise_schedule(spec.name)
    return PipelineModel(
        spec=spec,
        denoiser=WanExperts(*experts).eval() if two else experts[0],
        schedule=schedule_for(spec.num_frames, spec.height, spec.width),
        schedule_for=schedule_for,
        codec=video_codec(parts["vae"], causal_latents(spec.temporal_stride)),
        text=TokenStates(
            encoder=parts["text_encoder"],
            tokenize=loaded.tokenizer(TINY_TOKENS if tiny else TEXT_TOKENS),
            device=torch.device(device),
            zero_padding=True,
            clean=clean_text,
        ),
        call=call_experts if two else call_wan,
        guidance_at=expert_guidance if two else None,
    )
