"""Builds the CLIP-style rewards: published networks, the embedded world's small one, or random weights.

All full-size networks use CLIP's byte-pair tokenizer as open_clip ships it. transformers pads with another token, which
changes
nothing: attention is causal and the state at the end-of-text token is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vdm_env.rewards.clip import (
    ClipBackbone,
    ClipReward,
    OpenClipBackbone,
    Tokenizer,
    TransformersClipBackbone,
    clip_score,
    hps,
    pick_score,
)
from vdm_env.rewards.loading import (
    RewardContext,
    find_files,
    find_transformers,
    frozen,
    load_strictly,
    load_transformers,
    read_tensors,
    seeded,
    warn_random,
    world_folder,
)

HPS_FILES = {"HPS": "HPS_v2.1_compressed.pt", "HPSv2": "HPS_v2_compressed.pt"}
_HPS_ARCHITECTURE = "ViT-H-14"
_TINY_OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


VIT_L: dict[str, Any] = {
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 768,
    },
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "eos_token_id": 49407,
    },
}
VIT_H: dict[str, Any] = {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "hidden_act": "gelu",
        "eos_token_id": 49407,
    },
}


def build_hps(context: RewardContext) -> ClipReward:
    """HPSv2.1 (hub xswu/HPSv2)."""
    return hps(_hps_backbone(context, "HPS"), name="HPS")


def build_hpsv21(context: RewardContext) -> ClipReward:
    """HPSv2.1 under its published name; "HPS" is the same network."""
    _refuse_world(context, "HPSv2.1")
    return hps(_hps_backbone(context, "HPS"), name="HPSv2.1")


def _refuse_world(context: RewardContext, name: str) -> None:
    """A published name is not given to the small networks of an embedded world."""
    if context.world is not None and context.weights == "pretrained":
        raise ValueError(f"{name} is a published network; the HPS-style network of {context.world} is called 'HPS'")


def build_hpsv2(context: RewardContext) -> ClipReward:
    """HPSv2.0 (hub xswu/HPSv2)."""
    _refuse_world(context, "HPSv2")
    return hps(_hps_backbone(context, "HPSv2"), name="HPSv2")


def build_pick_score(context: RewardContext) -> ClipReward:
    """PickScore v1 (hub yuvalkirstain/PickScore_v1), ViT-H/14."""
    return pick_score(transformers_clip(context, "PickScore", "yuvalkirstain/PickScore_v1", VIT_H))


def build_clip_score(context: RewardContext) -> ClipReward:
    """CLIPScore with OpenAI's ViT-L/14 (hub openai/clip-vit-large-patch14)."""
    return clip_score(transformers_clip(context, "CLIP", "openai/clip-vit-large-patch14", VIT_L))


def _open_clip_tokenizer(context_length: int = 77) -> Any:
    import open_clip

    return open_clip.SimpleTokenizer(context_length=context_length)


def _as_inputs(context_length: int) -> Tokenizer:
    """open_clip's tokenizer with the output of a transformers one."""
    tokenize = _open_clip_tokenizer(context_length)

    def inputs(texts: list[str]) -> Mapping[str, Tensor]:
        return {"input_ids": tokenize(texts)}

    return inputs


def _hps_backbone(context: RewardContext, name: str) -> ClipBackbone:
    if context.world is not None and context.weights == "pretrained":
        return world_clip(context, name)
    import open_clip
    from open_clip.model import CLIP

    if context.weights == "random":
        warn_random(name)
        config = _TINY_OPEN_CLIP if context.scale == "tiny" else open_clip.get_model_config(_HPS_ARCHITECTURE)
        with seeded(context.seed):
            return OpenClipBackbone(frozen(CLIP(**config), context), _open_clip_tokenizer())
    (path,) = find_files(context, name, "xswu/HPSv2", [HPS_FILES[name]])
    with seeded(context.seed):
        model = CLIP(**open_clip.get_model_config(_HPS_ARCHITECTURE))
    load_strictly(model, read_tensors(path), path)
    return OpenClipBackbone(frozen(model, context), _open_clip_tokenizer())


def transformers_clip(context: RewardContext, name: str, repository: str, config: Mapping[str, Any]) -> ClipBackbone:
    """A transformers CLIP: the repository's, the embedded world's, or one of that configuration with random weights.

    Raises:
        MissingWeightsError, CorruptWeightsError: see `loading.py`.
    """
    if context.world is not None and context.weights == "pretrained":
        return world_clip(context, name)
    from transformers import CLIPConfig, CLIPModel

    if context.weights == "random":
        warn_random(name)
        with seeded(context.seed):
            model = CLIPModel(CLIPConfig(**(_tiny(config) if context.scale == "tiny" else config)))
    else:
        model = load_transformers(CLIPModel, find_transformers(context, name, repository))
    length = model.config.text_config.max_position_embeddings
    return TransformersClipBackbone(frozen(model, context), _as_inputs(length))


def world_clip(context: RewardContext, name: str) -> TransformersClipBackbone:
    """MovingShapes' own CLIP and tokenizer, as `pretrain_rewards.py` stores them."""
    from transformers import CLIPModel

    folder = world_folder(context, name, "rewards", "clip")
    tokenizer = world_tokenizer(world_folder(context, name, "shared", "tokenizer"))
    return TransformersClipBackbone(frozen(load_transformers(CLIPModel, folder).float(), context), tokenizer)


def world_tokenizer(folder: Path) -> Tokenizer:
    """Texts to input_ids and attention_mask, always padded to the full length, so that no text depends on another."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)

    def inputs(texts: list[str]) -> Mapping[str, Tensor]:
        return dict(tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt"))

    return inputs


def _tiny(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same architecture with two narrow layers, 32-pixel images and the same embedding width."""
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return dict(config) | {
        "vision_config": config["vision_config"] | narrow | {"image_size": 32, "patch_size": 8},
        "text_config": config["text_config"] | narrow,
    }
