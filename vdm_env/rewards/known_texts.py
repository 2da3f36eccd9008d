"""Rewards without their text towers: the features of all prompts are made once, and the towers are let go.

A CLIP-style reward needs its text tower for the prompts alone, and the aesthetic predictor not at all; on a card they
would lie there for nothing: 0.66 GiB of HPSv2's, 0.23 GiB of ViT-L/14's, in 16 bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vdm_env.rewards.aesthetic import AestheticReward
from vdm_env.rewards.base import FunctionReward
from vdm_env.rewards.chunked import Chunked
from vdm_env.rewards.clip import ClipReward
from vdm_env.rewards.combine import WeightedSum

AT_ONCE = 8
"""Texts that a tower sees together."""
_TEXT_PARTS = ("transformer", "token_embedding", "ln_final", "text_model", "text_projection")
"""Modules of open_clip's and transformers' CLIP that `image_features` does not use."""


class KnownTexts(nn.Module):
    """A `ClipBackbone` with an image tower, and text features for the texts it was made with.

    Args:
        backbone: with both towers; it stays as it is.
        features: {text: [D]}.
    """

    def __init__(self, backbone: Any, features: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.side, self.logit_scale, self.features = backbone.side, backbone.logit_scale, dict(features)
        self.backbone = _without_text(backbone)

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.backbone.image_features(pixels)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Raises ValueError for a text that is not known."""
        unknown = [text for text in prompts if text not in self.features]
        if unknown:
            raise ValueError(
                f"the text tower of a reward was freed (free_text_encoder=True), so {unknown[:3]} cannot be compared "
                "with a video; give make(prompts=...) all prompts of every split, or leave free_text_encoder out"
            )
        return torch.stack([self.features[text] for text in prompts])


def with_known_texts(reward: Any, texts: Sequence[str]) -> Any:
    """The same reward for these texts alone, or the reward itself where it has no text tower that is known here.

    Memory is given back once nobody else holds the reward that was given, which stays as it is. Scores differ at most
    in rounding, where texts were encoded in another batch.

    Args:
        reward: a CLIP-style or aesthetic one, or a sum, a chunked or a wrapped one of such.
        texts: all prompts that it will be asked about.
    """
    if isinstance(reward, WeightedSum):
        return WeightedSum([replace(part, reward=with_known_texts(part.reward, texts)) for part in reward.terms])
    if isinstance(reward, FunctionReward):
        return replace(reward, function=with_known_texts(reward.function, texts))
    if isinstance(reward, Chunked):
        return Chunked(with_known_texts(reward.reward, texts), reward.chunk, recompute=reward.recompute)
    if not isinstance(reward, ClipReward | AestheticReward) or not hasattr(reward.backbone, "model"):
        return reward
    features = _features(reward.backbone, texts) if isinstance(reward, ClipReward) else {}
    changed = copy.copy(reward)
    changed.backbone = KnownTexts(reward.backbone, features)
    return changed


@torch.no_grad()
def _features(backbone: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    different = list(dict.fromkeys(texts))
    found: dict[str, Tensor] = {}
    for start in range(0, len(different), AT_ONCE):
        some = different[start : start + AT_ONCE]
        found |= zip(some, backbone.text_features(some).unbind(), strict=True)
    return {text: value.clone() for text, value in found.items()}


def _without_text(backbone: Any) -> Any:
    """A shallow copy that shares the image tower's weights."""
    light, model = copy.copy(backbone), copy.copy(backbone.model)
    model._modules = {name: part for name, part in model._modules.items() if name not in _TEXT_PARTS}
    light._modules = {**light._modules, "model": model}
    return light
