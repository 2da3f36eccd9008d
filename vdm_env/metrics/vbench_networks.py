"""The published networks behind VBench's dimensions, from local files; nothing is downloaded.

Two of them are in no library this package depends on, and named stand-ins take their place: MUSIQ (imaging quality) and
AMT-S (motion smoothness). Give your own callables in `vbench.VBenchNetworks` to use the real ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vdm_env.metrics.flow import MidpointWarp, load_raft
from vdm_env.metrics.vbench import FrameNetwork, SharpnessAndNoise, VBenchNetworks
from vdm_env.rewards.clip import ClipBackbone
from vdm_env.rewards.clip_loading import VIT_L, transformers_clip
from vdm_env.rewards.loading import (
    RewardContext,
    find_files,
    frozen,
    load_strictly,
    load_transformers,
    published,
    read_tensors,
    seeded,
    warn_random,
)
from vdm_env.rewards.viclip import build_viclip, unit

AESTHETIC_FILE = "sa_0_4_vit_l_14_linear.pth"
_AESTHETIC_REPOSITORY = "LAION-AI/aesthetic-predictor"
_DINO_REPOSITORY = "facebook/dino-vitb16"
VIT_B32: dict[str, Any] = {
    "projection_dim": 512,
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 32,
        "image_size": 224,
        "projection_dim": 512,
    },
    "text_config": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "projection_dim": 512,
        "eos_token_id": 49407,
    },
}


class DinoFeatures(nn.Module):
    """The class token of a transformers `ViTModel`: `dino_input` [N,3,h,w] -> [N,D], for any h, w.

    Deviation: transformers interpolates the position table to other sizes without DINO's offset of 0.1.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(next(self.model.parameters()).dtype)
        return self.model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]


def load_dino(context: RewardContext) -> DinoFeatures:
    """DINO ViT-B/16 (hub facebook/dino-vitb16).

    Raises:
        MissingWeightsError, CorruptWeightsError: see `rewards.loading`; so in all functions here.
    """
    from transformers import ViTConfig, ViTModel

    class Dino(ViTModel):  # the release has no pooling layer
        def __init__(self, config: Any) -> None:
            super().__init__(config, add_pooling_layer=False)

    if context.weights == "random":
        warn_random("DINO")
        tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        with seeded(context.seed):
            model = Dino(ViTConfig(**(tiny if context.scale == "tiny" else {})))
    else:
        path = find_files(context, "DINO", _DINO_REPOSITORY, ["config.json", "model.safetensors"])[0]
        model = load_transformers(Dino, path.parent)
    return DinoFeatures(frozen(model, context))


def clip_features(backbone: ClipBackbone) -> FrameNetwork:
    """A CLIP's image tower as a function of `clip_input` (made for 224 pixels), resized where it wants another side."""

    def features(pixels: Tensor) -> Tensor:
        if pixels.shape[-1] != backbone.side:
            pixels = nn.functional.interpolate(pixels, size=(backbone.side,) * 2, mode="bilinear", align_corners=False)
        return backbone.image_features(pixels)

    return features


def load_clip_b32(context: RewardContext) -> FrameNetwork:
    """The image tower of CLIP ViT-B/32 (hub openai/clip-vit-base-patch32)."""
    return clip_features(transformers_clip(published(context), "CLIP", "openai/clip-vit-base-patch32", VIT_B32))


class LinearAesthetic:
    """LAION's first aesthetic predictor: a linear layer on unit CLIP features, `clip_input` -> [N], about 0 to 10.

    Not the head of `rewards.aesthetic`, which is LAION's second.
    """

    def __init__(self, features: FrameNetwork, head: nn.Linear) -> None:
        self.features, self.head = features, head

    def __call__(self, pixels: Tensor) -> Tensor:
        features: Tensor = unit(self.features(pixels))
        return self.head(features.to(self.head.weight.dtype)).squeeze(-1)


def load_aesthetic_v1(context: RewardContext) -> LinearAesthetic:
    """CLIP ViT-L/14 (hub openai/clip-vit-large-patch14) and LAION's `sa_0_4_vit_l_14_linear.pth`."""
    context = published(context)
    features = clip_features(transformers_clip(context, "Aesthetic", "openai/clip-vit-large-patch14", VIT_L))
    with seeded(context.seed + 1):
        head = nn.Linear(VIT_L["projection_dim"], 1)
    if context.weights == "pretrained":
        address = f"https://github.com/{_AESTHETIC_REPOSITORY}/raw/main/{AESTHETIC_FILE}"
        how = f"`curl -L -O {address}` (a data file of that git repository)"
        (path,) = find_files(context, "aesthetic quality", _AESTHETIC_REPOSITORY, [AESTHETIC_FILE], how)
        load_strictly(head, read_tensors(path), path)
    return LinearAesthetic(features, frozen(head, context))


def load_vbench(context: RewardContext) -> VBenchNetworks:
    """All networks of `vbench.measure`: DINO, both CLIPs and the aesthetic head, RAFT, ViCLIP, and two stand-ins.

    Imaging quality comes from `SharpnessAndNoise` and motion smoothness from `MidpointWarp`; `measure` names them with
    the scores.
    """
    flow = load_raft(context)
    return VBenchNetworks(
        dino=load_dino(context),
        clip=load_clip_b32(context),
        interpolate=MidpointWarp(flow),
        flow=flow,
        aesthetic=load_aesthetic_v1(context),
        imaging=SharpnessAndNoise(),
        viclip=build_viclip(context),
    )
