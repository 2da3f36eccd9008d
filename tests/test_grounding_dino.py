"""Grounding DINO looks at a batch of frames at once; each frame is scored as transformers scores it alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from vdm_env.rewards import REWARDS, RewardContext
from vdm_env.rewards.grounding_dino import ImageTextAttention, tiny_config

LENGTH = 5


@pytest.fixture(scope="module")
def reward() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return REWARDS["ObjectRemovalDINO"].build(RewardContext(weights="random", scale="tiny", seed=1))


@pytest.fixture
def fusion() -> Any:
    """transformers' own fusion of image and text, in float64."""
    from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoBiMultiHeadAttention

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return GroundingDinoBiMultiHeadAttention(tiny_config()).double().eval()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_fusion_equals_transformers_with_and_without_padding(fusion: Any) -> None:
    image, text = noise(3, 12, 64, dtype=torch.float64), noise(3, LENGTH, 64, seed=1, dtype=torch.float64)
    padded_text = torch.arange(LENGTH)[None] >= torch.tensor([[5], [3], [4]])
    padded_image = torch.arange(12)[None] >= torch.tensor([[12], [7], [12]])
    ours = ImageTextAttention(fusion)
    assert set(ours.state_dict()) == set(fusion.state_dict()), "files keep their names"
    for masks in ((None, None), (padded_image, padded_text)):
        for found, wanted in zip(ours(image, text, *masks), fusion(image, text, *masks), strict=True):
            torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-12)


def test_a_batch_is_one_call_and_equals_transformers_image_by_image(reward: Any) -> None:
    """Of the network as transformers has it, one image at a time."""
    detector = reward.detector
    pixels = noise(LENGTH, 3, 32, 40)
    plain = copy.deepcopy(detector.model)
    from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoBiMultiHeadAttention

    for layer in plain.model.encoder.layers:
        original = GroundingDinoBiMultiHeadAttention(plain.config)
        original.load_state_dict(layer.fusion_layer.attn.state_dict())
        layer.fusion_layer.attn = original
    plain.eval().requires_grad_(False)
    length = detector.tokens.shape[1]
    alone = [plain(pixel_values=p[None], input_ids=detector.tokens).logits[..., :length] for p in pixels]
    calls: list[int] = []
    hook = detector.model.model.register_forward_hook(lambda *a: calls.append(len(a[2].last_hidden_state)))
    logits = detector.logits(pixels)
    hook.remove()
    assert calls == [LENGTH]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_of_a_batch_do_not_touch_each_other(reward: Any, dtype: torch.dtype) -> None:
    """One image far out of range moves neither the others' logits beyond rounding nor their gradients."""
    model = copy.deepcopy(reward.detector.model).to(dtype)
    detector = copy.copy(reward.detector)
    detector._modules = dict(reward.detector._modules, model=model)
    pixels = noise(3, 3, 32, 32)
    wild = pixels.clone()
    wild[2] *= 50
    for images in (pixels, wild):
        images.requires_grad_(True)
    first, second = detector.logits(pixels), detector.logits(wild)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(first[:2], second[:2], rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(second[1].sum(), wild)
    assert bool(gradient[1].any()) and not gradient[[0, 2]].any()
