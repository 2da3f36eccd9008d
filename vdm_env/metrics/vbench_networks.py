"""The published networks behind VBench's dimensions, from local files; nothing is downloaded.

Two of them are in no library this package depends on, and named stand-ins take their place: MUSIQ (imaging quality) and
AMT-S (motion smoothness). `load_vbench(context, musiq=True)` has the real MUSIQ where the package pyiqa is installed;
no library has AMT-S. Give your own callables in `vbench.VBenchNetworks` to use others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vdm_env.metrics.flow import MidpointWarp, load_raft
from vdm_env.metrics.vbench import FrameNetwork, SharpnessAndNoise, VBenchNetworks
from vdm_env.rewards.aesthetic import build_aesthetic_v1
from vdm_env.rewards.clip import ClipBackbone
from vdm_env.rewards.clip_loading import transformers_clip
from vdm_env.rewards.loading import (
    RewardContext,
    find_files,
    find_transformers,
    frozen,
    load_strictly,
    load_transformers,
    published,
    read_tensors,
    seeded,
    warn_random,
)
from vdm_env.rewards.viclip import build_viclip, unit

MUSIQ_FILE = "musiq_spaq_ckpt-358bb6af.pth"
_MUSIQ_REPOSITORY = "chaofengc/IQA-PyTorch"
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


def load_dino(context: RewardContext, repository: str = _DINO_REPOSITORY, *, name: str = "VBench") -> DinoFeatures:
    """DINO ViT-B/16 (hub facebook/dino-vitb16), or another of these; `name` is the metric that wants it.

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
        model = load_transformers(Dino, find_transformers(context, name, repository))
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
    return clip_features(transformers_clip(published(context), "VBench", "openai/clip-vit-base-patch32", VIT_B32))


class LinearAesthetic:
    """LAION's first aesthetic predictor: its head on unit CLIP features, `clip_input` -> [N], about 0 to 10."""

    def __init__(self, features: FrameNetwork, head: FrameNetwork) -> None:
        self.features, self.head = features, head

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.head(unit(self.features(pixels)))


def load_aesthetic_v1(context: RewardContext) -> LinearAesthetic:
    """The two networks of the reward "AestheticV1", which `vdm-env download AestheticV1` fetches."""
    reward = build_aesthetic_v1(context)
    return LinearAesthetic(clip_features(reward.backbone), reward.head)


def load_musiq(context: RewardContext) -> FrameNetwork:
    """MUSIQ trained on SPAQ, VBench's assessor: `imaging_input` [N,3,h,w] -> [N], 0 to 100.

    The network is that of the package pyiqa (`pip install pyiqa`), which is optional; the weights are read here,
    because pyiqa's own reader would run code from them, and would fetch them unasked.

    Source: Ke et al. 2021, arXiv:2108.05997; chaofengc/IQA-PyTorch (weights).

    Raises:
        ImportError: pyiqa is not installed.
        MissingWeightsError, CorruptWeightsError: see `rewards.loading`.
    """
    try:
        from pyiqa.archs.musiq_arch import MUSIQ
    except ImportError as error:
        raise ImportError(
            f"MUSIQ needs the package pyiqa ({error}): `pip install pyiqa`, or leave musiq=True out, and the stand-in "
            "`SharpnessAndNoise` takes its place"
        ) from error
    with seeded(context.seed):
        model: nn.Module = MUSIQ(pretrained=False)
    if context.weights == "pretrained":
        (path,) = find_files(context, "MUSIQ", _MUSIQ_REPOSITORY, [MUSIQ_FILE])
        load_strictly(model, {k.removeprefix("module."): v for k, v in read_tensors(path).items()}, path)
    else:
        warn_random("MUSIQ")
    model = frozen(model, context)
    return lambda frames: model(frames.to(next(model.parameters()))).flatten().float()


def load_vbench(context: RewardContext, *, musiq: bool = False) -> VBenchNetworks:
    """All networks of `vbench.measure`: DINO, both CLIPs and the aesthetic head, RAFT, ViCLIP, and two stand-ins.

    Imaging quality comes from `SharpnessAndNoise`, or with `musiq` from `load_musiq`, and motion smoothness from
    `MidpointWarp`; `measure` names stand-ins with the scores.
    """
    flow = load_raft(context)
    return VBenchNetworks(
        dino=load_dino(context),
        clip=load_clip_b32(context),
        interpolate=MidpointWarp(flow),
        flow=flow,
        aesthetic=load_aesthetic_v1(context),
        imaging=load_musiq(context) if musiq else SharpnessAndNoise(),
        viclip=build_viclip(context),
    )
