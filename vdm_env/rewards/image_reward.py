"""ImageReward: how much people would like a picture for its prompt, mean over frames; about -2 to 2, open at both ends.

BLIP's image encoder, its text encoder with cross attention, and a linear head on the first text token:

    score_i = mean over frames f of (head(text(prompt_i | image(frame_if))[0]) - 0.16717) / 1.03334

The two encoders are transformers' `BlipVisionModel` and `BlipTextModel`; the published file is translated to their
names. Its constants make the mean 0 and the deviation 1 over the authors' data.

Source: Xu et al. 2023, arXiv:2304.05977; THUDM/ImageReward (constants, 35 tokens, pre-processing).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vdm_env.rewards.aesthetic import AestheticHead
from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.bert_text import LETTERS_SIZE, VOCABULARY_FILE, bert_tokenizer, letters, read_vocabulary
from vdm_env.rewards.loading import (
    RewardContext,
    find_files,
    frozen,
    load_strictly,
    published,
    read_tensors,
    seeded,
    warn_random,
)
from vdm_env.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, clip_hf, normalise
from vdm_env.rewards.tensors import at_least_float32, in_chunks

NAME = "ImageReward"
FILE = "ImageReward.pt"
_REPOSITORY = "THUDM/ImageReward"
_VOCABULARY_REPOSITORY = "google-bert/bert-base-uncased"
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_NUM_TOKENS = 35

VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.02,
}
TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-12,
}
HEAD = (1024, 128, 64, 16)
_NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_VISION = VISION | _NARROW | {"image_size": 32, "patch_size": 8, "initializer_range": 0.1}
TINY_TEXT = TEXT | _NARROW | {"encoder_hidden_size": 32, "vocab_size": LETTERS_SIZE, "initializer_range": 0.1}
TINY_TEXT |= dict.fromkeys(("bos_token_id", "sep_token_id"))  # of generation, and above that size
TINY_HEAD = (32, 16, 8, 4)

# Names of the release to those of transformers, in the order they are tried.
_RENAMED: tuple[tuple[str, str], ...] = (
    (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"blip\.text_encoder\.", "text."),
    (r"mlp\.layers\.", "head.layers."),
)
# BLIP's projections for contrastive training are in the file and have no part in the score.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")


class ImageRewardNetwork(nn.Module):
    """Images [N,3,S,S], CLIP-normalised, and tokens [N,L] with their mask to scores [N].

    Args:
        vision: of transformers' `BlipVisionConfig`.
        text: of transformers' `BlipTextConfig`; `encoder_hidden_size` is the width of the images.
        head: widths of the head's hidden layers.
    """

    def __init__(self, vision: Mapping[str, Any], text: Mapping[str, Any], head: tuple[int, ...]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision: Any = BlipVisionModel(BlipVisionConfig(**vision))
        # A "decoder" is what has cross attention; the text is still read in both directions.
        self.text: Any = BlipTextModel(BlipTextConfig(**text, is_decoder=True), add_pooling_layer=False)
        self.head = AestheticHead(text["hidden_size"], head)
        self.side = int(vision["image_size"])

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        image = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        states = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.int64, device=image.device),
            is_decoder=False,
        ).last_hidden_state
        return (at_least_float32(self.head(states[:, 0])) - _MEAN) / _STD


class ImageRewardReward:
    """Mean over frames of ImageReward's score of frame and prompt.

    Args:
        network: the network.
        tokenizer: BERT's; texts are cut, or padded, to 35 tokens.
        preprocess: resizing, see `preprocess.py`; the default is that of the release, in floating point.
        frames: frame policy.
        chunk_size: images the network sees at a time; None: all.
    """

    differentiable = True
    name = NAME
    range = (-math.inf, math.inf)

    def __init__(
        self,
        network: ImageRewardNetwork,
        tokenizer: Any,
        *,
        preprocess: Preprocess = clip_hf,
        frames: FramePolicy = "all",
        chunk_size: int | None = None,
    ) -> None:
        self.network, self.tokenizer, self.preprocess = network, tokenizer, preprocess
        self.frames, self.chunk_size = frames, chunk_size

    def _score(self, frames: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.network(normalise(self.preprocess(frames, self.network.side), CLIP_MEAN, CLIP_STD), tokens, mask)

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        inputs = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_NUM_TOKENS, return_tensors="pt"
        )
        each = [
            inputs[key].to(video.device).repeat_interleave(video.shape[1], 0) for key in ("input_ids", "attention_mask")
        ]
        scores = in_chunks(self._score, video.flatten(0, 1), *each, size=self.chunk_size)
        return scores.unflatten(0, video.shape[:2]).mean(1)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the release under the names of `ImageRewardNetwork`; what is not known keeps its name."""

    def rename(name: str) -> str:
        for pattern, replacement in _RENAMED:
            new, count = re.subn(rf"^{pattern}", replacement, name)
            if count:
                return new
        return name

    return {rename(k): v.float() for k, v in tensors.items() if not k.startswith(_UNUSED)}


def build_image_reward(context: RewardContext) -> ImageRewardReward:
    """ImageReward v1.0 (hub THUDM/ImageReward) with BERT's vocabulary (hub google-bert/bert-base-uncased)."""
    context = published(context)
    tiny = context.scale == "tiny"
    if context.weights == "random":
        warn_random(NAME)
        with seeded(context.seed):
            network = ImageRewardNetwork(*((TINY_VISION, TINY_TEXT, TINY_HEAD) if tiny else (VISION, TEXT, HEAD)))
        return ImageRewardReward(frozen(network, context), bert_tokenizer(letters()))
    (path,) = find_files(context, NAME, _REPOSITORY, [FILE])
    (vocabulary,) = find_files(context, NAME, _VOCABULARY_REPOSITORY, [VOCABULARY_FILE])
    with seeded(context.seed):
        network = ImageRewardNetwork(VISION, TEXT, HEAD)
    load_strictly(network, renamed(read_tensors(path)), path)
    return ImageRewardReward(frozen(network, context), bert_tokenizer(read_vocabulary(vocabulary)))
