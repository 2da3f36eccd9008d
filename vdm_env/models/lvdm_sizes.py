"""Sizes of the networks in an LVDM checkpoint, and the arguments of diffusers' and transformers' classes they mean.

They are read from the originals' own configurations; the defaults are those of the release of VideoCrafter2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CLIPTextConfig


def _fields(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration the class has fields for, lists as tuples."""
    given = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetSizes:
    """Sizes of LVDM's `UNetModel`; the defaults are VideoCrafter2's (1,413,284,420 parameters)."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    """downsampling factors of the levels that have attention"""
    num_head_channels: int = 64
    context_dim: int = 1024
    time_cond_proj_dim: int | None = None
    """width of T2V-Turbo's guidance embedding; None: no such layer"""
    motion_cond_proj_dim: int | None = None
    """width of T2V-Turbo v2's motion guidance embedding; None: no such layers"""

    @classmethod
    def from_lvdm(cls, config: Mapping[str, Any]) -> UNetSizes:
        """From the constructor arguments in LVDM's own YAML (`unet_config.params`).

        Raises:
            ValueError: a flag that makes it another architecture.
        """
        needed = {
            "transformer_depth": 1,
            "use_linear": True,
            "temporal_conv": True,
            "temporal_attention": True,
            "temporal_selfatt_only": True,
            "use_relative_position": False,
            "use_causal_attention": False,
            "addition_attention": True,
            "fps_cond": True,
        }
        wrong = {key: config[key] for key, value in needed.items() if config.get(key, value) != value}
        if wrong:
            raise ValueError(
                f"this UNet is not VideoCrafter2's: its configuration says {wrong}, expected "
                f"{ ({key: needed[key] for key in wrong}) }; only that architecture is a UNet3DConditionModel"
            )
        return cls(**_fields(cls, config))

    def attends(self, level: int) -> bool:
        """Whether a level (0 is the finest) has attention."""
        return 2**level in self.attention_resolutions

    def diffusers(self) -> dict[str, Any]:
        """Arguments of `UNet3DConditionModel`."""
        levels = range(len(self.channel_mult))
        down = ["CrossAttnDownBlock3D" if self.attends(level) else "DownBlock3D" for level in levels]
        up = ["CrossAttnUpBlock3D" if self.attends(level) else "UpBlock3D" for level in reversed(levels)]
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "down_block_types": tuple(down),
            "up_block_types": tuple(up),
            "block_out_channels": tuple(self.model_channels * m for m in self.channel_mult),
            "layers_per_block": self.num_res_blocks,
            "cross_attention_dim": self.context_dim,
            "attention_head_dim": self.num_head_channels,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderSizes:
    """Sizes of LVDM's `AutoencoderKL`; the defaults are VideoCrafter2's (Stable Diffusion's, 8x smaller latents)."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    resolution: int = 512
    scale_factor: float = 0.18215

    @classmethod
    def from_lvdm(cls, ddconfig: Mapping[str, Any], embed_dim: int, scale_factor: float) -> AutoencoderSizes:
        """From LVDM's own YAML (`first_stage_config.params`).

        Raises:
            ValueError: attention outside the middle block, a latent width that differs from z_channels, or a first
                level that is wider than the base width: `AutoencoderKL` has no such thing.
        """
        if ddconfig.get("attn_resolutions") or embed_dim != ddconfig["z_channels"] or ddconfig["ch_mult"][0] != 1:
            raise ValueError(
                f"no AutoencoderKL is like this: attn_resolutions={ddconfig.get('attn_resolutions')}, "
                f"embed_dim={embed_dim}, z_channels={ddconfig['z_channels']}, ch_mult={ddconfig['ch_mult']}; expected "
                "no attn_resolutions, equal embed_dim and z_channels, and ch_mult starting with 1"
            )
        return cls(**_fields(cls, ddconfig), scale_factor=scale_factor)

    def diffusers(self) -> dict[str, Any]:
        """Arguments of `AutoencoderKL`."""
        levels = len(self.ch_mult)
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_ch,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": tuple(self.ch * m for m in self.ch_mult),
            "layers_per_block": self.num_res_blocks,
            "latent_channels": self.z_channels,
            "sample_size": self.resolution,
            "scaling_factor": self.scale_factor,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSizes:
    """Sizes of the OpenCLIP text tower; by default ViT-H-14, of which VideoCrafter2 runs all layers but the last."""

    width: int = 1024
    heads: int = 16
    layers: int = 24
    vocab_size: int = 49408
    context_length: int = 77
    embed_dim: int = 1024
    """width of the projection, which is not used"""
    skipped_layers: int = 1
    """layers at the end that are not run: 1 is LVDM's layer="penultimate", 0 its layer="last\""""

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any], layer: str = "penultimate") -> TextSizes:
        """From open_clip's model configuration and LVDM's `layer`.

        Raises:
            ValueError: another layer than "penultimate" or "last".
        """
        if layer not in ("penultimate", "last"):
            raise ValueError(f"layer={layer!r}: expected 'penultimate' (VideoCrafter2) or 'last'")
        text = {key: value for key, value in config["text_cfg"].items() if key in cls.__dataclass_fields__}
        return cls(**text, embed_dim=config["embed_dim"], skipped_layers=int(layer == "penultimate"))

    def transformers(self) -> CLIPTextConfig:
        """The configuration of `CLIPTextModel`."""
        return CLIPTextConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers - self.skipped_layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.context_length,
            hidden_act="gelu",
            projection_dim=self.embed_dim,
            bos_token_id=self.vocab_size - 2,
            eos_token_id=self.vocab_size - 1,
        )
