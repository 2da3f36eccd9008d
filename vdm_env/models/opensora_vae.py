"""The video autoencoder of Open-Sora 1.2: an image autoencoder frame by frame, then a causal one along time.

The spatial stage is diffusers' `AutoencoderKL` (8x8 pixels to a cell); the temporal stage turns each chunk of 17
frames into 5. No convolution looks ahead in time, and chunks know nothing of each other. Parameter names are those of
the released checkpoint (`hpcai-tech/OpenSora-VAE-v1.2`), so its tensors load strictly.

Legend: B videos, F video frames, f latent frames, H W pixels, h w latent cells; all tensors here are [B, channels,
time, rows, columns].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from vdm_env.models.codec import recomputed

SPATIAL_STRIDE = 8
_SDXL_VAE: dict[str, Any] = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=32,
    sample_size=512,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TemporalVAEConfig:
    """Sizes of the temporal stage; the defaults are the release's (310 million parameters)."""

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """whether time is halved after each level but the last"""
    num_groups: int = 32

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample {self.temporal_downsample} must have one entry less than channel_multipliers "
                f"{self.channel_multipliers}"
            )

    @property
    def stride(self) -> int:
        """Frames to a latent frame."""
        return 2 ** sum(self.temporal_downsample)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoVAEConfig:
    """Both stages, the chunks, and the normalisation of the latents; the defaults are the release's."""

    temporal: TemporalVAEConfig = field(default_factory=TemporalVAEConfig)
    spatial: dict[str, Any] = field(default_factory=lambda: dict(_SDXL_VAE))
    """arguments of diffusers' `AutoencoderKL`; its own scaling factor is not used"""
    chunk_frames: int = 17
    """frames the temporal stage sees at a time"""
    batch_frames: int = 4
    """frames the spatial stage takes at a time; for memory only"""
    spatial_scale: float = 0.18215
    """factor on the spatial stage's latents (not the 0.13025 of that autoencoder's own config)"""
    shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)
    """latents are (z - shift) / scale, channel by channel"""
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video: 5 for each whole chunk of 17, and the rest's quarter rounded up."""
        whole, rest = divmod(num_frames, self.chunk_frames)
        stride = self.temporal.stride
        return whole * math.ceil(self.chunk_frames / stride) + math.ceil(rest / stride)

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(f, h, w); a rest of fewer than 8 pixels is cut, so that 426 columns give 53 and come back as 424."""
        return self.latent_frames(num_frames), height // SPATIAL_STRIDE, width // SPATIAL_STRIDE


# --------------------------------------------------------------------------------------------------- temporal stage


class CausalConv3d(nn.Module):
    """Convolution whose window ends at the last of the frames it merges: the zeros all stand before the first one."""

    def __init__(self, cin: int, cout: int, kernel: int, *, time_stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        side = kernel // 2
        self.past = kernel - time_stride
        self.conv = nn.Conv3d(cin, cout, kernel, stride=(time_stride, 1, 1), padding=(0, side, side), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 0, self.past, 0)) if self.past else x)


class ResBlock(nn.Module):
    """Two normed causal convolutions beside a shortcut, which has a 1x1x1 convolution where the width changes."""

    def __init__(self, cin: int, cout: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, cin), CausalConv3d(cin, cout, 3, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(groups, cout), CausalConv3d(cout, cout, 3, bias=False)
        self.conv3 = CausalConv3d(cin, cout, 1, bias=False) if cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv3 is None else self.conv3(x))


def _blocks(cin: int, cout: int, config: TemporalVAEConfig) -> nn.ModuleList:
    return nn.ModuleList(
        ResBlock(cin if i == 0 else cout, cout, config.num_groups) for i in range(config.num_res_blocks)
    )


class TemporalEncoder(nn.Module):
    """Frames [B,C,F,h,w] to features [B,2 * latent_embed_dim,F/stride,h,w]."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = [config.filters * m for m in config.channel_multipliers]
        self.conv_in = CausalConv3d(config.in_out_channels, config.filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            _blocks(before, width, config) for before, width in zip([config.filters, *widths], widths, strict=False)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, time_stride=2) if down else nn.Identity()
            for width, down in zip(widths, config.temporal_downsample, strict=False)
        )
        self.res_blocks = _blocks(widths[-1], widths[-1], config)
        self.norm1 = nn.GroupNorm(config.num_groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = _through(blocks, x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        return self.conv2(F.silu(self.norm1(_through(self.res_blocks, x))))


class TemporalDecoder(nn.Module):
    """The mirror of the encoder; a doubled width is unfolded into twice the frames."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = [config.filters * m for m in config.channel_multipliers]
        self.conv1 = CausalConv3d(config.latent_embed_dim, widths[-1], 3)
        self.res_blocks = _blocks(widths[-1], widths[-1], config)
        # Levels are numbered as in the encoder and walked from the last to the first.
        self.block_res_blocks = nn.ModuleList(
            _blocks(above, width, config) for width, above in zip(widths, [*widths[1:], widths[-1]], strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(above, 2 * above, 3) if up else nn.Identity()
            for above, up in zip(widths[1:], config.temporal_downsample, strict=True)
        )
        self.norm1 = nn.GroupNorm(config.num_groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], config.in_out_channels, 3)
        self._doubles = config.temporal_downsample

    def forward(self, x: Tensor) -> Tensor:
        x = _through(self.res_blocks, self.conv1(x))
        for level in reversed(range(len(self.block_res_blocks))):
            x = _through(self.block_res_blocks[level], x)
            if level and self._doubles[level - 1]:
                x = self.conv_blocks[level - 1](x)
                x = x.unflatten(1, (-1, 2)).movedim(2, 3).flatten(2, 3)
        return self.conv_out(F.silu(self.norm1(x)))


def _through(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class TemporalVAE(nn.Module):
    """The temporal stage on one chunk."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = TemporalEncoder(config), TemporalDecoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_embed_dim, 1)

    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance [B,2 * embed_dim,f,h,w]; zeros are put before the chunk until the stride divides it."""
        return self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.config.stride, 0))))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """The chunk's `num_frames` frames; what belongs to the zeros before it is dropped."""
        return self.decoder(self.post_quant_conv(z))[:, :, -num_frames % self.config.stride :]


# ------------------------------------------------------------------------------------------------------ both stages


class OpenSoraVAE(nn.Module):
    """Both stages and the normalisation of the latents; everything is deterministic: posteriors count by their mean."""

    scale: Tensor
    shift: Tensor

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_vae = nn.ModuleDict({"module": AutoencoderKL(**config.spatial)})
        self.temporal_vae = TemporalVAE(config.temporal)
        self.register_buffer("scale", torch.tensor(config.scale).view(1, -1, 1, 1, 1))
        self.register_buffer("shift", torch.tensor(config.shift).view(1, -1, 1, 1, 1))

    @property
    def _images(self) -> Any:
        return self.spatial_vae["module"]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.temporal_vae.quant_conv.conv.weight.dtype

    def spatial_encode(self, video: Tensor) -> Tensor:
        """Frames [B,3,F,H,W] in [-1, 1] to scaled cells [B,4,F,h,w]."""
        images = video.transpose(1, 2).flatten(0, 1).to(self.dtype)
        means = [self._images.encode(part).latent_dist.mean for part in images.split(self.config.batch_frames)]
        cells = torch.cat(means) * self.config.spatial_scale
        return cells.unflatten(0, (len(video), -1)).transpose(1, 2)

    def spatial_decode(self, cells: Tensor) -> Tensor:
        """Scaled cells [B,4,F,h,w] to frames [B,3,F,8h,8w], about in [-1, 1].

        With gradients, each batch of frames is computed anew in the backward pass: a decoder's activations at full
        size are what memory runs out on.
        """
        images = cells.transpose(1, 2).flatten(0, 1).to(self.dtype) / self.config.spatial_scale
        parts = [recomputed(self._decode_images, part) for part in images.split(self.config.batch_frames)]
        return torch.cat(parts).unflatten(0, (len(cells), -1)).transpose(1, 2)

    def _decode_images(self, cells: Tensor) -> Tensor:
        return self._images.decode(cells).sample

    def encode(self, video: Tensor) -> Tensor:
        """Frames [B,3,F,H,W] in [-1, 1] to diffusion latents [B,4,f,h,w]."""
        chunks = self.spatial_encode(video).split(self.config.chunk_frames, dim=2)
        means = [self.temporal_vae.moments(chunk).chunk(2, dim=1)[0] for chunk in chunks]
        return (torch.cat(means, dim=2) - self.shift) / self.scale

    def temporal_decode(self, latents: Tensor, num_frames: int, needed: Sequence[int] | None = None) -> Tensor:
        """Diffusion latents [B,4,f,h,w] to scaled cells [B,4,F,h,w].

        Args:
            latents: of a video of `num_frames` frames.
            num_frames: F.
            needed: the frames that will be looked at; cells of chunks without any of them are left zero. None is all.
                With gradients, each chunk is computed anew in the backward pass.

        Raises:
            ValueError: as many latent frames as such a video cannot have.
        """
        config = self.config
        if latents.shape[2] != config.latent_frames(num_frames):
            raise ValueError(
                f"a video of {num_frames} frames has {config.latent_frames(num_frames)} latent frames, "
                f"got {latents.shape[2]}"
            )
        z = latents.to(self.dtype) * self.scale + self.shift
        chosen = None if needed is None else {frame // config.chunk_frames for frame in needed}
        parts: list[Tensor] = []
        for i, chunk in enumerate(z.split(config.latent_frames(config.chunk_frames), dim=2)):
            frames = min(config.chunk_frames, num_frames - i * config.chunk_frames)
            if chosen is None or i in chosen:
                parts.append(recomputed(self.temporal_vae.decode, chunk, frames))
            else:
                parts.append(chunk.new_zeros(*chunk.shape[:2], frames, *chunk.shape[3:]))
        return torch.cat(parts, dim=2)

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """Diffusion latents [B,4,f,h,w] to frames [B,3,F,8h,8w], about in [-1, 1], not clamped."""
        return self.spatial_decode(self.temporal_decode(latents, num_frames))


def temporal_config(config: dict[str, Any]) -> TemporalVAEConfig:
    """From a dictionary with the same names; lists become tuples."""
    known: dict[str, Any] = {f.name: config[f.name] for f in fields(TemporalVAEConfig) if f.name in config}
    known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    return TemporalVAEConfig(**known)
