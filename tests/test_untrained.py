"""Untrained networks are made from a seed, in their number format and on their device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from benchmarks.model_sizes import networks
from vdm_env import list_models
from vdm_env.models import wan
from vdm_env.models.parts import drawn_once, random_t5
from vdm_env.models.releases import placed
from vdm_env.models.untrained import seeded
from vdm_env.registry import load_model

MAKE: dict[str, Callable[[], nn.Module]] = {
    **wan.untrained(wan.WAN21_1B, tiny=True),
    "t5": lambda: random_t5(tiny=True),
}
NO_WORLD = [name for name in list_models() if not name.startswith("MovingShapes")]


class Float32(TorchDispatchMode):
    """Bytes of float32 storages that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            storage = result.untyped_storage()
            self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return result


@pytest.mark.parametrize("part", MAKE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_seed_gives_the_same_weights_in_every_format(part: str, dtype: torch.dtype) -> None:
    with seeded(3, "cpu", torch.float32):
        exact = MAKE[part]()
    with seeded(3, "cpu", dtype):
        half = MAKE[part]()
    for (name, want), got in zip(exact.named_parameters(), half.parameters(), strict=True):
        assert got.dtype == dtype and got.requires_grad == want.requires_grad
        torch.testing.assert_close(got, want.to(dtype), msg=name, rtol=0, atol=0)
    for want, got in zip(exact.buffers(), half.buffers(), strict=True):  # tables keep their precision
        assert torch.equal(want, got) and want.dtype == got.dtype


def test_half_precision_never_exists_in_float32() -> None:
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=12, num_heads=4, use_cache=False)
    most = {}
    for dtype in (torch.float32, torch.bfloat16):
        with Float32() as float32, seeded(0, "cpu", dtype):
            encoder = T5EncoderModel(config)
        most[dtype] = float32.most
    largest = max(p.numel() for p in encoder.parameters()) * 4
    assert most[torch.float32] >= 4 * sum(p.numel() for p in encoder.parameters()) > 20 * largest
    assert most[torch.bfloat16] <= 3 * largest  # the one being made, and what is drawn for it


@pytest.mark.parametrize("kind", [(T5EncoderModel, T5Config), (UMT5EncoderModel, UMT5Config)])
def test_a_t5_drawn_once_is_like_its_own_class_draws_it(kind: tuple[Any, Any]) -> None:
    sizes = dict(vocab_size=2000, d_model=128, d_kv=16, d_ff=512, num_layers=2, num_heads=8, use_cache=False)
    config = kind[1](**sizes, feed_forward_proj="gated-gelu")
    with seeded(0, "cpu", torch.bfloat16):
        want, got = kind[0](config), drawn_once(kind[0], config)
    with seeded(0, "cpu", torch.float32):
        kind[0](config)
        exact = drawn_once(kind[0], config)
    shapes = {name: (p.shape, p.dtype, p.requires_grad) for name, p in want.named_parameters()}
    assert shapes == {name: (p.shape, p.dtype, p.requires_grad) for name, p in got.named_parameters()}
    for name, parameter in got.named_parameters():
        weight, other = parameter.detach(), want.get_parameter(name).detach().float()
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight)) and bool((other == 1).all())
        else:
            few = weight.numel() ** -0.5  # the deviation of a deviation is about that over the root of 2
            assert float(weight.float().std() / other.std()) == pytest.approx(1.0, abs=4 * few), name
            assert abs(float(weight.float().mean() / weight.float().std())) < 4 * few, name
        torch.testing.assert_close(weight, exact.get_parameter(name).detach().bfloat16(), rtol=0, atol=0)
    assert got.shared.weight is got.encoder.embed_tokens.weight
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        assert bool(got(input_ids=ids).last_hidden_state.isfinite().all())


def test_nothing_outside_is_changed() -> None:
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with pytest.raises(RuntimeError, match="stop"), seeded(0, "cpu", torch.bfloat16):
        assert nn.Linear(4, 4).weight.dtype == torch.bfloat16
        raise RuntimeError("stop")
    assert torch.equal(before, torch.get_rng_state()) and torch.get_default_dtype() == dtype
    assert nn.Linear(4, 4).weight.dtype == torch.float32


def test_layers_that_stay_in_float32_do() -> None:
    with seeded(0, "cpu", torch.bfloat16):
        network = placed(MAKE["transformer"](), "cpu", torch.bfloat16)
    assert isinstance(network, WanTransformer3DModel)
    kept = {name: p.dtype for name, p in network.named_parameters() if "time_embedder" in name or "norm2" in name}
    assert kept and set(kept.values()) == {torch.float32}
    assert network.patch_embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NO_WORLD)
def test_every_tensor_is_where_it_was_asked_for(name: str, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = load_model(name, weights="random", scale="tiny", device="meta", dtype=dtype)
    for network in networks(model):
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        assert {key for key, tensor in tensors.items() if not tensor.is_meta} == set()
        formats = {p.dtype for p in network.parameters()}
        assert dtype in formats and formats <= {dtype, torch.float32}
