"""MovingShapes' small reward networks, untrained, and how they are called on pixels in [0,1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, VideoMAEConfig, VideoMAEForVideoClassification

from vdm_env.rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, normalise
from vdm_env.worlds.moving_shapes.networks import MAX_TOKENS, TEXT_WIDTH
from vdm_env.worlds.moving_shapes.render import DIRECTIONS, NUM_FRAMES, SIZE_PX, captions_of

HEAD_WIDTHS = (64, 32, 16, 8)


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """0.29 M parameters: 4 layers of 64 over 8x8 patches of 4 px, 2 layers of 64 over 8 tokens."""
    vision = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE_PX,
        "patch_size": 4,
        "hidden_act": "gelu",
        "projection_dim": 64,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "gelu",
        "projection_dim": 64,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def build_action() -> VideoMAEForVideoClassification:
    """0.2 M parameters: 4 layers of 64 over 4x4x4 patches of 2 frames and 8 px."""
    return VideoMAEForVideoClassification(
        VideoMAEConfig(
            image_size=SIZE_PX,
            patch_size=8,
            num_frames=NUM_FRAMES,
            tubelet_size=2,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            use_mean_pooling=True,
            initializer_range=0.1,  # the usual 0.02 suits wide networks; at width 64 attention would start out dead
            id2label={i: f"moving {d}" for i, d in enumerate(DIRECTIONS)},
        )
    )


def image_features(model: CLIPModel, frames: Tensor) -> Tensor:
    """Unit features [N,D] of frames in [0,1]."""
    pixels = normalise(frames, CLIP_MEAN, CLIP_STD)
    return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def text_features(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, directions: Tensor) -> Tensor:
    """Unit features [7,4,D] of the captions of all colours and shapes, with the given directions [7,4]."""
    labels = torch.cartesian_prod(torch.arange(7), torch.arange(4))
    captions = captions_of(torch.cat([labels, directions.reshape(-1, 1)], 1))
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt")
    return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1).view(7, 4, -1)


def action_logits(model: VideoMAEForVideoClassification, video: Tensor) -> Tensor:
    """Logits [B,4] of videos in [0,1]."""
    return model(pixel_values=normalise(video, IMAGENET_MEAN, IMAGENET_STD)).logits
