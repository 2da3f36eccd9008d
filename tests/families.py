"""Tiny instances of the families that are diffusers pipelines, and those pipelines around the same networks."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    LTXPipeline,
    MochiPipeline,
    WanPipeline,
)
from torch import Tensor

from tests.weights import wake
from vdm_env.models import MODELS
from vdm_env.models.parts import PipelineModel

NAMES = (
    "CogVideoX2B",
    "CogVideoX5B",
    "Wan2.1_1.3B",
    "Wan2.2_A14B",
    "Wan2.2_5B",
    "HunyuanVideo",
    "LTXVideo",
    "Mochi",
    "AnimateDiff",
)
PROMPTS = ["a dog riding a bike", "a cat playing chess by the sea"]


def new_tiny(name: str, dtype: torch.dtype = torch.float32) -> PipelineModel:
    """A tiny model; the same weights each time, none of them zero (layers that start at zero hide what is wrong)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[name].load(weights="random", scale="tiny", device="cpu", dtype=dtype, seed=0)
    wake(model.denoiser)
    assert isinstance(model, PipelineModel)
    return model


@cache
def tiny(name: str) -> PipelineModel:
    """The same, made once for all tests."""
    return new_tiny(name)


def latents(model: PipelineModel, batch: int = 2, seed: int = 0) -> Tensor:
    spec = model.spec
    shape = model.latent_shape(spec.num_frames, spec.height, spec.width)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


class GivenSigmas(FlowMatchEulerDiscreteScheduler):
    """Wan's pipeline names no noise levels, and this scheduler's own would be shifted twice at their end."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:  # type: ignore[override]
        sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        super().set_timesteps(sigmas=sigmas, device=device)


def pipeline(model: PipelineModel) -> Any:
    """The pipeline of diffusers around a model's networks, with the scheduler its release is sampled with."""
    name = model.spec.name
    base: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": model.codec.vae}
    network: dict[str, Any] = {"transformer": model.denoiser}
    pipe: Any
    if name.startswith("CogVideoX"):
        scheduler = CogVideoXDDIMScheduler(
            clip_sample=False,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0 if name == "CogVideoX2B" else 1.0,
        )
        pipe = CogVideoXPipeline(**base, **network, scheduler=scheduler)
    elif name.startswith("Wan"):
        shift = {"Wan2.1_1.3B": 3.0, "Wan2.2_A14B": 12.0, "Wan2.2_5B": 5.0}[name]
        more: dict[str, Any] = {"expand_timesteps": name == "Wan2.2_5B"}
        if name == "Wan2.2_A14B":
            network = {"transformer": model.denoiser.high, "transformer_2": model.denoiser.low}
            more |= {"boundary_ratio": 0.875}
        pipe = WanPipeline(**base, **network, scheduler=GivenSigmas(shift=shift), **more)
    elif name == "HunyuanVideo":
        more = {"tokenizer_2": None, "text_encoder_2": None}
        pipe = HunyuanVideoPipeline(**base, **network, **more, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0))
    elif name == "LTXVideo":
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        )
        pipe = LTXPipeline(**base, **network, scheduler=scheduler)
    elif name == "Mochi":
        pipe = MochiPipeline(**base, **network, scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    else:
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False
        )
        pipe = AnimateDiffPipeline(**base, unet=model.denoiser, motion_adapter=None, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(model: PipelineModel, start: Tensor, guidance: float, num_steps: int) -> Tensor:
    """Clean latents [B,C,F,H,W] of the pipeline from these, with the prompts' embeddings of our text encoder."""
    spec, name = model.spec, model.spec.name
    said, nothing = model.encode_prompts(PROMPTS), model.encode_prompts([""] * len(PROMPTS))
    options: dict[str, Any] = dict(
        prompt_embeds=said["text"],
        negative_prompt_embeds=nothing["text"],
        height=spec.height,
        width=spec.width,
        num_frames=spec.num_frames,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        latents=start,
        output_type="latent",
    )
    if "mask" in said:
        mask, empty = (c["mask"].bool() for c in (said, nothing))
        options |= dict(prompt_attention_mask=mask, negative_prompt_attention_mask=empty)
    if name == "Wan2.2_A14B":
        options |= dict(guidance_scale_2=0.75 * guidance)
    if name == "HunyuanVideo":
        options |= dict(guidance_scale=6.0, true_cfg_scale=guidance)
        options |= dict(pooled_prompt_embeds=said["pooled"], negative_pooled_prompt_embeds=nothing["pooled"])
    if name == "LTXVideo":
        options |= dict(latents=start.flatten(2).transpose(1, 2), frame_rate=25)
    if name.startswith("CogVideoX"):
        options |= dict(latents=start.transpose(1, 2))
    result = pipeline(model)(**options).frames
    if name == "LTXVideo":
        return result.transpose(1, 2).unflatten(2, start.shape[2:])
    return result.transpose(1, 2) if name.startswith("CogVideoX") else result
