"""Recomputing layers and decoders in the backward pass: the same numbers from fewer stored activations."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet3DConditionModel
from torch import Tensor, nn

from tests.every_model import load, small_env
from tests.models import tiny_model
from tests.svd import pictures, tiny_svd
from tests.weights import wake
from vdm_env import make
from vdm_env.models import MODELS, codec, recompute, stdit3

BLOCKWISE = ("ModelScope", "VideoCrafter2", "T2VTurboV2", "OpenSora1.2", "MovingShapesUNet")
"""Networks whose classes had no switch, or one of their own."""


@contextmanager
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes that are kept for the backward pass inside: by autograd, and the arguments that a checkpoint keeps."""
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    def counted(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def call(function: Any, *arguments: Any, **options: Any) -> Any:
            for value in (*arguments, *options.values()):
                if isinstance(value, Tensor):
                    note(value)
            return checkpoint(function, *arguments, **options)

        return call

    with monkeypatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for module in (recompute, stdit3, codec, torch.utils.checkpoint):
            patch.setattr(module, "checkpoint", counted(module.checkpoint))
        yield kept


def weights_of(network: nn.Module) -> list[nn.Parameter]:
    """Some of the weights, from the first to the last layer."""
    return [p for n, p in network.named_parameters() if n.endswith(("weight", "scale_shift_table")) and p.ndim > 1]


def run(network: nn.Module, predict: Callable[[Tensor], Tensor], x: Tensor, monkeypatch: Any) -> tuple[Any, Any, int]:
    """Output, gradients of input and weights, and bytes stored."""
    weights = weights_of(network)
    x = x.clone().requires_grad_(True)
    torch.manual_seed(7)  # for networks with dropout
    with stored(monkeypatch) as kept:
        output = predict(x)
    gradients = torch.autograd.grad(output.square().mean(), [x, *weights], materialize_grads=True)
    return output.detach(), gradients, sum(kept)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BLOCKWISE)
def test_layers_are_recomputed_one_by_one(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = MODELS[name].load(weights="random", scale="tiny", device="cpu", dtype=torch.float32, seed=0)
    network = model.denoiser.requires_grad_(True).train(training)
    wake(network)
    spec = model.spec
    shape = model.latent_shape(spec.num_frames, spec.height, spec.width)
    x, t = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    condition = {name: value.detach() for name, value in model.encode_prompts(["a dog"]).items()}

    def predict(latents: Tensor) -> Tensor:
        return model.predict(latents, t, condition)

    want, wanted, before = run(network, predict, x, monkeypatch)
    assert network._supports_gradient_checkpointing
    network.enable_gradient_checkpointing()
    got, gradients, after = run(network, predict, x, monkeypatch)
    assert torch.equal(got, want) and any(bool(gradient.any()) for gradient in wanted[1:])
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()) + 1e-12)
    assert after < 0.6 * before, f"{after} bytes instead of {before}"
    with torch.no_grad():
        torch.manual_seed(7)
        assert torch.equal(predict(x), want)
    network.disable_gradient_checkpointing()
    assert run(network, predict, x, monkeypatch)[2] == before
    if training and isinstance(network, UNet3DConditionModel):
        torch.manual_seed(8)
        assert not torch.equal(predict(x), want), "the dropout of its temporal convolutions is on"


def test_a_copy_is_recomputed_with_its_own_weights() -> None:
    model: Any = load("ModelScope")
    model.denoiser.enable_gradient_checkpointing()
    twin = copy.deepcopy(model.denoiser).requires_grad_(True)
    assert twin.is_gradient_checkpointing and type(twin) is UNet3DConditionModel
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    x, t, text = torch.randn(1, 4, 2, 8, 8), torch.tensor([500]), model.encode_prompts(["a dog"])["text"]
    output = twin(x, t, encoder_hidden_states=text).sample
    output.sum().backward()
    assert all(parameter.grad is None for parameter in model.denoiser.parameters())
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in twin.parameters())
    with torch.no_grad():
        assert not torch.allclose(output, model.denoiser(x, t, encoder_hidden_states=text).sample)
        twin.disable_gradient_checkpointing()
        torch.testing.assert_close(twin(x, t, encoder_hidden_states=text).sample, output.detach())


# --------------------------------------------------------------------------------------------------------- decoders


