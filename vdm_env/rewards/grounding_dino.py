"""Object removal with Grounding DINO, which looks for whatever a phrase names; the score is that of `object_removal`.

p(object) of a query is its largest sigmoid over the tokens of the phrase, as transformers' post-processing has it.

Source: Liu et al. 2023, arXiv:2303.05499; as a reward Prabhudesai et al. 2024, arXiv:2407.08737 (hard, threshold 0.4).
VADER counts every box above the threshold, whatever words of its phrase it matches; so does this.

The gradient is that of the network as it is trained: it does not pass through the choice of the proposals nor through
the boxes that one decoder layer hands to the next, which the network treats as constants.

Images are looked at as one batch. transformers' fusion of image and text subtracts one maximum over the whole batch
before its softmax, which lets images into each other's rounding; `ImageTextAttention` takes its place, the same
function by torch's fused attention, image by image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm_env.rewards.bert_text import LETTERS_SIZE, VOCABULARY_FILE, bert_tokenizer, letters, read_vocabulary
from vdm_env.rewards.loading import (
    RewardContext,
    find_files,
    frozen,
    load_transformers,
    published,
    seeded,
    warn_random,
)
from vdm_env.rewards.object_removal import ObjectRemovalReward
from vdm_env.rewards.tensors import at_least_float32

NAME = "ObjectRemovalDINO"
THRESHOLD = 0.4
_REPOSITORY = "IDEA-Research/grounding-dino-base"


class ImageTextAttention(nn.Module):
    """A `GroundingDinoBiMultiHeadAttention` of transformers without dropout: its projections under their names.

    Image patches attend to the words and the words to the patches, with the same products of queries and keys.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.num_heads = int(original.num_heads)
        for name, child in original.named_children():
            self.add_module(name, child)

    def _heads(self, projection: str, features: Tensor) -> Tensor:
        return self.get_submodule(projection)(features).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
    ) -> tuple[tuple[Tensor, None], tuple[Tensor, None]]:
        """Patches [N,P,D] and words [N,L,D] (masks True at padding) to what is added to them; no attention weights."""
        patches, words = self._heads("vision_proj", vision_features), self._heads("text_proj", text_features)

        def attend(queries: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None, out: str) -> Tensor:
            mask = None if padding is None else ~padding[:, None, None]
            seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
            return self.get_submodule(out)(seen.transpose(1, 2).flatten(2))

        from_text = self._heads("values_text_proj", text_features)
        from_image = self._heads("values_vision_proj", vision_features)
        return (
            (attend(patches, words, from_text, text_attention_mask, "out_vision_proj"), None),
            (attend(words, patches, from_image, vision_attention_mask, "out_text_proj"), None),
        )


class GroundingDinoDetector(nn.Module):
    """A transformers `GroundingDinoForObjectDetection`, a BERT tokenizer, and a phrase.

    Args:
        model: the network.
        tokenizer: BERT's.
        target: what to look for, as "book" or "a red car"; the full stop that ends a phrase is added.

    Raises:
        ValueError: an empty phrase, or several of them.
    """

    def __init__(self, model: Any, tokenizer: Any, target: str = "book") -> None:
        super().__init__()
        phrase = target.strip().removesuffix(".").strip().lower()
        if not phrase or "." in phrase:
            raise ValueError(f"target={target!r}: expected one phrase, such as 'book'")
        self.model: Any = model
        for layer in model.model.encoder.layers:
            if not isinstance(layer.fusion_layer.attn, ImageTextAttention):
                layer.fusion_layer.attn = ImageTextAttention(layer.fusion_layer.attn)
        self.tokens: Tensor = tokenizer(f"{phrase}.", return_tensors="pt")["input_ids"]

    def logits(self, pixels: Tensor) -> Tensor:
        """[N,3,h,w] to [N,Q,L]: how well each query matches each token of the phrase."""
        images = pixels.to(self.model.dtype)
        # The product that the model itself ends with, which it rounds to float32 and pads.
        states = self.model.model(pixel_values=images, input_ids=self.tokens.to(images.device).expand(len(images), -1))
        queries, text = states.intermediate_hidden_states[:, -1], states.encoder_last_hidden_state_text
        return at_least_float32(queries) @ at_least_float32(text).transpose(1, 2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        probability = self.logits(pixels).sigmoid().amax(-1)
        return probability, torch.ones_like(probability, dtype=torch.bool)


def build_object_removal_dino(context: RewardContext) -> ObjectRemovalReward:
    """Grounding DINO base (hub IDEA-Research/grounding-dino-base), which looks for a book."""
    context = published(context)
    from transformers import GroundingDinoForObjectDetection

    height = 512
    if context.weights == "pretrained":
        files = ["config.json", "model.safetensors", VOCABULARY_FILE]
        paths = find_files(context, NAME, _REPOSITORY, files)
        model = load_transformers(GroundingDinoForObjectDetection, paths[0].parent)
        vocabulary = read_vocabulary(paths[2])
    else:
        warn_random(NAME)
        vocabulary = letters()
        with seeded(context.seed):
            if context.scale == "tiny":
                height = 32
                model = GroundingDinoForObjectDetection(tiny_config())
            else:
                model = GroundingDinoForObjectDetection(_full_config())
            for key, parameter in model.named_parameters():
                # Attention weights that start at zero look at nothing in particular. Box heads stay at zero.
                if "bbox_embed" not in key and not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
            # Products of layer-normalised vectors would otherwise saturate the sigmoid.
            nn.init.constant_(model.model.decoder.layer_norm.weight, 0.1)
            # The same proposals for every picture: without jumps from one choice to the next the gradient is exact.
            nn.init.zeros_(model.model.enc_output_norm.weight)
    detector = GroundingDinoDetector(frozen(model, context), bert_tokenizer(vocabulary))
    return ObjectRemovalReward(detector, name=NAME, threshold=THRESHOLD, height=height)


def _full_config() -> Any:
    """Of the published base network: a Swin-B backbone; the rest are transformers' defaults."""
    from transformers import GroundingDinoConfig, SwinConfig

    backbone = SwinConfig(
        image_size=384,
        window_size=12,
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        out_indices=[2, 3, 4],
    )
    return GroundingDinoConfig(backbone_config=backbone)


def tiny_config() -> Any:
    """The same architecture with one or two narrow layers in each part."""
    from transformers import BertConfig, GroundingDinoConfig, SwinConfig

    backbone = SwinConfig(
        image_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        out_indices=[2, 3, 4],
        drop_path_rate=0.0,
    )
    text = BertConfig(
        vocab_size=LETTERS_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        d_model=64,  # in 32 groups: with one number in a group the group norm fails, with two it is nearly a sign
        num_feature_levels=3,
        encoder_layers=1,
        init_std=0.1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        disable_custom_kernels=True,
    )
