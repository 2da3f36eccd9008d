"""V-JEPA 2 on transformers' model: the leak-free composition, and the plain call that leaks."""

from __future__ import annotations

import pytest
import torch
from golden import golden_json, golden_tensors
from torch import Tensor

from vdm_env.rewards.jepa import JepaReward, target_tokens
from vdm_env.rewards.vjepa2 import VJepa2

pytestmark = pytest.mark.golden
NAME = "rewards_vjepa2_hf"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return golden_tensors(NAME, "fixture.safetensors")


@pytest.fixture(scope="module")
def model(tensors: dict[str, Tensor]) -> torch.nn.Module:
    from transformers import VJEPA2Config, VJEPA2Model

    model = VJEPA2Model(VJEPA2Config(**golden_json(NAME, "config.json")))
    model.load_state_dict({k.removeprefix("vjepa2."): v.float() for k, v in tensors.items() if k.startswith("vjepa2.")})
    return model.eval().requires_grad_(False)


def test_leak_free_prediction(tensors: dict[str, Tensor], model: torch.nn.Module) -> None:
    pixels = tensors["pixel_values_videos"].float().requires_grad_(True)
    network = VJepa2(model, num_frames=pixels.shape[1])
    seen, predicted = tensors["context_mask"], tensors["target_mask"]
    torch.testing.assert_close(network.context(pixels, seen), tensors["masked.context_tokens"], rtol=1e-5, atol=1e-5)
    prediction = network.predict(pixels, seen, predicted, 0)
    torch.testing.assert_close(prediction, tensors["masked.prediction"], rtol=1e-5, atol=1e-5)
    target = target_tokens(network.features(pixels), predicted)
    torch.testing.assert_close(target, tensors["masked.target"], rtol=1e-5, atol=1e-5)
    reward = JepaReward(network, name="VJEPA2", target_gradient=False)
    error = reward.errors(pixels, [(seen, predicted)]).mean()
    torch.testing.assert_close(error, tensors["masked.loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(error, pixels)[0], tensors["masked.grad"], rtol=1e-3, atol=1e-7)


def test_plain_call_of_transformers(tensors: dict[str, Tensor], model: torch.nn.Module) -> None:
    pixels = tensors["pixel_values_videos"].float()
    network = VJepa2(model, num_frames=pixels.shape[1], leak=True)
    mask = (tensors["context_mask"], tensors["target_mask"])
    torch.testing.assert_close(network.features(pixels), tensors["hf.last_hidden_state"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.predict(pixels, *mask, 0), tensors["hf.prediction"], rtol=1e-5, atol=1e-5)
    target = target_tokens(network.features(pixels), mask[1], normalise_target=False)
    torch.testing.assert_close(target, tensors["hf.target_hidden_state"], rtol=1e-5, atol=1e-5)
    for normalise_target, key in ((True, "hf.l1_layernormed_target"), (False, "hf.l1_plain")):
        reward = JepaReward(network, name="VJEPA2", normalise_target=normalise_target)
        torch.testing.assert_close(reward.errors(pixels, [mask]).mean(), tensors[key], rtol=1e-5, atol=0)


def test_only_the_plain_call_leaks(tensors: dict[str, Tensor], model: torch.nn.Module) -> None:
    """Noise in the hidden pixels alone."""
    pixels = tensors["pixel_values_videos"].float()
    network = VJepa2(model, num_frames=pixels.shape[1])
    depth, rows, columns = network.grid
    hidden = torch.zeros(len(pixels), depth * rows * columns).scatter(1, tensors["target_mask"], 1.0)
    times, side = pixels.shape[1] // depth, pixels.shape[-1] // rows
    hidden = hidden.view(-1, depth, rows, columns).repeat_interleave(times, 1)
    hidden = hidden.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, None]
    other = pixels + hidden * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    seen = tensors["context_mask"]
    assert torch.equal(network.context(pixels, seen), network.context(other, seen))
    leaking = VJepa2(model, num_frames=pixels.shape[1], leak=True)
    context = leaking.context(pixels, seen).detach()
    leak = float((context - leaking.context(other, seen)).detach().abs().max())
    assert leak > 1e-3 * float(context.std()) and float(tensors["hf.context_leak_max_abs"]) > 0
