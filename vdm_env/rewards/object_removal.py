"""Is an object absent from the video? One minus how surely a detector finds it; VADER's object removal with YOLOS.

    score_i = 1 - mean over frames f of d(frame f of video i)

    soft: d = max over queries of p(object)
    hard: d = mean of p(object) over the queries whose best class is the object and whose p exceeds the threshold, or 0

Legend: N images, Q queries (boxes) of the detector; p(object) in [0,1] by query.

Source: Prabhudesai et al. 2024, arXiv:2407.08737 (hard; threshold 0.2); Fang et al. 2021, arXiv:2106.00666 (YOLOS).

Deviation: `mode="soft"` is the default. Below the threshold the published form has a gradient of exactly zero, so that
it cannot remove what it sees with less confidence than that; `mode="hard"` is the published form.

Deviation: in VADER's loop a frame without a hit sets the running sum to zero, instead of adding zero to it, so that
hits in earlier frames are forgotten. `forget_on_miss=True` does that; VADER trains on one frame, where it never shows.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.loading import (
    RewardContext,
    find_files,
    frozen,
    load_transformers,
    published,
    seeded,
    warn_random,
)
from vdm_env.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalise
from vdm_env.rewards.tensors import at_least_float32, in_chunks

COCO_BOOK = 84  # index of "book" among the 91 classes of the published YOLOS


class Detector(Protocol):
    """Finds one kind of object."""

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[N,3,h,w], ImageNet-normalised, to p(object) [N,Q] and whether the object is the query's best class [N,Q]."""
        ...


class YolosDetector(nn.Module):
    """A transformers `YolosForObjectDetection` and the name of one of its classes.

    Raises:
        ValueError: the model has no class of that name.
    """

    def __init__(self, model: Any, target: str = "book") -> None:
        super().__init__()
        classes = {str(label).lower(): int(index) for index, label in model.config.id2label.items()}
        if target.lower() not in classes:
            raise ValueError(f"the detector has no class {target!r}; it has {sorted(classes)[:100]}")
        self.model: Any = model
        self.index = classes[target.lower()]

    def logits(self, pixels: Tensor) -> Tensor:
        """[N,3,h,w] to [N,Q,classes + 1]; the last one stands for "no object"."""
        return at_least_float32(self.model(pixel_values=pixels.to(next(self.model.parameters()).dtype)).logits)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        probability = self.logits(pixels).softmax(-1)[..., :-1]
        return probability[..., self.index], probability.argmax(-1) == self.index


def resize_keeping_aspect(frames: Tensor, height: int) -> Tensor:
    """[N,3,H,W] to [N,3,height,floor(height W / H)], bilinear without anti-aliasing, as VADER prepares a detector."""
    width = height * frames.shape[-1] // frames.shape[-2]
    return F.interpolate(
        at_least_float32(frames), size=(height, width), mode="bilinear", align_corners=False, antialias=False
    )


class ObjectRemovalReward:
    """1 - how surely the object is found, mean over frames; in [0,1]. The prompt does not matter.

    Args:
        detector: finds the object.
        name: as it is called in logs.
        mode: "soft" or "hard", see the head of this file.
        threshold: of "hard".
        forget_on_miss: "hard" only: the published sum over frames, which starts anew after a frame without a hit.
        height: of the resized frames, in pixels.
        frames: frame policy; VADER trains on "random1".
        chunk_size: images the network sees at a time; None: all.

    Raises:
        ValueError: an unknown mode, a threshold outside [0,1], or forget_on_miss without "hard".
    """

    differentiable = True
    range = (0.0, 1.0)

    def __init__(
        self,
        detector: Detector,
        *,
        name: str = "ObjectRemoval",
        mode: Literal["soft", "hard"] = "soft",
        threshold: float = 0.2,
        forget_on_miss: bool = False,
        height: int = 512,
        frames: FramePolicy = "all",
        chunk_size: int | None = None,
    ) -> None:
        if mode not in ("soft", "hard"):
            raise ValueError(f"mode={mode!r} is unknown; expected 'soft' or 'hard'")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}: expected a probability in [0, 1]")
        if forget_on_miss and mode == "soft":
            raise ValueError("forget_on_miss is about frames without a hit, which only mode='hard' has")
        self.detector, self.name, self.mode = detector, name, mode
        self.threshold, self.forget_on_miss, self.height = threshold, forget_on_miss, height
        self.frames, self.chunk_size = frames, chunk_size

    def _found(self, frames: Tensor) -> Tensor:
        """[N,3,H,W] in [0,1] to [N,2]: how surely the object is found, and whether there was a hit."""
        pixels = normalise(resize_keeping_aspect(frames, self.height), IMAGENET_MEAN, IMAGENET_STD)
        probability, is_best = self.detector(pixels)
        if self.mode == "soft":
            found = probability.amax(-1)
            return torch.stack([found, torch.ones_like(found)], -1)
        kept = is_best & (probability > self.threshold)
        count = kept.sum(-1)
        found = torch.where(kept, probability, 0).sum(-1) / count.clamp(min=1)
        return torch.stack([found, (count > 0).to(found.dtype)], -1)

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        by_frame = in_chunks(self._found, video.flatten(0, 1), size=self.chunk_size).unflatten(0, video.shape[:2])
        found, hit = by_frame.unbind(-1)
        if self.forget_on_miss:
            after = hit.flip(1).cumprod(1).flip(1)  # 1 where this frame and all later ones have a hit
            found = found * after
        return 1 - found.mean(1)


def build_object_removal(context: RewardContext) -> ObjectRemovalReward:
    """YOLOS-base, trained on COCO (hub hustvl/yolos-base), which looks for books, VADER's default object.

    For another object: `ObjectRemovalReward(YolosDetector(model, "person"))`.
    """
    from transformers import YolosConfig, YolosForObjectDetection

    name = "ObjectRemoval"
    context = published(context)
    if context.weights == "pretrained":
        path = find_files(context, name, "hustvl/yolos-base", ["config.json", "model.safetensors"])[0]
        model = load_transformers(YolosForObjectDetection, path.parent)
        return ObjectRemovalReward(YolosDetector(frozen(model, context)), name=name)
    warn_random(name)
    labels = {i: f"class {i}" for i in range(91)} | {COCO_BOOK: "book"}
    size: dict[str, Any] = {"image_size": (800, 1344)}
    height = 512
    if context.scale == "tiny":
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        size |= {"image_size": (32, 48), "patch_size": 8, "num_detection_tokens": 6, "initializer_range": 0.2}
        labels, height = {0: "person", 1: "book"}, 32
    with seeded(context.seed):
        model = YolosForObjectDetection(YolosConfig(**size, id2label=labels))
        for parameter in model.parameters():
            if not parameter.any():  # detection tokens and positions start at zero: all queries would be the same
                nn.init.normal_(parameter, std=0.02)
    return ObjectRemovalReward(YolosDetector(frozen(model, context)), name=name, height=height)
