"""Object removal with YOLOS against the outputs and pixel gradients of VADER's own program."""

from __future__ import annotations

import pytest
import torch
from golden import comparable, golden_json, golden_tensors
from torch import Tensor

from vdm_env.rewards.object_removal import ObjectRemovalReward, YolosDetector, resize_keeping_aspect
from vdm_env.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalise

pytestmark = pytest.mark.golden
NAME = "rewards_vader_yolos"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return golden_tensors(NAME, "fixture.safetensors")


@pytest.fixture(scope="module")
def model(tensors: dict[str, Tensor]) -> torch.nn.Module:
    from transformers import YolosConfig, YolosForObjectDetection

    model = YolosForObjectDetection(YolosConfig(**golden_json(NAME, "config.json")))
    state = {k.removeprefix("yolos."): v.float() for k, v in tensors.items() if k.startswith("yolos.")}
    known = model.state_dict()  # older releases of transformers have the positions one level higher
    model.load_state_dict({k if k in known else k.replace("interpolation.", ""): v for k, v in state.items()})
    return model.eval().requires_grad_(False)


def _labels(tensors: dict[str, Tensor]) -> list[str]:
    return sorted(k.removesuffix(".loss") for k in tensors if k.endswith(".loss"))


def _video(frames: Tensor) -> Tensor:
    """All frames [F,3,H,W] of a decoder as one video in [0,1]."""
    return (frames / 2 + 0.5).clamp(0, 1)[None]


def _kept(logits: Tensor, target: int, threshold: float = 0.2) -> list[Tensor]:
    """By frame, the scores that transformers' own post-processing keeps for the target."""
    from transformers import YolosImageProcessor
    from transformers.models.yolos.modeling_yolos import YolosObjectDetectionOutput

    output = YolosObjectDetectionOutput(logits=logits, pred_boxes=torch.zeros(*logits.shape[:2], 4))
    found = YolosImageProcessor().post_process_object_detection(output, threshold=threshold)
    return [f["scores"][f["labels"] == target] for f in found]


def test_logits(tensors: dict[str, Tensor], model: torch.nn.Module) -> None:
    pixels = normalise(resize_keeping_aspect(_video(tensors["frames"].float())[0], 512), IMAGENET_MEAN, IMAGENET_STD)
    detector = YolosDetector(model, _labels(tensors)[0])
    torch.testing.assert_close(detector.logits(pixels), tensors["logits"], rtol=1e-4, atol=1e-5)


def test_published_form(tensors: dict[str, Tensor], model: torch.nn.Module) -> None:
    """With the running sum that starts anew after a frame without a hit."""
    for label in _labels(tensors):
        reward = ObjectRemovalReward(YolosDetector(model, label), mode="hard", forget_on_miss=True)
        frames = tensors["frames"].float().requires_grad_(True)
        score = reward(_video(frames), [""])[0]
        torch.testing.assert_close(1 - score, tensors[f"{label}.loss"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(score, tensors[f"{label}.reward"], rtol=1e-4, atol=0)
        (gradient,) = torch.autograd.grad(1 - score, frames)
        where = comparable(frames)
        torch.testing.assert_close(gradient[where], tensors[f"{label}.grad"][where], rtol=1e-2, atol=1e-7)
        single = reward(_video(tensors["frames"].float()[:1]), [""])[0]
        torch.testing.assert_close(1 - single, tensors[f"{label}.single_frame_loss"], rtol=1e-4, atol=0)
        torch.testing.assert_close(single, tensors[f"{label}.single_frame_reward"], rtol=1e-4, atol=0)


def test_no_hit_is_forgotten_by_default(tensors: dict[str, Tensor], model: torch.nn.Module) -> None:
    """The mean of what transformers' post-processing keeps, a frame without a hit counting as zero."""
    classes = {label: index for index, label in model.config.id2label.items()}
    for label in _labels(tensors):
        kept = _kept(tensors["logits"], classes[label])
        expected = torch.stack([k.mean() if len(k) else k.sum() for k in kept]).mean()
        for chunk in (None, 2):
            reward = ObjectRemovalReward(YolosDetector(model, label), mode="hard", chunk_size=chunk)
            score = reward(_video(tensors["frames"].float()), [""])[0]
            torch.testing.assert_close(1 - score, expected, rtol=1e-4, atol=1e-6)


def test_soft_form_is_the_surest_query(tensors: dict[str, Tensor], model: torch.nn.Module) -> None:
    classes = {label: index for index, label in model.config.id2label.items()}
    for label in _labels(tensors):
        frames = tensors["frames"].float().requires_grad_(True)
        score = ObjectRemovalReward(YolosDetector(model, label))(_video(frames), [""])[0]
        expected = tensors["logits"].softmax(-1)[..., classes[label]].amax(-1).mean()
        torch.testing.assert_close(1 - score, expected, rtol=1e-4, atol=1e-6)
        (gradient,) = torch.autograd.grad(score, frames)
        assert bool((gradient.abs().amax((1, 2, 3)) > 0).all()), "every frame gets a gradient, hit or not"
