"""Does the video show the action its prompt names? Probability of that class under a VideoMAE classifier.

VADER (Prabhudesai et al. 2024, arXiv:2407.08737) trains with the cross entropy, -log of this score. The action is found
in the prompt by a table from phrase to class; every class name is a phrase for itself.

Source of the classifier: Tong et al. 2022, arXiv:2203.12602, fine-tuned on Kinetics-400.
Pre-processing: squash to the network's side, ImageNet mean and deviation (transformers' class default of 0.5 is not
what these weights were trained with).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vdm_env.rewards.base import FramePolicy, check_inputs, select_frames
from vdm_env.rewards.loading import (
    RewardContext,
    find_files,
    frozen,
    load_transformers,
    seeded,
    warn_random,
    world_folder,
)
from vdm_env.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, normalise, vader_squash

# A word of the prompt to the Kinetics-400 class; the activities VADER trains on.
KINETICS_PHRASES: dict[str, str] = {
    "piano": "playing piano",
    "guitar": "playing guitar",
    "doughnut": "eating doughnuts",
    "beer": "drinking beer",
    "badminton": "playing badminton",
    "cello": "playing cello",
    "scooter": "riding scooter",
    "ballet": "dancing ballet",
    "pancake": "flipping pancake",
    "violin": "playing violin",
    "wood": "chopping wood",
    "watermelon": "eating watermelon",
    "jogging": "jogging",
}


class ActionReward:
    """Softmax probability (or its logarithm) of the class that the prompt names.

    Args:
        model: a transformers `VideoMAEForVideoClassification`.
        phrases: phrase in the prompt (lower case) to class name, beside the class names themselves; the longest phrase
            wins.
        score: "probability" in [0,1], or "log_probability" (<= 0), which keeps its gradient where the class is
            unlikely.
        preprocess: resizing, see `preprocess.py`.

    Raises:
        ValueError: a phrase stands for a class the model does not have.
    """

    differentiable = True
    name = "Action"

    def __init__(
        self,
        model: nn.Module,
        *,
        phrases: Mapping[str, str] | None = None,
        score: Literal["probability", "log_probability"] = "probability",
        preprocess: Preprocess = vader_squash,
    ) -> None:
        if score not in ("probability", "log_probability"):
            raise ValueError(f"score={score!r} is unknown; expected 'probability' or 'log_probability'")
        config: Any = model.config
        classes = {str(label).lower(): int(index) for index, label in config.id2label.items()}
        self.model, self.preprocess, self.score = model, preprocess, score
        self.side, self.num_frames = int(config.image_size), int(config.num_frames)
        missing = sorted(set((phrases or {}).values()) - set(classes))
        if missing:
            raise ValueError(
                f"phrases stand for classes the model does not have: {missing}; it has {sorted(classes)[:20]}"
            )
        self.phrases = classes | {k.lower(): classes[v] for k, v in (phrases or {}).items()}
        self.frames: FramePolicy = f"middle{self.num_frames}"
        self.range: tuple[float, float] = (0.0, 1.0) if score == "probability" else (-math.inf, 0.0)

    def class_of(self, prompt: str) -> int:
        """Index of the class a prompt names.

        Raises:
            ValueError: it names none.
        """
        text = prompt.lower()
        found = [phrase for phrase in self.phrases if phrase in text]
        if not found:
            raise ValueError(
                f"prompt {prompt!r} names no action this reward knows; expected one of the phrases "
                f"{sorted(self.phrases)[:30]}; pass `phrases` to add your own"
            )
        return self.phrases[max(found, key=len)]

    def check_num_frames(self, count: int) -> None:
        """Raises ValueError for fewer frames than the network takes."""
        if count < self.num_frames:
            raise ValueError(
                f"reward {self.name!r} looks at {self.num_frames} frames, got {count}: decode at least as many "
                "(decode_frames), or build the reward with num_frames of the video"
            )

    def logits(self, video: Tensor) -> Tensor:
        """[B,F,3,H,W] in [0,1] to [B, classes]; more frames than the network takes are thinned out evenly."""
        self.check_num_frames(video.shape[1])
        if video.shape[1] > self.num_frames:
            video = video[:, select_frames(self.frames, video.shape[1]).to(video.device)]
        frames = normalise(self.preprocess(video.flatten(0, 1), self.side), IMAGENET_MEAN, IMAGENET_STD)
        frames = frames.unflatten(0, video.shape[:2]).to(next(self.model.parameters()).dtype)
        logits = self.model(pixel_values=frames).logits
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        target = torch.tensor([self.class_of(p) for p in prompts], device=video.device)
        log_probability = self.logits(video).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
        return log_probability if self.score == "log_probability" else log_probability.exp()


def load_videomae(folder: Path, **config_changes: Any) -> Any:
    """A transformers `VideoMAEForVideoClassification` in float32, see `load_transformers`.

    VideoMAE's keys have no bias, and files name the other two `q_bias` and `v_bias`. Not every release of transformers
    translates these names, and some have a bias of the keys, which is zero and stays it.
    """
    from transformers import VideoMAEForVideoClassification

    attention = r"attention\.attention\."
    renamed = {
        attention + "q_bias": "attention.attention.query.bias",
        attention + "v_bias": "attention.attention.value.bias",
    }
    return load_transformers(
        VideoMAEForVideoClassification, folder, renamed=renamed, fresh=".attention.key.bias", **config_changes
    )


def build_action(context: RewardContext) -> ActionReward:
    """VideoMAE-base fine-tuned on Kinetics-400 (hub MCG-NJU/videomae-base-finetuned-kinetics), or MovingShapes' own.

    `context.num_frames` fits the network to shorter or longer videos: its position table is sinusoidal and not stored,
    so it can be rebuilt for any even number of frames, as VADER does.
    """
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    if context.world is not None and context.weights == "pretrained":
        folder = world_folder(context, "Action", "rewards", "action")
        return ActionReward(frozen(load_videomae(folder), context))
    changes: dict[str, Any] = {}
    if context.num_frames is not None:
        if context.num_frames < 2:
            raise ValueError(f"reward 'Action' needs videos of at least 2 frames, got num_frames={context.num_frames}")
        changes["num_frames"] = min(16, context.num_frames // 2 * 2)  # tubelets are two frames long
    if context.weights == "pretrained":
        repository = "MCG-NJU/videomae-base-finetuned-kinetics"
        path = find_files(context, "Action", repository, ["config.json", "model.safetensors"])[0]
        return ActionReward(frozen(load_videomae(path.parent, **changes), context), phrases=KINETICS_PHRASES)
    warn_random("Action")
    classes = list(dict.fromkeys(KINETICS_PHRASES.values()))
    if context.world is not None:
        from vdm_env.worlds.moving_shapes.render import DIRECTIONS

        classes = [f"moving {d}" for d in DIRECTIONS]
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tiny |= {"image_size": 32, "patch_size": 8, "num_frames": 8}
    with seeded(context.seed):
        config = VideoMAEConfig(
            **((tiny if context.scale == "tiny" else {}) | changes),
            use_mean_pooling=True,
            id2label=dict(enumerate(classes)),
        )
        model = VideoMAEForVideoClassification(config)
    return ActionReward(frozen(model, context), phrases=None if context.world else KINETICS_PHRASES)
