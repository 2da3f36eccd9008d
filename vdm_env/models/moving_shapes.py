"""The two embedded models, loaded through the same adapters as the big ones of their families."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel, WanTransformer3DModel
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from vdm_env.errors import CorruptWeightsError
from vdm_env.models import dit, unet3d
from vdm_env.models.base import LatentVideoModel, ModelSpec, TokenTextEncoder, frozen
from vdm_env.models.codec import FrameCodec
from vdm_env.models.fast_path import fast
from vdm_env.models.loading import load_folder
from vdm_env.models.recompute import make_recomputable
from vdm_env.schedule import FlowSchedule
from vdm_env.worlds.moving_shapes import WEIGHTS

_COMMON: dict[str, Any] = dict(
    height=32,
    width=32,
    num_frames=8,
    max_frames=16,
    spatial_stride=4,
    size_multiple=8,  # the UNet halves the latents once, the transformer patches them 2x2
    num_steps=10,
    guidance_scale=3.0,
    world="moving_shapes",
)
"""Trained on 8 frames; the transformer has 16 positions in each direction, a frame or 8 pixels each."""
FLOW_SPEC = ModelSpec(name="MovingShapes", sampler="flow_grpo", noise_level=0.7, max_side=128, **_COMMON)
UNET_SPEC = ModelSpec(name="MovingShapesUNet", sampler="ddim", noise_level=1.0, **_COMMON)


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        raise CorruptWeightsError(f"{folder} does not hold a tokenizer ({error}); restore it, then retry") from error
    return lambda texts: (
        tokenizer(
            texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
    )


def load(
    spec: ModelSpec,
    *,
    weights: str,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    folder: Path = WEIGHTS,
) -> LatentVideoModel:
    """`FLOW_SPEC` or `UNET_SPEC` with its trained weights; with `weights="random"` the denoiser is drawn from `seed`.

    Raises:
        MissingWeightsError, CorruptWeightsError: see `load_folder`.
    """
    shared, kind = folder / "shared", "flow" if spec is FLOW_SPEC else "unet"
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    vae = load_folder(AutoencoderKL, shared / "vae", **place)
    text = load_folder(CLIPTextModel, shared / "text_encoder", **place)
    cls, sub = (WanTransformer3DModel, "transformer") if kind == "flow" else (UNet3DConditionModel, "unet")
    if weights == "random":
        warnings.warn(
            f"{spec.name} has random weights: use it for tests, speed and memory, not for results", stacklevel=3
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            denoiser = frozen(cls.from_config(cls.load_config(folder / kind / sub)).to(**place))
    else:
        denoiser = load_folder(cls, folder / kind / sub, **place)
    if kind == "unet":
        make_recomputable(denoiser)
    schedule = FlowSchedule(shift=2.0) if kind == "flow" else unet3d.SD_SCHEDULE
    return LatentVideoModel(
        spec=spec,
        denoiser=fast(denoiser),
        schedule=schedule,
        codec=FrameCodec(vae=vae),
        text=TokenTextEncoder(encoder=text, tokenize=_tokenizer(shared / "tokenizer")),
        call=dit.call_wan if kind == "flow" else unet3d.call_unet3d,
    )
