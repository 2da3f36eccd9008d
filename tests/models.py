"""Small video models for tests: the real classes of the two embedded families at toy widths, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel, WanTransformer3DModel
from transformers import CLIPTextConfig, CLIPTextModel

from vdm_env import make
from vdm_env.models import dit, unet3d
from vdm_env.models.base import FrameCodec, LatentVideoModel, ModelSpec, TokenTextEncoder, frozen
from vdm_env.schedule import FlowSchedule
from vdm_env.worlds.moving_shapes.networks import build_tokenizer

PROMPTS = [
    "a red circle moving left",
    "a blue square moving right",
    "a green circle moving up",
    "a red square moving down",
]
TEXT_WIDTH = 16
LATENT_SHAPE = (4, 2, 4, 4)


def brightness(video: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward with a gradient everywhere."""
    return video.mean((1, 2, 3, 4))


def _text_encoder() -> TokenTextEncoder:
    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return TokenTextEncoder(
        encoder=frozen(CLIPTextModel(config)),
        tokenize=lambda texts: tokenizer(texts, padding="max_length", return_tensors="pt").input_ids,
    )


def tiny_wan(num_layers: int = 2) -> WanTransformer3DModel:
    """The flow family's network."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=1,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=num_layers,
        cross_attn_norm=True,
        rope_max_seq_len=16,
    )


def _denoiser(kind: str) -> torch.nn.Module:
    if kind == "flow":
        return tiny_wan()
    return UNet3DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(16, 16),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=4,
    )


def tiny_model(kind: str = "flow", dtype: torch.dtype = torch.float32) -> LatentVideoModel:
    """A model of the flow ("flow") or epsilon ("unet") family, 2 frames of 16x16; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = _denoiser(kind)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(4, 4, 4),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=16,
            mid_block_add_attention=False,
        )
        text = _text_encoder()
        for parameter in denoiser.parameters():
            if not parameter.any():  # layers that start at zero would hide what goes wrong in them
                torch.nn.init.normal_(parameter, std=0.05)
    if dtype != torch.float32:  # diffusers logs a warning even where there is nothing to cast
        for module in (text.encoder, denoiser, vae):
            module.to(dtype)
    spec = ModelSpec(
        name=f"Tiny{kind}",
        height=16,
        width=16,
        num_frames=2,
        spatial_stride=4,
        size_multiple=8,
        num_steps=4,
        sampler="flow_grpo" if kind == "flow" else "ddim",
        noise_level=0.7 if kind == "flow" else 1.0,
    )
    return LatentVideoModel(
        spec=spec,
        denoiser=frozen(denoiser),
        schedule=FlowSchedule(shift=2.0) if kind == "flow" else unet3d.SD_SCHEDULE,
        codec=FrameCodec(vae=frozen(vae)),
        text=text,
        call=dit.call_wan if kind == "flow" else unet3d.call_unet3d,
    )


def tiny_env(kind: str = "flow", **options: Any) -> Any:
    """`make` with a tiny model of its own, the brightness reward and four prompts."""
    options = {"reward": brightness, "prompts": PROMPTS, "num_envs": 2} | options
    return make(model=tiny_model(kind, options.get("dtype", torch.float32)), **options)
