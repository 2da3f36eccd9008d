"""LAION's aesthetic predictors: a head on the unit CLIP image feature; about 1 (poor) to 10 (beautiful).

"Aesthetic" is the second, which VADER and DDPO train with; "AestheticV1" the first, one linear layer, which VBench
reports.

The head of the second has five linear layers and dropout but no activation between, so that it is exactly affine too:
score = w . e + b. For unit e its reach is b +- |w| (5.24 +- 18.0 for the published weights), and ascending it means
walking along one fixed direction of CLIP's space: a target, as VADER's loss |score - 10| has, is what keeps it from
running away.

Source: christophschuhmann/improved-aesthetic-predictor (V2), LAION-AI/aesthetic-predictor (V1), Prabhudesai et al.
2024, arXiv:2407.08737 (as a video reward).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.clip import ClipBackbone, frame_features
from vdm_env.rewards.clip_loading import VIT_L, transformers_clip
from vdm_env.rewards.loading import (
    RewardContext,
    find_files,
    frozen,
    load_strictly,
    published,
    read_tensors,
    seeded,
    world_folder,
)
from vdm_env.rewards.preprocess import Preprocess, clip_hf, vader_squash
from vdm_env.rewards.tensors import at_least_float32

HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
_HEAD_REPOSITORY = "christophschuhmann/improved-aesthetic-predictor"
V1_FILE = "sa_0_4_vit_l_14_linear.pth"
_V1_REPOSITORY = "LAION-AI/aesthetic-predictor"
_FULL_WIDTHS = (1024, 128, 64, 16)


class AestheticHead(nn.Module):
    """[..., width] unit features to [...] scores; names and dropout as in the published file (layers.0, 2, 4, 6, 7)."""

    def __init__(self, width: int = 768, hidden: Sequence[int] = _FULL_WIDTHS) -> None:
        super().__init__()
        a, b, c, d = hidden
        self.layers = nn.Sequential(
            nn.Linear(width, a),
            nn.Dropout(0.2),
            nn.Linear(a, b),
            nn.Dropout(0.2),
            nn.Linear(b, c),
            nn.Dropout(0.1),
            nn.Linear(c, d),
            nn.Linear(d, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.to(next(self.parameters()).dtype)).squeeze(-1)

    def affine(self) -> tuple[Tensor, Tensor]:
        """The five layers as one affine map, (weight [width], bias []), float64."""
        weight: Tensor | None = None
        bias = torch.zeros(())
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                w, b = layer.weight.detach().double(), layer.bias.detach().double()
                weight, bias = (w, b) if weight is None else (w @ weight, w @ bias + b)
        assert weight is not None
        return weight[0], bias[0]


class LinearAestheticHead(nn.Linear):
    """The first predictor's: [..., width] unit features to [...] scores; names as in the published file."""

    def __init__(self, width: int = 768) -> None:
        super().__init__(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.to(self.weight.dtype)).squeeze(-1)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(weight [width], bias []), float64."""
        return self.weight.detach().double()[0], self.bias.detach().double()[0]


class AestheticReward:
    """Mean over frames of head(unit image feature). The prompt does not matter.

    Args:
        backbone: the image tower.
        head: unit features [B,F,D] to [B,F].
        name: as it is called in logs.
        preprocess: resizing, see `preprocess.py`.
        frames: frame policy.
        chunk_size: images the network sees at a time; None: all.
    """

    differentiable = True

    def __init__(
        self,
        backbone: ClipBackbone,
        head: AestheticHead | LinearAestheticHead,
        *,
        name: str = "Aesthetic",
        preprocess: Preprocess = vader_squash,
        frames: FramePolicy = "all",
        chunk_size: int | None = None,
    ) -> None:
        self.backbone, self.head, self.name, self.preprocess = backbone, head.eval(), name, preprocess
        self.frames, self.chunk_size = frames, chunk_size
        weight, bias = head.affine()
        reach = float(weight.norm())
        self.range = (float(bias) - reach, float(bias) + reach)

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        scores = self.head(frame_features(self.backbone, video, self.preprocess, self.chunk_size))
        return at_least_float32(scores).mean(1)


def build_aesthetic(context: RewardContext) -> AestheticReward:
    """CLIP ViT-L/14 (hub openai/clip-vit-large-patch14) and LAION's head; in MovingShapes its own small pair."""
    backbone = transformers_clip(context, "Aesthetic", "openai/clip-vit-large-patch14", VIT_L)
    if context.weights == "random":
        with seeded(context.seed + 1):
            head = AestheticHead(VIT_L["projection_dim"], (32, 16, 8, 4) if context.scale == "tiny" else _FULL_WIDTHS)
    elif context.world is not None:
        path = world_folder(context, "Aesthetic", "rewards", "aesthetic") / "model.safetensors"
        head = head_from(read_tensors(path), path)
    else:
        (path,) = find_files(context, "Aesthetic", _HEAD_REPOSITORY, [HEAD_FILE])
        head = head_from(read_tensors(path), path)
    return AestheticReward(backbone, frozen(head, context))


def build_aesthetic_v1(context: RewardContext) -> AestheticReward:
    """CLIP ViT-L/14 and the linear head of LAION's first predictor, prepared as CLIP's own processor does."""
    context, name = published(context), "AestheticV1"
    backbone = transformers_clip(context, name, "openai/clip-vit-large-patch14", VIT_L)
    with seeded(context.seed + 1):
        head = LinearAestheticHead(VIT_L["projection_dim"])
    if context.weights == "pretrained":
        (path,) = find_files(context, name, _V1_REPOSITORY, [V1_FILE])
        load_strictly(head, {k: v.float() for k, v in read_tensors(path).items()}, path)
    return AestheticReward(backbone, frozen(head, context), name=name, preprocess=clip_hf)


def head_from(tensors: dict[str, Any], path: Any) -> AestheticHead:
    """The head whose widths the stored tensors have.

    Raises:
        CorruptWeightsError: the tensors are not such a head's.
    """
    widths = [tensors[k].shape[0] for k in (f"layers.{i}.weight" for i in (0, 2, 4, 6)) if k in tensors]
    first = tensors.get("layers.0.weight")
    complete = len(widths) == 4 and first is not None and first.ndim == 2
    head = AestheticHead(first.shape[1], widths) if complete and first is not None else AestheticHead()
    load_strictly(head, {k: v.float() for k, v in tensors.items()}, path)
    return head
