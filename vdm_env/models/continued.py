"""A model of one clip as a model of several clips side by side, of which each call denoises one.

`vdm_env.continuation` makes long videos with it. Latents are [B, C, N F, H, W] for N clips of F latent frames.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vdm_env.models.base import Condition, ModelSpec, VideoModel
from vdm_env.schedule import Schedule

CLIP = "clip"
"""Name of the condition, and of the observation, that says which clip is being made; [B] int64."""


@dataclass(frozen=True, kw_only=True)
class ContinuationModel:
    """A `VideoModel` of N clips: each video's network call goes to the clip that its condition names."""

    base: VideoModel
    """the model of one clip"""
    clips: int
    denoiser: nn.Module

    @property
    def spec(self) -> ModelSpec:
        return replace(self.base.spec, num_frames=self.clips * self.base.spec.num_frames)

    @property
    def schedule(self) -> Schedule:
        return self.base.schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output on the clip that is being made, 0 on the others; [B,C,N F,H,W].

        Raises:
            ValueError: the condition does not say which clip that is.
        """
        if CLIP not in condition:
            raise ValueError(
                "a continued video has no single condition: each clip starts from the one before. Losses at any t "
                "(DPO, NFT, regression, supervised) train on single clips: use the environment of one clip, env.single"
            )
        frames = x_t.shape[2] // self.clips
        at = clip_frames(condition[CLIP].to(x_t.device), frames)[:, None, :, None, None]
        at = at.expand(-1, x_t.shape[1], -1, *x_t.shape[3:])
        rest = {name: value for name, value in condition.items() if name != CLIP}
        model = self.base
        if self.denoiser is not model.denoiser:  # a policy that trains all weights has a network of its own
            model = copy.copy(model)
            object.__setattr__(model, "denoiser", self.denoiser)
        output = model.predict(x_t.gather(2, at), t, rest)
        return torch.zeros_like(x_t).scatter(2, at, output.to(x_t.dtype))

    def guidance(self, scale: float, num_frames: int) -> Tensor:
        """Guidance of every frame [N F]: that of a single video, for each clip."""
        frames = num_frames // self.clips
        of_frames = getattr(self.base, "guidance", None)
        single = torch.full((frames,), scale) if of_frames is None else of_frames(scale, frames)
        return single.repeat(self.clips)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        condition = self.base.encode_prompts(prompts)
        like = next(iter(condition.values()))
        return condition | {CLIP: torch.zeros(len(prompts), dtype=torch.int64, device=like.device)}

    def embedding(self) -> AbstractContextManager[None]:
        """The base model's, where it has one."""
        at_hand = getattr(self.base, "embedding", None)
        return nullcontext() if at_hand is None else at_hand()

    def unconditional(self, condition: Condition) -> Condition:
        """The base model's, for the same clip."""
        of_condition = getattr(self.base, "unconditional", None)
        clip = {CLIP: condition[CLIP]}
        if of_condition is None:
            return self.base.encode_prompts([""] * len(condition[CLIP])) | clip
        return of_condition({name: value for name, value in condition.items() if name != CLIP}) | clip

    def encode_images(self, images: Sequence[Tensor], drawn: Tensor | None = None) -> Condition:
        """The base model's, for images [3,H,W]."""
        return self.base.encode_images(images, drawn)  # type: ignore[attr-defined]

    def encode(self, video: Tensor) -> Tensor:
        """Latents of a joined video, clip by clip."""
        return torch.cat([self.base.encode(part) for part in video.chunk(self.clips, dim=1)], dim=2)

    def decode(self, latents: Tensor, frames: Tensor | None = None) -> Tensor:
        """The joined video; only clips with chosen frames [B,n] are decoded."""
        parts = latents.chunk(self.clips, dim=2)
        if frames is None:
            return torch.cat([self.base.decode(part) for part in parts], dim=1)
        length = self.base.spec.num_frames
        chosen = sorted({int(i) // length for i in frames.flatten()})
        video = torch.cat([self.base.decode(parts[clip]) for clip in chosen], dim=1)
        first = torch.zeros(self.clips, dtype=torch.int64)
        first[chosen] = torch.arange(len(chosen)) * length
        place = first[frames.cpu() // length] + frames.cpu() % length
        return video[torch.arange(len(video), device=video.device)[:, None], place.to(video.device)]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, N F, H, W).

        Raises:
            ValueError: frames that the clips cannot share equally, or a size the base model cannot make.
        """
        if num_frames % self.clips:
            raise ValueError(f"num_frames={num_frames} is not a multiple of the {self.clips} clips it is made of")
        channels, frames, h, w = self.base.latent_shape(num_frames // self.clips, height, width)
        return channels, self.clips * frames, h, w


def clip_frames(clip: Tensor, frames: int) -> Tensor:
    """Numbers [B,F] of the latent frames of clip [B] int64, for F latent frames a clip."""
    return clip[:, None] * frames + torch.arange(frames, device=clip.device)
