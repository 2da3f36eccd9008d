"""STDiT3, the network of Open-Sora 1.2: a transformer that attends over space and over time in turn.

Every layer is a pair of blocks: one attends within each frame, one along time at each place. Both then read the
caption by cross attention and modulate, shift and gate with the timestep (adaLN-single of PixArt, arXiv 2310.00426).
Parameter names are those of the released checkpoint (`hpcai-tech/OpenSora-STDiT-v3`), so its tensors load strictly.

Conventions are the network's own: t in [0, 1000] with 1000 pure noise, and the velocity it emits points to the data
(x0 - eps). `vdm_env.models.opensora` turns them into this package's.

Legend: B videos, C latent channels, F latent frames, H W latent rows and columns, S tokens of a frame, D hidden
width, L text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vdm_env.host import upload
from vdm_env.models.fused import plus_product, turned

_SINUSOID = 256  # width of the sinusoids of t and fps
_THETA = 10000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class STDiT3Config:
    """Sizes of the network; the defaults are the released STDiT3-XL/2 (1.208 billion parameters)."""

    hidden_size: int = 1152
    depth: int = 28
    """pairs of a spatial and a temporal block"""
    num_heads: int = 16
    mlp_ratio: float = 4.0
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """latent frames, rows and columns of a token"""
    caption_channels: int = 4096
    """width of the text encoder's states"""
    model_max_length: int = 300
    """text tokens, the length of the learned null caption"""
    pred_sigma: bool = True
    """emits a second set of channels, which sampling does not use"""
    qk_norm: bool = True
    input_sq_size: int = 512
    """side of the square picture, in pixels, at which positions count 1"""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 4 or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 4 and give num_heads={self.num_heads} heads of "
                "an even width"
            )
        if len(self.patch_size) != 3 or min(self.patch_size) < 1 or self.depth < 1:
            raise ValueError(
                f"expected three positive patch sizes and depth >= 1, got {self.patch_size} and {self.depth}"
            )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> STDiT3Config:
        """From a released `config.json`; settings of training and of kernels are not needed and left out."""
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        if "patch_size" in known:
            known["patch_size"] = tuple(known["patch_size"])
        return cls(**known)

    @property
    def out_channels(self) -> int:
        """Channels the network emits."""
        return self.in_channels * (2 if self.pred_sigma else 1)


# ------------------------------------------------------------------------------------------- numbers without weights