def decoded(
    decode: Callable[[Tensor], Tensor], z: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor, int]:
    """Video, gradient at the latents, bytes stored."""
    z = z.clone().requires_grad_(True)
    with stored(monkeypatch) as kept:
        video = decode(z)
    weight = torch.randn(video.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((video * weight).sum(), z)
    return video.detach(), gradient, sum(kept)


def test_frames_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("unet")
    z = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    batches: list[int] = []
    real = model.codec.vae.decode
    monkeypatch.setattr(model.codec.vae, "decode", lambda cells: (batches.append(len(cells)), real(cells))[1])
    few = replace(model.codec, pixels_at_once=2 * 16 * 16)
    want, gradient, before = decoded(model.decode, z, monkeypatch)
    assert batches == [6], "small pictures go through together, and nothing is computed twice"
    batches.clear()
    got, same, after = decoded(few.decode, z, monkeypatch)
    assert batches == [2, 2, 2] * 2, "once forwards, once for the backward pass"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(same, gradient, rtol=1e-4, atol=1e-6)
    assert after < before / 10
    batches.clear()
    with torch.no_grad():
        chosen = torch.tensor([[2], [0]])
        torch.testing.assert_close(few.decode(z, chosen), torch.stack([want[0, 2:], want[1, :1]]), rtol=0, atol=1e-6)
        replace(few, pixels_at_once=1).decode(z)  # at least a frame
        assert batches == [2, 1, 1, 1, 1, 1, 1]
        video = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(few.encode(video), model.encode(video), rtol=1e-5, atol=1e-6)


def test_full_size_pictures_are_decoded_one_by_one() -> None:
    model = tiny_model("unet")
    assert [model.codec._frames_at_once(side * side) for side in (32, 64, 256, 512, 1024)] == [256, 64, 4, 1, 1]


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_temporal_decoder_keeps_its_blocks_inputs_alone(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(tiny_svd(), decode_chunk=chunk)
    z = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    got, gradient, after = decoded(model.decode, z, monkeypatch)
    model.vae.disable_gradient_checkpointing()
    monkeypatch.setattr("vdm_env.models.svd.recomputed", lambda function, x: function(x))
    want, wanted, before = decoded(model.decode, z, monkeypatch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert after < before / (3 if chunk is None else 10)


def test_both_stages_of_open_sora_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load("OpenSora1.2").with_size(22, 16, 24)  # type: ignore[attr-defined]
    z = torch.randn(1, *model.latent_shape(22, 16, 24), generator=torch.Generator().manual_seed(0))
    got, gradient, after = decoded(model.decode, z, monkeypatch)
    monkeypatch.setattr("vdm_env.models.opensora_vae.recomputed", lambda function, x, *more: function(x, *more))
    want, wanted, before = decoded(model.decode, z, monkeypatch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert after < before / 10


# ---------------------------------------------------------------------------------------------------- options of make


@pytest.mark.parametrize("name", ["ModelScope", "VideoCrafter2", "AnimateDiff", "OpenSora1.2", "Wan2.1_1.3B", "Mochi"])
def test_tiles_by_name(name: str) -> None:
    env = small_env(f"{name}-Brightness", tile_decoding=True)
    vae = env.model.vae.spatial_vae["module"] if name == "OpenSora1.2" else env.model.codec.vae
    assert vae.use_tiling
    env.model.tile_decoding(False)
    assert not vae.use_tiling
    assert not small_env(f"{name}-Brightness").model.decode(torch.zeros(1, *env.mdp.latent_shape)).isnan().any()


def test_tiles_are_about_the_same_picture() -> None:
    model: Any = load("ModelScope")  # tiles of 64 pixels
    z = torch.randn(1, 4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.decode(z)
        model.tile_decoding()
        tiles = model.decode(z)
    assert tiles.shape == whole.shape and not torch.equal(tiles, whole)
    assert float((tiles - whole).abs().mean()) < 0.5 * float(whole.std())  # untrained norms see a tile alone


def test_what_cannot_save_memory_this_way_says_so() -> None:
    options: dict[str, Any] = {"reward": "Brightness", "images": pictures(1)}
    assert make(model=tiny_svd(), decode_chunk=2, **options).model.decode_chunk == 2
    with pytest.raises(ValueError, match="decode_chunk=0: expected a whole number"):
        make(model=tiny_svd(), decode_chunk=0, **options)
    with pytest.raises(ValueError, match="SVD cannot decode in tiles; leave tile_decoding out"):
        make(model=tiny_svd(), tile_decoding=True, **options)
    with pytest.raises(ValueError, match="the decoder of ModelScope does not take all frames together; leave it out"):
        small_env("ModelScope-Brightness", decode_chunk=2)
    with pytest.raises(ValueError, match="AutoencoderKLTemporalDecoder cannot work in tiles"):
        codec.tile_decoding(tiny_svd().vae)
