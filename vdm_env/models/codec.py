"""Image autoencoders that encode and decode a video frame by frame, a few frames at a time.

Legend: B videos, C latent channels, F frames, H W pixels, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vdm_env.models.recompute import layers_recomputed

PIXELS_AT_ONCE = 2**18
"""Pixels that go through an autoencoder together: one frame of 512x512, or 256 of 32x32."""
LARGE_FRAME = 2**16
"""Pixels of a frame from which the decoder's layers are computed anew in the backward pass, one by one: 256x256."""


def recomputed(run: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
    """`run(x, ...)`; with gradients, what is inside it is computed anew in the backward pass instead of being kept.

    Only for functions that draw no random numbers.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return checkpoint(run, x, *more, use_reentrant=False, preserve_rng_state=False)
    return run(x, *more)


def tile_decoding(vae: Any, on: bool = True) -> None:
    """Switches the tiles of a diffusers autoencoder on or off.

    Raises:
        ValueError: the class has no tiles.
    """
    try:
        vae.enable_tiling() if on else vae.disable_tiling()
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(vae).__name__} cannot work in tiles; leave tile_decoding out, and decode fewer frames instead "
            "(decode_frames=...)"
        ) from error


@dataclass(frozen=True, kw_only=True)
class FrameCodec:
    """An image autoencoder (diffusers `AutoencoderKL`) applied frame by frame."""

    vae: Any
    pixels_at_once: int = PIXELS_AT_ONCE
    """pixels encoded or decoded together, at least one frame. It changes no number beyond rounding. A decoder's
    activations at full size are what memory runs out on: where a video needs several turns, each is computed anew in
    the backward pass, so that it holds those of one turn only, and of a large frame those of one layer"""

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[B,F,3,H,W] in [0,1] to scaled latents [B,C,F,h,w] (the posterior's mean)."""
        frames = video.flatten(0, 1).to(self.vae.dtype) * 2 - 1
        turns = frames.split(self._frames_at_once(frames.shape[-2] * frames.shape[-1]))
        means = torch.cat([self.vae.encode(turn).latent_dist.mean for turn in turns])
        return (means * self.vae.config.scaling_factor).unflatten(0, video.shape[:2]).transpose(1, 2).float()

    def decode(self, latents: Tensor, frames: Tensor | None = None) -> Tensor:
        """Scaled latents [B,C,F,h,w] to [B,n,3,H,W] in [0,1]; only the chosen frames [B,n] are decoded."""
        z = latents.transpose(1, 2)
        if frames is not None:
            z = z[torch.arange(len(z), device=z.device)[:, None], frames.to(z.device)]
        cells = (z.flatten(0, 1) / self.vae.config.scaling_factor).to(self.vae.dtype)
        turns = cells.split(self._frames_at_once(cells.shape[-2] * cells.shape[-1] * self._stride**2))
        run = self._decode if len(turns) == 1 else lambda turn: recomputed(self._decode, turn)
        images = torch.cat([run(turn) for turn in turns])
        return (images.float() / 2 + 0.5).clamp(0, 1).unflatten(0, z.shape[:2])

    def _decode(self, cells: Tensor) -> Tensor:
        large = cells.shape[-2] * cells.shape[-1] * self._stride**2 >= LARGE_FRAME
        # The transforms of `torch.func` know no checkpoints.
        wanted = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
        with layers_recomputed(self.vae.decoder, large and wanted):
            return self.vae.decode(cells).sample

    @property
    def _stride(self) -> int:
        """Pixels that a latent cell covers in each direction."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _frames_at_once(self, pixels: int) -> int:
        return max(1, self.pixels_at_once // pixels)
