"""What the families of diffusers pipelines share: video autoencoders, text encoders, and the model they make.

CogVideoX, Wan, HunyuanVideo, LTX-Video and Mochi are published as diffusers folders (transformer/, vae/, text_encoder/,
tokenizer/) and differ in a few facts each; `vdm_env.models.cogvideox` and its neighbours hold those.

Legend: B videos, C latent channels, F latent frames, H W latent rows and columns, L text tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, T5Config, T5EncoderModel

from vdm_env.host import upload
from vdm_env.models.base import Condition, ModelSpec, embedding, frozen, latent_shape
from vdm_env.models.codec import tile_decoding
from vdm_env.models.opensora_weights import Tokenize
from vdm_env.models.visiting import visiting
from vdm_env.schedule import Schedule

Needed = Callable[[Any, int, int], int]
"""(autoencoder, latent frames there are, last video frame wanted) to the number of leading latent frames to decode."""


# --------------------------------------------------------------------------------------------------- autoencoders


def all_latents(vae: Any, total: int, last: int) -> int:
    """For decoders that look ahead in time: every frame depends on all latents."""
    return total


def causal_latents(stride: int) -> Needed:
    """For causal decoders: latent frame 0 gives video frame 0, each later one gives `stride` frames of its own."""

    def needed(vae: Any, total: int, last: int) -> int:
        return min(total, math.ceil(last / stride) + 1)

    return needed


@dataclass(frozen=True, kw_only=True)
class VideoCodec:
    """A video autoencoder of diffusers, with the normalisation of its latents: (z - mean) * scale.

    Decoding chosen frames: these autoencoders compress time, so a frame cannot be decoded alone. A causal decoder
    computes frame j from the latents up to its own and from none behind it, so decoding stops there, and what
    is left out changes nothing: early frames are cheap, the last one costs a whole video. What `needed` says is exact
    for each family; those that look ahead decode everything and then choose.
    """

    vae: Any
    needed: Needed = all_latents
    takes_time: bool = False
    """whether the decoder takes a timestep (later versions of LTX-Video); it is given 0, clean latents"""

    def norm(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale, each [C,1,1,1] or a single number, in the type of `like`."""
        config = self.vae.config
        scale = torch.full((), float(config.get("scaling_factor") or 1.0), device=like.device, dtype=like.dtype)
        stored = dict(self.vae.named_buffers(recurse=False))  # LTX-Video keeps them there, the others in the config
        mean, std = (stored.get(name, config.get(name)) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return torch.zeros_like(scale), scale
        mean, std = (upload(torch.as_tensor(v), like.device, like.dtype).reshape(-1, 1, 1, 1) for v in (mean, std))
        return mean, scale / std

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[B,F,3,H,W] in [0,1] to normalised latents [B,C,F',h,w] (the posterior's mode)."""
        z = self.vae.encode(video.transpose(1, 2).to(self.vae.dtype) * 2 - 1).latent_dist.mode()
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        mean, scale = self.norm(z)
        return (z - mean) * scale

    def decode(self, latents: Tensor, frames: Tensor | None = None) -> Tensor:
        """Normalised latents [B,C,F,h,w] to [B,n,3,H,W] in [0,1]; see the class for `frames` [B,n]."""
        if frames is not None:
            latents = latents[:, :, : self.needed(self.vae, latents.shape[2], int(frames.max()))]
        mean, scale = self.norm(latents)
        z = (latents / scale + mean).to(self.vae.dtype)
        if self.takes_time:
            decoded = self.vae.decode(z, torch.zeros(len(z), device=z.device, dtype=z.dtype)).sample
        else:
            decoded = self.vae.decode(z).sample
        video = decoded.transpose(1, 2)
        if frames is not None:
            video = video[torch.arange(len(video), device=video.device)[:, None], frames.to(video.device)]
        return (video.to(latents.dtype) / 2 + 0.5).clamp(0, 1)


def video_codec(vae: Any, needed: Needed) -> VideoCodec:
    """Frozen, one video at a time, and recomputing its blocks in the backward pass where the class can.

    Both save memory and change no number beyond rounding. Recomputing is safe here: the autoencoder has no adapters.
    """
    takes_time = bool(vae.config.get("timestep_conditioning"))
    frozen(vae)
    if not takes_time:  # diffusers cannot slice a batch that has timesteps
        vae.enable_slicing()
    if vae._supports_gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return VideoCodec(vae=vae, needed=needed, takes_time=takes_time)


# ----------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True, kw_only=True)
class TokenStates:
    """A T5-like encoder. Prompts to `text` [B,L,D], and `mask` [B,L] int64 where the network is told it.

    Every prompt is embedded once by the environment, which keeps the result; the encoder (4.8 to 5.7 billion parameters
    at full size) is on the device only meanwhile.
    """

    encoder: Any
    tokenize: Tokenize
    device: torch.device
    attend_mask: bool = True
    """the encoder does not attend to padding"""
    zero_padding: bool = False
    """states of padding are replaced by zeros"""
    give_mask: bool = False
    """the network is told the mask"""
    empty_is_nothing: bool = False
    """"" is padding only, with a mask of zeros, instead of an end token"""
    clean: Callable[[str], str] = str

    def visit(self) -> AbstractContextManager[None]:
        """Inside, the encoder stays on the device from one call to the next."""
        return visiting(self.encoder, self.device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Condition:
        ids, mask = (v.to(self.device) for v in self.tokenize([self.clean(p) for p in prompts]))
        if self.empty_is_nothing:
            said = torch.tensor([bool(p) for p in prompts], device=self.device)[:, None]
            ids, mask = ids * said, mask * said
        with visiting(self.encoder, self.device):
            attended = mask if self.attend_mask else None
            text = self.encoder(input_ids=ids, attention_mask=attended).last_hidden_state
        if self.zero_padding:
            text = text * mask[..., None].to(text.dtype)
        return {"text": text} | ({"mask": mask} if self.give_mask else {})


T5_XXL: dict[str, Any] = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
"""Encoder of T5-v1.1-XXL, 4.762 billion parameters."""
TINY_T5: dict[str, Any] = dict(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
TINY_TOKENS = 32


def random_t5(tiny: bool, encoder: Any = T5EncoderModel, config: Any = T5Config, **changes: Any) -> nn.Module:
    """An untrained encoder of the T5 family."""
    sizes = TINY_T5 if tiny else T5_XXL | changes
    settings: PreTrainedConfig = config(**sizes, feed_forward_proj="gated-gelu", use_cache=False)
    return encoder(settings) if tiny else drawn_once(encoder, settings)


def drawn_once(encoder: Any, settings: Any) -> nn.Module:
    """An untrained encoder of the T5 family, on the default device, each weight drawn once.

    The class itself draws each of its weights, up to 5.7 billion, three times, of which the last stays. The deviations
    are the same: 1 of token embeddings, otherwise one over the root of the number of inputs (of queries, of that times
    the width of a head); norms are 1.
    """
    place = torch.get_default_device()
    with torch.device("meta"):
        network: Any = encoder(settings)
    network.to_empty(device=place)
    network.tie_weights()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
                continue
            inputs = settings.d_model if "relative_attention_bias" in name else weight.shape[1]
            scaled = settings.d_kv if name.endswith("SelfAttention.q.weight") else 1
            weight.normal_(0.0, 1.0 if name == "shared.weight" else (inputs * scaled) ** -0.5)
    return network


# -------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True, kw_only=True)
class PipelineModel:
    """A `VideoModel` from the networks of a diffusers pipeline; `call` runs the network in its own conventions."""

    spec: ModelSpec
    denoiser: nn.Module
    schedule: Schedule
    codec: Any
    text: Callable[[Sequence[str]], Condition]
    call: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    schedule_for: Callable[[int, int, int], Schedule] | None = None
    """the schedule for (num_frames, height, width), for models whose noise grid depends on the size"""
    guidance_at: Callable[[float, Tensor], Tensor] | None = None
    """guidance [B] at timesteps [B] of a policy with guidance w, where the release changes it on the way"""

    def with_size(self, num_frames: int, height: int, width: int) -> PipelineModel:
        """The same networks for videos of another size, in frames and pixels.

        Raises:
            ValueError: a size the model cannot make.
        """
        self.latent_shape(num_frames, height, width)
        spec = replace(self.spec, num_frames=num_frames, height=height, width=width)
        schedule = self.schedule if self.schedule_for is None else self.schedule_for(num_frames, height, width)
        return replace(self, spec=spec, schedule=schedule)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.call(self.denoiser, x_t, t, condition)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return self.text(prompts)

    def embedding(self) -> AbstractContextManager[None]:
        """Inside, several `encode_prompts` move the text encoders to the device and back only once."""
        return embedding(self.text)

    def encode(self, video: Tensor) -> Tensor:
        return self.codec.encode(video)

    def decode(self, latents: Tensor, frames: Tensor | None = None) -> Tensor:
        return self.codec.decode(latents, frames)

    def tile_decoding(self, on: bool = True) -> None:
        """Encodes and decodes large pictures in overlapping tiles: less memory, slightly other pixels at the seams."""
        tile_decoding(self.codec.vae, on)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return latent_shape(self.spec, num_frames, height, width)


def network_type(denoiser: nn.Module) -> torch.dtype:
    """The type of a network as a whole: diffusers keeps single layers (norms, time embeddings) in float32."""
    return denoiser.dtype  # type: ignore[return-value]