def exact(dtype: torch.dtype) -> torch.dtype:
    """The type for angles and norms: float32, or float64 in a float64 network."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sinusoid(values: Tensor, width: int = _SINUSOID) -> Tensor:
    """Embedding [B, width] of numbers [B]: cosines, then sines, of frequencies falling from 1 to almost 1 / 10000."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=values.device, dtype=values.dtype) * (-math.log(_THETA) / half))
    angles = values[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(
    rows: int, columns: int, width: int, *, height: float, pixel_width: float, input_sq_size: int, like: Tensor
) -> Tensor:
    """Fixed positions of a frame's tokens, [rows * columns, width]: sines and cosines of the column, then of the row.

    Coordinates are stretched so that the grid spans the side of a square of as many tokens, then divided by the
    picture's size in units of `input_sq_size`: what counts is the size in pixels that was asked for, not the
    latents'.
    """
    dtype, device = exact(like.dtype), like.device
    side, scale = round(math.sqrt(rows * columns)), math.sqrt(height * pixel_width) / input_sq_size

    def axis(cells: int) -> Tensor:
        place = torch.arange(cells, device=device, dtype=dtype) / scale * (side / cells)
        rates = _THETA ** -(torch.arange(0, width // 2, 2, device=device, dtype=dtype) / (width // 2))
        angles = place[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    along_row, along_column = axis(columns)[None].expand(rows, -1, -1), axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([along_row, along_column], dim=-1).flatten(0, 1).to(like.dtype)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding: neighbouring pairs of x [..., L, d] turned by angles [L, d/2]."""
    return turned(x, torch.polar(torch.ones_like(angles), angles).to(exact(x.dtype).to_complex()))


# ------------------------------------------------------------------------------------------------------------ layers


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ScalarEmbedder(nn.Module):
    """A number per video (timestep or frame rate) to [B, D]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_SINUSOID, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, values: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(sinusoid(values.to(exact(dtype))).to(dtype))


class CaptionEmbedder(nn.Module):
    """Text states to the network's width; holds the learned null caption of guidance."""

    y_embedding: Tensor

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        null = torch.randn(config.model_max_length, config.caption_channels) / math.sqrt(config.caption_channels)
        self.register_buffer("y_embedding", null)
        self.y_proj = Mlp(config.caption_channels, config.hidden_size, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.y_proj(y)


class PatchEmbedder(nn.Module):
    """Latents to tokens, one convolution without overlap."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class HeadNorm(nn.Module):
    """Root-mean-square norm of queries and keys, computed in float32 whatever the network's type.

    In half precision the release rounds before it multiplies by the weight, and once more after; here the product is
    rounded alone, in one kernel on a GPU.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class SelfAttention(nn.Module):
    """Attention within each row of [N, L, D]; with angles, queries and keys are rotated after their norm."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = HeadNorm(width // self.heads) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // self.heads) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Every token of a video [B, N, D] reads its caption [B, L, D]; mask [B, 1, 1, L] is True on real text."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(y).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift."""
    return plus_product(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Block(nn.Module):
    """Self-attention over space or over time, cross attention to the caption, MLP."""

    def __init__(self, config: STDiT3Config, temporal: bool) -> None:
        super().__init__()
        width, self.temporal = config.hidden_size, temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / math.sqrt(width))
        self.attn, self.cross_attn = SelfAttention(config), CrossAttention(config)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None, time: Tensor, angles: Tensor) -> Tensor:
        """Tokens x [B,F,S,D]; time [B,F or 1,6,D] holds shift, scale and gate of the attention, then of the MLP."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (self.scale_shift_table + time).unsqueeze(2).unbind(3)
        h = modulated(x, shift_a, scale_a)
        if self.temporal:
            h = (
                self.attn(h.transpose(1, 2).flatten(0, 1), angles)
                .unflatten(0, (x.shape[0], x.shape[2]))
                .transpose(1, 2)
            )
        else:
            h = self.attn(h.flatten(0, 1), None).unflatten(0, x.shape[:2])
        x = plus_product(x, h, gate_a)
        x = x + self.cross_attn(x.flatten(1, 2), y, mask).view_as(x)
        return plus_product(x, self.mlp(modulated(x, shift_m, scale_m)), gate_m)


class FinalLayer(nn.Module):
    """Tokens to patches of the output."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = nn.Linear(width, math.prod(config.patch_size) * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / math.sqrt(width))

    def forward(self, x: Tensor, time: Tensor, time_zero: Tensor | None, free: Tensor | None) -> Tensor:
        """Tokens x [B,F,S,D], time embeddings [B,D]; free [B,F,1,1] is False on frames that are given."""
        x = self._modulated(x, time)
        if time_zero is not None and free is not None:
            # As released: given frames are normed and modulated a second time, on top of the first.
            x = torch.where(free, x, self._modulated(x, time_zero))
        return self.linear(x)

    def _modulated(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time[:, None])[:, :, None, None].unbind(1)
        return modulated(x, shift, scale)


class Rope(nn.Module):
    """Holder of the rotary frequencies, which the release keeps in its checkpoint; stays float32 at construction."""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer(
            "freqs", _THETA ** -(torch.arange(0, width, 2, dtype=exact(torch.get_default_dtype())) / width)
        )

    def forward(self, frames: int) -> Tensor:
        """Angles [F, d/2] of frames 0 .. F-1."""
        freqs = self.freqs.to(exact(self.freqs.dtype))
        return torch.arange(frames, device=freqs.device, dtype=freqs.dtype)[:, None] * freqs


class STDiT3(nn.Module):
    """The network; see the module's docstring.

    Attributes:
        config: its sizes.
        gradient_checkpointing: recompute each block in the backward pass instead of storing what is inside it.
    """

    _supports_gradient_checkpointing = True

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        width = config.hidden_size
        self.x_embedder, self.t_embedder, self.fps_embedder = (
            PatchEmbedder(config),
            ScalarEmbedder(width),
            ScalarEmbedder(width),
        )
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config)
        self.spatial_blocks = nn.ModuleList(Block(config, temporal=False) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(Block(config, temporal=True) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.rope = Rope(width // config.num_heads)

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes every block in the backward pass."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Stores activations again."""
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        *,
        fps: Tensor | float,
        height: Tensor | float,
        width: Tensor | float,
        x_mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity towards the data [B, out_channels, F, H, W]; its first C channels are what samplers use.

        Args:
            x: latents [B,C,F,H,W]; sizes that patches do not divide are padded with zeros, and the output is cut back.
            timestep: [B] in [0, 1000].
            y: caption states [B,1,L,caption_channels] or [B,L,caption_channels].
            mask: [B,L], 1 on real text; one of fewer rows is repeated as a whole (guidance gives the null caption its
                prompt's mask).
            fps: frames a second, one number or one for each video (fewer are repeated).
            height: of the video in pixels, as asked for; the first number counts for all videos.
            width: likewise.
            x_mask: [B,F] bool; False marks frames that are given clean, which get the modulation of t = 0.

        Raises:
            ValueError: shapes that do not belong together.
        """
        batch, dtype = len(x), self.x_embedder.proj.weight.dtype
        y = y.flatten(1, 2) if y.ndim == 4 else y
        if len(timestep) != batch or len(y) != batch or y.shape[-1] != self.config.caption_channels:
            raise ValueError(
                f"{batch} videos need t [{batch}] and captions [{batch}, L, {self.config.caption_channels}]; "
                f"got {tuple(timestep.shape)} and {tuple(y.shape)}"
            )
        tokens = self.x_embedder(F.pad(x, self._padding(x)).to(dtype))  # [B,D,F',H',W']
        grid = tokens.shape[2:]
        tokens = tokens.flatten(3).permute(0, 2, 3, 1)
        tokens = tokens + position_embedding(
            grid[1],
            grid[2],
            self.config.hidden_size,
            height=_first(height),
            pixel_width=_first(width),
            input_sq_size=self.config.input_sq_size,
            like=tokens,
        )
        rate = self.fps_embedder(_repeated(upload(torch.as_tensor(fps), x.device).reshape(-1), batch, "fps"))
        time = self.t_embedder(timestep) + rate
        modulation = self.t_block(time).view(batch, 1, 6, -1)
        time_zero = free = None
        if x_mask is not None:
            if x_mask.shape != (batch, grid[0]):
                raise ValueError(f"x_mask must be [B, F] = {(batch, grid[0])}, got {tuple(x_mask.shape)}")
            time_zero = self.t_embedder(torch.zeros_like(timestep)) + rate
            free = x_mask.bool()[:, :, None, None]
            modulation = torch.where(free, modulation, self.t_block(time_zero).view(batch, 1, 6, -1))
        text = self.y_embedder(y.to(dtype))
        if mask is not None:
            mask = _repeated(mask, batch, "mask").bool()[:, None, None, :]
        angles = self.rope(grid[0])
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = self._run(spatial, tokens, text, mask, modulation, angles)
            tokens = self._run(temporal, tokens, text, mask, modulation, angles)
        return self._patches_to_latents(self.final_layer(tokens, time, time_zero, free), grid, x.shape[2:])

    def _run(self, block: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)  # nothing here is random
        return block(*args)

    def _padding(self, x: Tensor) -> list[int]:
        """For `torch.nn.functional.pad`: zeros behind columns, rows and frames, up to whole patches."""
        sizes = zip(reversed(x.shape[2:]), reversed(self.config.patch_size), strict=True)
        return [side for size, patch in sizes for side in (0, -size % patch)]

    def _patches_to_latents(self, x: Tensor, grid: torch.Size, size: torch.Size) -> Tensor:
        """[B,F',S,patch * channels] back to [B,channels,F,H,W]."""
        x = x.unflatten(2, tuple(grid[1:])).unflatten(-1, (*self.config.patch_size, -1))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, : size[0], : size[1], : size[2]]


def _first(value: Tensor | float) -> float:
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)


def _repeated(rows: Tensor, batch: int, name: str) -> Tensor:
    """The rows, repeated as a whole until there are `batch`."""
    if batch % len(rows):
        raise ValueError(f"{name} has {len(rows)} rows, which do not divide the {batch} videos")
    return rows.repeat(batch // len(rows), *[1] * (rows.ndim - 1))
