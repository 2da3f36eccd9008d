"""V-JEPA 1 against the outputs and pixel gradients of the training program."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from golden import golden, golden_json, golden_tensors
from torch import Tensor

from vdm_env.rewards.block_masks import Mask
from vdm_env.rewards.jepa import JepaReward, target_tokens
from vdm_env.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD
from vdm_env.rewards.vjepa import VJepa, VJepaConfig, sincos_positions, vjepa_from

pytestmark = pytest.mark.golden
NAME = "rewards_vjepa1"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return golden_tensors(NAME, "fixture.safetensors")


@pytest.fixture(scope="module")
def config() -> VJepaConfig:
    stored = golden_json(NAME, "config.json")
    assert stored["uniform_power"] and stored["qkv_bias"], "the only form there is a release of"
    return VJepaConfig(**{f.name: stored[f.name] for f in fields(VJepaConfig) if f.name in stored})


@pytest.fixture(scope="module")
def model(tensors: dict[str, Tensor], config: VJepaConfig) -> VJepa:
    parts = {
        part: {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.backbone.")}
        for part in ("encoder", "target_encoder", "predictor")
    }
    return vjepa_from(parts, config, golden(NAME)).eval().requires_grad_(False)


def _masks(tensors: dict[str, Tensor]) -> list[Mask]:
    count = sum(k.startswith("mask_enc.") for k in tensors)
    return [(tensors[f"mask_enc.{i}"], tensors[f"mask_pred.{i}"]) for i in range(count)]


def test_position_tables(tensors: dict[str, Tensor], config: VJepaConfig) -> None:
    for key, width in (
        ("encoder.backbone.pos_embed", config.embed_dim),
        ("predictor.backbone.predictor_pos_embed", config.pred_embed_dim),
    ):
        torch.testing.assert_close(sincos_positions(width, config.grid), tensors[key], rtol=0, atol=1e-7)


def test_targets_and_predictions(tensors: dict[str, Tensor], model: VJepa) -> None:
    pixels = tensors["clip"].float().transpose(1, 2)
    for i, (seen, predicted) in enumerate(_masks(tensors)):
        target = target_tokens(model.features(pixels), predicted)
        torch.testing.assert_close(target, tensors[f"target.{i}"], rtol=1e-5, atol=1e-5)
        prediction = model.predict(pixels, seen, predicted, i)
        torch.testing.assert_close(prediction, tensors[f"prediction.{i}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "loss", "gradient"),
    [
        ({"target_gradient": False}, "loss", "grad_context_only"),
        ({}, "loss_target_with_grad", "grad_context_and_target"),
        ({"exponent": 2.0}, "loss_exp2", None),
    ],
)
def test_losses_and_gradients(
    tensors: dict[str, Tensor], model: VJepa, options: dict[str, float], loss: str, gradient: str | None
) -> None:
    reward = JepaReward(model, name="VJEPA", **options)  # type: ignore[arg-type]
    clip = tensors["clip"].float().requires_grad_(True)
    error = reward.errors(clip.transpose(1, 2), _masks(tensors)).mean()
    torch.testing.assert_close(error, tensors[loss], rtol=1e-5, atol=0)
    if gradient is not None:
        torch.testing.assert_close(torch.autograd.grad(error, clip)[0], tensors[gradient], rtol=1e-3, atol=1e-7)


def test_score_of_a_video_is_minus_its_loss(tensors: dict[str, Tensor], model: VJepa) -> None:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    videos = tensors["clip"].float().transpose(1, 2) * std + mean
    scores = []
    for i, video in enumerate(videos):
        masks = [(seen[i], predicted[i]) for seen, predicted in _masks(tensors)]
        scores.append(JepaReward(model, name="VJEPA", masks=masks)(video[None], [""]))
    torch.testing.assert_close(-torch.cat(scores).mean(), tensors["loss"], rtol=1e-5, atol=1e-6)
