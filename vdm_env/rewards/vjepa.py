"""V-JEPA 1 for the consistency reward of `jepa.py`: own encoder and predictor, which the released files fit.

V-JEPA 2 is another architecture (rotary positions), see `vjepa2.py`; neither loads the weights of the other.

Source: Bardes et al. 2024, arXiv:2404.08471; facebookresearch/jepa (names of parameters, sizes, position tables).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm_env.errors import CorruptWeightsError
from vdm_env.rewards.jepa import JepaReward, gather_tokens
from vdm_env.rewards.loading import (
    RewardContext,
    as_tensors,
    find_files,
    frozen,
    load_strictly,
    published,
    read_checkpoint,
    seeded,
    warn_random,
)

NAME = "VJEPA"
FILE = "vitl16.pth.tar"
_PARTS = ("encoder", "target_encoder", "predictor")


@dataclass(frozen=True, kw_only=True, slots=True)
class VJepaConfig:
    """Sizes; the defaults are those of vitl16."""

    img_size: int = 224
    patch_size: int = 16
    num_frames: int = 16
    tubelet_size: int = 2
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    """of the encoders and of the predictor"""
    mlp_ratio: float = 4.0
    pred_embed_dim: int = 384
    pred_depth: int = 12
    num_mask_tokens: int = 2
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for part, whole in (
            ("patch_size", "img_size"),
            ("tubelet_size", "num_frames"),
            ("num_heads", "embed_dim"),
            ("num_heads", "pred_embed_dim"),
        ):
            if getattr(self, part) < 1 or getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole}={getattr(self, whole)} is no multiple of {part}={getattr(self, part)}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, rows and columns."""
        side = self.img_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side


FULL = VJepaConfig()
TINY = VJepaConfig(
    img_size=32, patch_size=8, num_frames=4, embed_dim=32, depth=2, num_heads=2, pred_embed_dim=16, pred_depth=2
)


def sincos_positions(width: int, grid: tuple[int, int, int]) -> Tensor:
    """Position table [1,N,width]: time, rows and columns get a third of the channels each, sines before cosines."""
    part = -(-width // 6) * 2
    frequency = 10000.0 ** -(torch.arange(part // 2, dtype=torch.float64) / (part / 2))
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in places]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], -1)[None, :, :width].float()


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, width: int, config: VJepaConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = _Attention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = _Mlp(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, config: VJepaConfig) -> None:
        super().__init__()
        size = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.embed_dim, size, stride=size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class VJepaEncoder(nn.Module):
    """[B,T,3,S,S] to features [B,N,D]; with `seen` [B,K] to [B,K,D], and no other token is looked at."""

    def __init__(self, config: VJepaConfig) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed(config)
        self.register_buffer("pos_embed", sincos_positions(config.embed_dim, config.grid))
        self.blocks = nn.ModuleList(_Block(config.embed_dim, config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor, seen: Tensor | None = None) -> Tensor:
        x = self.patch_embed(pixels.transpose(1, 2).to(self.norm.weight.dtype)) + self.pos_embed
        if seen is not None:
            x = gather_tokens(x, seen)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class VJepaPredictor(nn.Module):
    """Context features [B,K,D] of the tokens `seen` to predictions [B,M,D] of the tokens `predicted`."""

    def __init__(self, config: VJepaConfig) -> None:
        super().__init__()
        width = config.pred_embed_dim
        self.predictor_embed = nn.Linear(config.embed_dim, width)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, width) for _ in range(config.num_mask_tokens))
        self.register_buffer("predictor_pos_embed", sincos_positions(width, config.grid))
        self.predictor_blocks = nn.ModuleList(_Block(width, config) for _ in range(config.pred_depth))
        self.predictor_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.predictor_proj = nn.Linear(width, config.embed_dim)

    def forward(self, context: Tensor, seen: Tensor, predicted: Tensor, index: int) -> Tensor:
        positions: Any = self.predictor_pos_embed
        positions = positions.expand(len(context), -1, -1)
        known = self.predictor_embed(context) + gather_tokens(positions, seen)
        asked = self.mask_tokens[index % len(self.mask_tokens)] + gather_tokens(positions, predicted)
        x = torch.cat([known, asked], 1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, known.shape[1] :])


class VJepa(nn.Module):
    """The encoder of what is seen, the encoder of the targets (its moving average), and the predictor."""

    def __init__(self, config: VJepaConfig = FULL) -> None:
        super().__init__()
        self.encoder = VJepaEncoder(config)
        self.target_encoder = VJepaEncoder(config)
        self.predictor = VJepaPredictor(config)
        self.side, self.num_frames, self.grid = config.img_size, config.num_frames, config.grid

    def features(self, pixels: Tensor) -> Tensor:
        return self.target_encoder(pixels)

    def predict(self, pixels: Tensor, seen: Tensor, predicted: Tensor, index: int) -> Tensor:
        return self.predictor(self.encoder(pixels, seen), seen, predicted, index)


def vjepa_from(parts: Mapping[str, Mapping[str, Tensor]], config: VJepaConfig, path: Any) -> VJepa:
    """The network with the released weights.

    Args:
        parts: state dictionaries "encoder", "target_encoder", "predictor", whose names carry the prefixes of the
            training's wrappers ("module.", "backbone.") or none.
        config: its sizes.
        path: where they are from, for messages.

    Raises:
        CorruptWeightsError: a part, a tensor, or a shape is missing or too much.
    """
    missing = [part for part in _PARTS if part not in parts]
    if missing:
        raise CorruptWeightsError(f"{path} lacks {missing}; a training checkpoint of V-JEPA has {list(_PARTS)}")
    model = VJepa(config)
    tensors = {
        f"{part}.{name.removeprefix('module.').removeprefix('backbone.')}": tensor.float()
        for part in _PARTS
        for name, tensor in parts[part].items()
    }
    load_strictly(model, tensors, path)
    return model


def _read(path: Path) -> dict[str, dict[str, Tensor]]:
    content = read_checkpoint(path)
    if not isinstance(content, dict):
        raise CorruptWeightsError(f"{path} holds {type(content).__name__}, expected a dictionary; fetch the file again")
    return {part: as_tensors(content[part], path) for part in _PARTS if part in content}


def build_vjepa(context: RewardContext) -> JepaReward:
    """V-JEPA ViT-L/16 (vitl16.pth.tar of facebookresearch/jepa), 16 frames of 224 pixels."""
    context = published(context)
    if context.weights == "pretrained":
        (path,) = find_files(context, NAME, "facebookresearch/jepa", [FILE])
        return JepaReward(frozen(vjepa_from(_read(path), FULL, path), context), name=NAME)
    warn_random(NAME)
    with seeded(context.seed):
        model = VJepa(TINY if context.scale == "tiny" else FULL)
        for token in model.predictor.mask_tokens:
            nn.init.normal_(token, std=0.02)
    return JepaReward(frozen(model, context), name=NAME)
