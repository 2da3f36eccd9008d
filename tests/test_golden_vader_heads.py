"""VADER's compression and weather heads against the outputs and pixel gradients of its own program."""

from __future__ import annotations

import pytest
import torch
from golden import golden, golden_json, golden_tensors
from torch import Tensor

from vdm_env.rewards.aesthetic import head_from
from vdm_env.rewards.clip import TransformersClipBackbone
from vdm_env.rewards.vader_heads import compression, compression_from, weather

pytestmark = pytest.mark.golden
NAME = "rewards_vader_heads"


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def backbone() -> TransformersClipBackbone:
    from transformers import CLIPConfig, CLIPModel

    config = golden_json("rewards_vader_aesthetic", "config.json")
    model = CLIPModel(CLIPConfig(**config))
    tensors = golden_tensors("rewards_vader_aesthetic", "fixture.safetensors")
    model.load_state_dict(_under(tensors, "clip."), strict=True)
    return TransformersClipBackbone(model.eval().requires_grad_(False), lambda texts: {})


def _video(frames: Tensor) -> Tensor:
    return ((frames + 1) / 2).clamp(0, 1)[:, None]


def _close(actual: Tensor, expected: Tensor, frames: Tensor, loss: Tensor, gradient: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(loss, frames)[0], gradient, rtol=1e-3, atol=1e-7)


def test_compression(backbone: TransformersClipBackbone) -> None:
    tensors = golden_tensors(NAME, "fixture.safetensors")
    head = compression_from(_under(tensors, "compression.head."), golden(NAME)).requires_grad_(False)
    frames = tensors["frames"].float().requires_grad_(True)
    prompts = [""] * len(frames)
    size = compression(backbone, head, sign=1)(_video(frames), prompts)
    assert torch.equal(compression(backbone, head)(_video(frames), prompts), -size), "smaller is better"
    torch.testing.assert_close(size.mean(), tensors["compression.reward"], rtol=1e-5, atol=1e-7)
    _close(size.mean(), tensors["compression.loss"], frames, size.mean(), tensors["compression.grad"])


@pytest.mark.parametrize("name", ["Rainy", "Snowy"])
def test_weather(backbone: TransformersClipBackbone, name: str) -> None:
    tensors = golden_tensors(NAME, "fixture.safetensors")
    head = head_from(_under(tensors, "weather.head."), golden(NAME)).requires_grad_(False)
    frames = tensors["frames"].float().requires_grad_(True)
    scores = weather(backbone, head, name=name)(_video(frames), [""] * len(frames))  # type: ignore[arg-type]
    loss = (scores - 1).abs().mean()
    torch.testing.assert_close(scores.mean(), tensors["weather.reward"], rtol=1e-5, atol=1e-7)
    _close(loss, tensors["weather.loss"], frames, loss, tensors["weather.grad"])


def test_chunks_give_the_same_gradient(backbone: TransformersClipBackbone) -> None:
    tensors = golden_tensors(NAME, "fixture.safetensors")
    head = compression_from(_under(tensors, "compression.head."), golden(NAME)).requires_grad_(False)
    frames = tensors["frames"].float().requires_grad_(True)
    size = compression(backbone, head, sign=1, chunk_size=3)(_video(frames).transpose(0, 1), [""])
    _close(size.mean(), tensors["compression.loss"], frames, size.mean(), tensors["compression.grad"])
