"""Numbers that condition VideoCrafter2's and T2V-Turbo's UNet besides text: frame rate, guidance scale, motion scale.

The original network adds them around the time embedding, where diffusers' `UNet3DConditionModel` has one place for a
single vector. The modules here take the place of its `time_embedding`; the UNet's argument `timestep_cond` then
carries a dictionary of numbers, one for each video, so that videos of one batch may differ in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from vdm_env.models import lvdm

CONDITIONING_FPS = 28.0
"""VideoCrafter2's inference script conditions on 28 frames a second (and saves at 10)."""
TURBO_FPS = 16.0
"""T2V-Turbo's."""
GUIDANCE_WIDTH = 256
"""Width of T2V-Turbo's embeddings of guidance scales."""


class FpsTimeEmbedding(nn.Module):
    """Time embedding plus a frame-rate embedding of VideoCrafter2: time_mlp(emb(t)) + fps_mlp(emb(fps)).

    Takes the place of a UNet3D's `time_embedding`; the UNet's argument `timestep_cond` is then a dictionary.

    Args:
        time_embedding: the UNet's own MLP.
        channels: width of the sinusoid, the UNet's first block's width.
        hidden: width of the embedding.
        default_fps: frames a second where none are given.
    """

    conditions: tuple[str, ...] = ("fps",)
    """names of the conditions it takes, each one number per video"""

    def __init__(
        self, time_embedding: nn.Module, channels: int, hidden: int, default_fps: float = CONDITIONING_FPS
    ) -> None:
        super().__init__()
        self.time_embedding = time_embedding
        self.fps_embedding = TimestepEmbedding(channels, hidden)
        self.channels = channels
        self.fps = default_fps

    def forward(self, sample: Tensor, condition: Mapping[str, Tensor] | None = None) -> Tensor:
        """[B, hidden] from the timesteps' sinusoids [B, channels]; `condition["fps"]` is [B] or [B,1].

        Raises:
            ValueError: a condition this network does not take, or not one number for each video.
        """
        fps = self._per_video(condition, "fps", sample, self.fps)
        sinusoid = get_timestep_embedding(fps, self.channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.time_embedding(sample) + self.fps_embedding(sinusoid.to(sample.dtype))

    def _per_video(self, given: Mapping[str, Tensor] | None, name: str, sample: Tensor, default: float) -> Tensor:
        """[B] float32."""
        unknown = set(given or ()) - set(self.conditions)
        if unknown:
            raise ValueError(f"this network takes the conditions {self.conditions} besides text, not {sorted(unknown)}")
        value = (given or {}).get(name)
        if value is None:
            return torch.full((len(sample),), default, device=sample.device)
        if value.numel() != len(sample) or len(value) != len(sample):
            raise ValueError(
                f"{name} is {tuple(value.shape)}, expected one number for each of the {len(sample)} videos: "
                "[B] or [B,1]"
            )
        return value.reshape(-1).to(sample.device, torch.float32)

    def load_conditioning(self, tensors: Mapping[str, Tensor], what: str = "the conditioning layers") -> None:
        """Takes over all weights but those of the UNet's own time embedding, strictly.

        Raises:
            CorruptWeightsError: a missing, extra or misshapen tensor.
        """
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("time_embedding.")}
        lvdm.check_tensors({name: tuple(tensor.shape) for name, tensor in own.items()}, tensors, what)
        self.load_state_dict(dict(tensors), strict=False)


def add_fps_embedding(unet: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Puts VideoCrafter2's frame-rate embedding into a UNet3D.

    Its weights are those of `lvdm.Conversion.conditioning`; random ones where None.

    Raises:
        CorruptWeightsError: tensors that do not fit.
    """
    channels = unet.config.block_out_channels[0]
    embedding = FpsTimeEmbedding(unet.time_embedding, channels, 4 * channels)
    if tensors is not None:
        embedding.load_conditioning(tensors)
    unet.time_embedding = embedding.to(unet.device, unet.dtype)


def guidance_embedding(w: Tensor, width: int = GUIDANCE_WIDTH) -> Tensor:
    """Sinusoid [B, width] float32 of guidance scales w [B].

    Sines, then cosines, of 1000 w at width/2 frequencies from 1 to 1/10000.

    Raises:
        ValueError: an odd width, or one below 4.
    """
    if width < 4 or width % 2:
        raise ValueError(f"width={width}: expected an even number of at least 4")
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=w.device) * (-math.log(10000.0) / (half - 1))
    )
    angles = 1000.0 * w.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class GuidedTimeEmbedding(FpsTimeEmbedding):
    """`FpsTimeEmbedding` whose timestep sinusoid is first shifted by a projection of the guidance scale's embedding.

    Conditions: "guidance" w and "motion", each [B] or [B,1]; without "guidance" nothing is added, without "motion" its
    layers are skipped. "motion" needs "guidance".

    Args:
        time_embedding, channels, hidden, default_fps: as in `FpsTimeEmbedding`.
        guidance_width: of the embedding of w.
        motion_width: of the embedding of the motion scale; None: a network without (v1).
    """

    conditions: tuple[str, ...] = ("fps", "guidance", "motion")

    def __init__(
        self,
        time_embedding: nn.Module,
        channels: int,
        hidden: int,
        *,
        guidance_width: int = GUIDANCE_WIDTH,
        motion_width: int | None = None,
        default_fps: float = CONDITIONING_FPS,
    ) -> None:
        super().__init__(time_embedding, channels, hidden, default_fps)
        self.time_cond_proj = nn.Linear(guidance_width, channels, bias=False)
        if motion_width is not None:
            self.motion_cond_proj = nn.Linear(motion_width, channels, bias=False)
            self.combine_proj = nn.Linear(2 * channels, channels, bias=False)
        else:
            self.conditions = ("fps", "guidance")

    def forward(self, sample: Tensor, condition: Mapping[str, Tensor] | None = None) -> Tensor:
        given = condition or {}
        if "motion" in given and "guidance" not in given:
            raise ValueError("condition 'motion' needs condition 'guidance' beside it")
        if "guidance" in given:
            shift = self._project(self.time_cond_proj, given, "guidance", sample)
            if "motion" in given and "motion" in self.conditions:
                motion = self._project(self.motion_cond_proj, given, "motion", sample)
                shift = self.combine_proj(torch.cat([shift, motion], dim=1))
            sample = sample + shift
        return super().forward(sample, condition)

    def _project(self, layer: nn.Linear, given: Mapping[str, Tensor], name: str, sample: Tensor) -> Tensor:
        scale = self._per_video(given, name, sample, 0.0)
        return layer(guidance_embedding(scale, layer.in_features).to(sample.dtype))


def add_guided_embedding(
    unet: Any,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    guidance_width: int = GUIDANCE_WIDTH,
    motion_width: int | None = None,
    default_fps: float = TURBO_FPS,
) -> None:
    """Puts a `GuidedTimeEmbedding` into a UNet3D.

    Its weights are those of `lvdm.convert_unet`'s "conditioning"; random ones where None.

    Raises:
        CorruptWeightsError: tensors that do not fit.
    """
    channels = unet.config.block_out_channels[0]
    embedding = GuidedTimeEmbedding(
        unet.time_embedding,
        channels,
        4 * channels,
        guidance_width=guidance_width,
        motion_width=motion_width,
        default_fps=default_fps,
    )
    if tensors is not None:
        embedding.load_conditioning(tensors)
    unet.time_embedding = embedding.to(unet.device, unet.dtype)
