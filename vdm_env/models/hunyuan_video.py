"""HunyuanVideo (arXiv 2412.03603): flow matching, guidance as an input, Llama and CLIP text encoders.

The network was distilled to take the guidance scale as a number, so one forward pass a step is enough and the policy's
own `guidance_scale` is 1; a larger one is true classifier-free guidance on top, with "" as the unconditional prompt.

Noise and sampler default to those of DanceGRPO (arXiv 2505.07818), which trained this model.

Verified: sampling against diffusers' own pipeline on random weights. Not verified: released files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from vdm_env.models.base import Condition, ModelSpec
from vdm_env.models.opensora_weights import Tokenize
from vdm_env.models.parts import TINY_TOKENS, PipelineModel, all_latents, network_type, video_codec
from vdm_env.models.releases import load_parts, release
from vdm_env.models.visiting import visiting
from vdm_env.schedule import FlowSchedule

HUNYUAN_VIDEO = ModelSpec(
    name="HunyuanVideo",
    height=720,
    width=1280,
    num_frames=129,
    spatial_stride=8,
    temporal_stride=4,
    latent_channels=16,
    max_frames=129,  # of training, five seconds
    size_multiple=16,
    num_steps=50,
    sampler="dance",
    noise_level=0.25,
    guidance_scale=1.0,
    fps=24.0,
)
EMBEDDED_GUIDANCE = 6.0
"""The guidance scale the network is told (times 1000)."""
SHIFT = 7.0
TEXT_TOKENS, CLIP_TOKENS = 256, 77
SKIPPED_LAYERS = 2
"""Llama's last layers that are not used."""
RELEASE = release(
    "HunyuanVideo",
    "hunyuanvideo-community/HunyuanVideo",
    "about 42 GB in bfloat16",
    "Tencent Hunyuan community licence, not valid everywhere",
    ("transformer", "vae", "text_encoder", "text_encoder_2"),
    _class_name="HunyuanVideoTransformer3DModel",
    num_layers=20,
    in_channels=16,
)


def call_hunyuan(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Flow eps - x0 [B,C,F,H,W] at latents [B,C,F,H,W] and t [B] in [0, 1000]."""
    dtype = network_type(denoiser)
    output = denoiser(
        hidden_states=x_t.to(dtype),
        timestep=t.to(x_t.dtype),
        encoder_hidden_states=condition["text"].to(dtype),
        encoder_attention_mask=condition["mask"].to(dtype),
        pooled_projections=condition["pooled"].to(dtype),
        guidance=torch.full((len(x_t),), 1000 * EMBEDDED_GUIDANCE, device=x_t.device, dtype=dtype),
        return_dict=False,
    )[0]
    return output.to(x_t.dtype)


@dataclass(frozen=True, kw_only=True)
class HunyuanText:
    """Prompts to Llama's states `text` [B,L,D] with `mask` [B,L] int64, and CLIP's `pooled` state [B,D']."""

    llama: Any
    clip: Any
    tokenize: Tokenize
    tokenize_clip: Tokenize
    device: torch.device
    template: str = DEFAULT_PROMPT_TEMPLATE["template"]
    """what Llama is asked around the prompt"""
    crop: int = DEFAULT_PROMPT_TEMPLATE["crop_start"]
    """tokens of the template before the prompt, which the network does not see"""

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Inside, both encoders stay on the device from one call to the next."""
        with visiting(self.llama, self.device), visiting(self.clip, self.device):
            yield

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Condition:
        ids, mask = (v.to(self.device) for v in self.tokenize([self.template.format(p) for p in prompts]))
        with visiting(self.llama, self.device):
            states = self.llama(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        ids_clip, _ = self.tokenize_clip(list(prompts))
        with visiting(self.clip, self.device):
            pooled = self.clip(ids_clip.to(self.device)).pooler_output
        text = states[-1 - SKIPPED_LAYERS][:, self.crop :]
        return {"text": text, "mask": mask[:, self.crop :], "pooled": pooled}


def decoded_latents(vae: Any, total: int, last: int) -> int:
    """How many leading latents the decoder needs for the frames up to `last`.

    It is not causal (its norms average over time), but long videos are decoded in overlapping spans of a few latents,
    each blended with the one before: what comes after the span of a frame has no part in it.
    """
    span, stride = vae.tile_sample_min_num_frames // 4, vae.tile_sample_stride_num_frames // 4
    if not vae.use_framewise_decoding or total <= span:
        return all_latents(vae, total, last)
    own = max(last - 1, 0) // vae.tile_sample_stride_num_frames
    return min(total, max(own * stride + span + 1, span + 1))


def untrained(tiny: bool) -> dict[str, Callable[[], nn.Module]]:
    """What makes untrained networks, by part; the denoiser's and autoencoder's full sizes are diffusers' defaults.

    Llama's are those of Llama 3 8B with the vocabulary of LLaVA, not confirmed by the release's files.
    """
    sizes: dict[str, Any] = {}
    vae: dict[str, Any] = {}
    llama: dict[str, Any] = dict(
        vocab_size=128320,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    clip: dict[str, Any] = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    if tiny:
        sizes = dict(num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1)
        sizes |= dict(num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(4, 6, 6))
        vae = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
        llama = dict(vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
        llama |= dict(num_key_value_heads=2)
        clip = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return {
        "transformer": lambda: HunyuanVideoTransformer3DModel(**sizes),
        "vae": lambda: AutoencoderKLHunyuanVideo(**vae),
        "text_encoder": lambda: LlamaModel(LlamaConfig(**llama, use_cache=False)),
        "text_encoder_2": lambda: CLIPTextModel(CLIPTextConfig(**clip, eos_token_id=1)),
    }


def load(
    spec: ModelSpec, *, weights: str, scale: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> PipelineModel:
    """`HUNYUAN_VIDEO`; see `vdm_env.models.releases.load_parts`. Random weights see prompts without a template."""
    tiny = scale == "tiny"
    loaded = load_parts(
        spec,
        RELEASE,
        {
            "transformer": HunyuanVideoTransformer3DModel,
            "vae": AutoencoderKLHunyuanVideo,
            "text_encoder": LlamaModel,
            "text_encoder_2": CLIPTextModel,
        },
        untrained(tiny),
        weights=weights,
        tiny=(9, 32, 32) if tiny else None,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    parts = loaded.networks
    plain: dict[str, Any] = {} if loaded.folder is not None else {"template": "{}", "crop": 0}
    tokens = (TINY_TOKENS if tiny else TEXT_TOKENS) + plain.get("crop", DEFAULT_PROMPT_TEMPLATE["crop_start"])
    return PipelineModel(
        spec=loaded.spec,
        denoiser=parts["transformer"],
        schedule=FlowSchedule(shift=SHIFT),
        codec=video_codec(parts["vae"], decoded_latents),
        text=HunyuanText(
            llama=parts["text_encoder"],
            clip=parts["text_encoder_2"],
            tokenize=loaded.tokenizer(tokens),
            tokenize_clip=loaded.tokenizer(CLIP_TOKENS, "tokenizer_2"),
            device=torch.device(device),
            **plain,
        ),
        call=call_hunyuan,
    )
