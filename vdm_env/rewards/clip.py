"""Rewards that compare each frame with its prompt in a joint embedding: HPSv2, HPSv2.1, PickScore, CLIPScore.

    score_i = mean over frames f of  scale * cos(image(video_if), text(prompt_i))

HPSv2 (Wu et al. 2023, arXiv:2306.09341): scale 1. PickScore (Kirstain et al. 2023, arXiv:2305.01569): exp(logit_scale).
CLIPScore as EvalCrafter and VBench report it (after Hessel et al. 2021, arXiv:2104.08718): 100, negative cosines kept.
Only the pairs (video i, prompt i) are formed. VADER's PickScore, as the snippet of the release, compares every image
with the first prompt of the batch; `prompt="first"` does that, for numbers to be put beside published ones.

Legend: B videos, F frames, N = B*F images, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, clip_hf, normalise, vader_squash

Tokenizer = Callable[[list[str]], Mapping[str, Tensor]]


class ClipBackbone(Protocol):
    """An image and a text tower. `side`: input pixels; `logit_scale`: the exponentiated temperature."""

    side: int
    logit_scale: float

    def image_features(self, pixels: Tensor) -> Tensor:
        """[N,3,side,side], CLIP-normalised, to [N,D], not yet of unit length."""
        ...

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """B texts to [B,D], not yet of unit length."""
        ...


class OpenClipBackbone(nn.Module):
    """A CLIP of open_clip and its tokenizer (texts -> int64 [B,L])."""

    def __init__(self, model: Any, tokenizer: Callable[[list[str]], Tensor]) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer = tokenizer
        size: Any = model.visual.image_size
        self.side = int(size[0] if isinstance(size, tuple) else size)
        self.logit_scale = float(model.logit_scale.detach().exp())

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels.to(self.model.logit_scale.dtype))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(prompts)).to(self.model.logit_scale.device)
        return self.model.encode_text(tokens)


class TransformersClipBackbone(nn.Module):
    """A transformers `CLIPModel` and a tokenizer (texts -> input_ids and attention_mask).

    Since transformers 5 `get_image_features` returns an output object whose `pooler_output` is the projected feature;
    before, it returned that tensor itself.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer = tokenizer
        self.side = int(model.config.vision_config.image_size)
        self.logit_scale = float(model.logit_scale.detach().exp())

    def image_features(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.model.logit_scale.dtype)
        output = self.model.get_image_features(pixel_values=pixels)
        return getattr(output, "pooler_output", output)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        device = self.model.logit_scale.device
        tokens = {k: v.to(device) for k, v in self.tokenizer(list(prompts)).items()}
        output = self.model.get_text_features(**tokens)
        return getattr(output, "pooler_output", output)


def frame_features(
    backbone: ClipBackbone, video: Tensor, preprocess: Preprocess, chunk_size: int | None = None
) -> Tensor:
    """Unit image features [B,F,D] of a video [B,F,3,H,W] in [0,1]; all frames as one batch.

    Or `chunk_size` at a time.
    """
    frames = video.flatten(0, 1)
    chunks = frames.split(chunk_size or len(frames))
    features = [backbone.image_features(normalise(preprocess(c, backbone.side), CLIP_MEAN, CLIP_STD)) for c in chunks]
    together = torch.cat(features)
    return _unit(together).unflatten(0, video.shape[:2])


def _unit(features: Tensor) -> Tensor:
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    return F.normalize(features, dim=-1)


class ClipReward:
    """Mean over frames of scale * cosine(frame, prompt).

    Args:
        backbone: the two towers.
        name: as it is called in logs.
        scale: a number, or "logit" for the backbone's exp(logit_scale).
        preprocess: resizing, see `preprocess.py`.
        frames: frame policy.
        chunk_size: images the network sees at a time; None: all. Smaller needs less memory when no gradients are kept.
        prompt: which prompt of the batch a video is compared with, its "own" or the "first".

    Raises:
        ValueError: another prompt than these.
    """

    differentiable = True

    def __init__(
        self,
        backbone: ClipBackbone,
        *,
        name: str,
        scale: float | Literal["logit"] = 1.0,
        preprocess: Preprocess = vader_squash,
        frames: FramePolicy = "all",
        chunk_size: int | None = None,
        prompt: Literal["own", "first"] = "own",
    ) -> None:
        if prompt not in ("own", "first"):
            raise ValueError(f"prompt={prompt!r} is unknown; expected 'own' or 'first'")
        self.backbone, self.name, self.preprocess = backbone, name, preprocess
        self.frames, self.chunk_size, self.prompt = frames, chunk_size, prompt
        self.scale = backbone.logit_scale if scale == "logit" else float(scale)
        self.range = (-self.scale, self.scale)

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        prompts = [prompts[0]] * len(prompts) if self.prompt == "first" else prompts
        image = frame_features(self.backbone, video, self.preprocess, self.chunk_size)
        # Groups share a prompt: each different text is encoded once.
        different = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        with torch.no_grad():
            text = _unit(self.backbone.text_features(list(different)))[[different[p] for p in prompts]]
        return self.scale * (image * text[:, None]).sum(-1).mean(1)


def hps(
    backbone: ClipBackbone, *, name: str = "HPS", preprocess: Preprocess = vader_squash, **options: Any
) -> ClipReward:
    """HPSv2 / HPSv2.1: the cosine itself. They differ in their weights only; official scorer.

    `preprocess=hpsv2_pad`.
    """
    return ClipReward(backbone, name=name, scale=1.0, preprocess=preprocess, **options)


def pick_score(backbone: ClipBackbone, *, preprocess: Preprocess = clip_hf, **options: Any) -> ClipReward:
    """PickScore: exp(logit_scale) * cosine; about 16 to 26 with the published weights."""
    return ClipReward(backbone, name="PickScore", scale="logit", preprocess=preprocess, **options)


def clip_score(backbone: ClipBackbone, *, preprocess: Preprocess = clip_hf, **options: Any) -> ClipReward:
    """CLIPScore: 100 * cosine."""
    return ClipReward(backbone, name="CLIP", scale=100.0, preprocess=preprocess, **options)
