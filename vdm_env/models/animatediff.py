"""AnimateDiff (arXiv 2307.04725): motion modules in Stable Diffusion 1.5's UNet. Epsilon prediction, DDIM.

The weights are two releases: a Stable Diffusion 1.5 (or one fine-tuned from it) and a motion adapter. Pictures are
encoded and decoded one by one. The grid is the original's: every T / S-th timestep, plus 1. (diffusers recommends
another one, whose steps its scheduler does not take to the grid's own next point.)

Verified: sampling against diffusers' own pipeline and scheduler on random weights. Not verified: released files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from vdm_env.errors import MissingWeightsError
from vdm_env.models.base import Condition, ModelSpec, TokenTextEncoder, frozen, tiny_spec
from vdm_env.models.codec import FrameCodec
from vdm_env.models.loading import load_folder
from vdm_env.models.local_weights import Published, find_cached, find_folder, missing
from vdm_env.models.opensora_weights import read_json
from vdm_env.models.parts import PipelineModel, network_type
from vdm_env.models.releases import UNCONFIRMED, find_release, placed, release
from vdm_env.models.untrained import seeded
from vdm_env.models.visiting import resting_place
from vdm_env.schedule import VPSchedule, linear_alphas_cumprod

MAX_FRAMES = 32
"""Positions of the motion modules."""
ANIMATEDIFF = ModelSpec(
    name="AnimateDiff",
    height=512,
    width=512,
    num_frames=16,
    spatial_stride=8,
    max_frames=MAX_FRAMES,
    size_multiple=8,
    num_steps=50,
    guidance_scale=7.5,
    fps=8.0,
)
SCHEDULE = VPSchedule(
    alphas_cumprod=linear_alphas_cumprod(1000, 0.00085, 0.012), prediction="epsilon", final_alpha_cumprod=1.0
)
"""Stable Diffusion's smallest and largest beta, but linear between them."""
TEXT_TOKENS, END_TOKEN = 77, 49407
BASE = release(
    "StableDiffusion1.5",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "about 2.1 GB in float16",
    "CreativeML OpenRAIL-M",
    ("unet", "vae", "text_encoder"),
    _class_name="UNet2DConditionModel",
    cross_attention_dim=768,
)
ADAPTER = Published(
    model="AnimateDiff",
    repository="guoyww/animatediff-motion-adapter-v1-5-3",
    files=("config.json", "diffusion_pytorch_model.safetensors"),
    size="about 0.9 GB in float16",
    licence=f"Apache-2.0 ({UNCONFIRMED})",
    needs=(BASE.published,),
)


def call_animatediff(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Noise [B,C,F,H,W] at latents [B,C,F,H,W] and t [B] in [0, 999]; the text is repeated for every frame."""
    dtype = network_type(denoiser)
    text = condition["text"].to(dtype).repeat_interleave(x_t.shape[2], dim=0)
    return denoiser(x_t.to(dtype), t, encoder_hidden_states=text, return_dict=False)[0].to(x_t.dtype)


def untrained(tiny: bool) -> dict[str, Callable[[], nn.Module]]:
    """What makes untrained networks, by part; full sizes are Stable Diffusion 1.5's."""
    unet: dict[str, Any] = dict(cross_attention_dim=768, num_attention_heads=8)
    clip: dict[str, Any] = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    vae: dict[str, Any] = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    if tiny:
        unet = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16)
        unet |= dict(num_attention_heads=2, motion_num_attention_heads=2)
        clip = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        vae = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    return {
        "unet": lambda: UNetMotionModel(**unet, motion_max_seq_length=MAX_FRAMES),
        "vae": lambda: AutoencoderKL(
            **vae,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=512,
        ),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**clip, vocab_size=49408, eos_token_id=49407)),
    }


def _pretrained(device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    adapter = find_folder(ADAPTER, lambda folder: _is_adapter(folder / "config.json"))
    cached = find_cached(ADAPTER, "config.json")
    adapter = cached.parent if adapter is None and cached is not None else adapter
    if adapter is None:
        raise missing(ADAPTER)
    try:
        base = find_release(BASE)
    except MissingWeightsError as error:
        raise missing(ADAPTER) from error
    unet = load_folder(UNet2DConditionModel, base / "unet", **place)
    motion = load_folder(MotionAdapter, adapter, **place)
    return {
        "unet": frozen(UNetMotionModel.from_unet2d(unet, motion).to(device)),
        "vae": load_folder(AutoencoderKL, base / "vae", **place),
        "text_encoder": load_folder(CLIPTextModel, base / "text_encoder", **place),
    }


def _is_adapter(config: Path) -> bool:
    return config.is_file() and read_json(config).get("_class_name") == "MotionAdapter"


def load(
    spec: ModelSpec, *, weights: str, scale: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> PipelineModel:
    """`ANIMATEDIFF`; `weights="random"` is the architecture untrained, `scale="tiny"` narrow.

    Raises:
        MissingWeightsError: `weights="pretrained"` and one of the two releases is not on this machine.
        CorruptWeightsError: they are, but damaged or of another architecture.
    """
    if weights == "pretrained":
        parts = _pretrained(device, dtype)
    else:
        warnings.warn(
            f"{spec.name} has random weights: use it for tests, speed and memory, not for results", stacklevel=3
        )
        if scale == "tiny":
            spec = tiny_spec(spec, 4, 64, 64)
        with seeded(seed, device, dtype):
            parts = {n: frozen(placed(make(), device, dtype)) for n, make in untrained(scale == "tiny").items()}
    return PipelineModel(
        spec=replace(spec, max_frames=parts["unet"].config.motion_max_seq_length),  # an adapter may have others
        denoiser=parts["unet"],
        schedule=SCHEDULE,
        codec=FrameCodec(vae=parts["vae"]),
        # Stable Diffusion 1.5 pads with the end token, where OpenCLIP's tokenizer pads with 0.
        text=TokenTextEncoder(
            encoder=parts["text_encoder"].to(resting_place(device)), tokenize=tokenize, device=torch.device(device)
        ),
        call=call_animatediff,
    )


@cache
def _tokenizer() -> Any:
    return open_clip.get_tokenizer("ViT-L-14", context_length=TEXT_TOKENS)  # reads the vocabulary, about a second


def tokenize(texts: list[str]) -> Tensor:
    """CLIP's tokens int64 [B,77]; after the end token come end tokens, as Stable Diffusion 1.5 was trained with."""
    ids = _tokenizer()(texts)
    ended = (ids == END_TOKEN).int().cumsum(dim=1) > 0
    return torch.where(ended, END_TOKEN, ids)
