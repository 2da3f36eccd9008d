"""The fast path of UNet3D and Wan networks computes what diffusers' own layers compute."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tests.every_model import small_env
from tests.weights import wake
from vdm_env import make
from vdm_env.models import fast_path
from vdm_env.models.fast_path import FastFeedForward, FastLinear, fast, plain, rotate

MODELS = ("MovingShapes", "MovingShapesUNet", "ModelScope", "VideoCrafter2", "T2VTurboV2")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-4, torch.bfloat16: 5e-2}
"""Of the largest number. Sums are taken in another order in some thirty layers: outputs differ by about 2e-6 in
float32, which has 24 bits, and gradients, sums over all tokens that partly cancel, by up to 6e-5; bfloat16
has 8 bits."""


@pytest.fixture(autouse=True)
def everything_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks, too, take the paths of large ones."""
    monkeypatch.setattr(fast_path, "LARGE_PRODUCT", 0)
    monkeypatch.setattr(fast_path, "LARGE_ADAPTED", 0)
    monkeypatch.setattr(fast_path, "SCORES_AT_ONCE", 2**10)
    monkeypatch.setattr(fast_path, "WIDE_AT_ONCE", 2**12)


def env_of(name: str, dtype: torch.dtype) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.startswith("MovingShapes"):
            return make(f"{name}-Brightness", num_envs=2, dtype=dtype)
        return small_env(f"{name}-Brightness", num_envs=2, dtype=dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert want.abs().max() > 0
    assert float((got - want).abs().max()) <= TOLERANCE[dtype] * float(want.abs().max())


def outcome(policy: Any, obs: Any) -> tuple[Tensor, list[Tensor]]:
    """The mean, and gradients of latents and adapters."""
    latents = obs["latents"].clone().requires_grad_(True)
    mean = policy.mean({**obs, "latents": latents})
    weight = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2)).to(mean)
    gradients = torch.autograd.grad((mean * weight).sum(), [latents, *policy.trainable_parameters()])
    return mean.detach(), list(gradients)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_the_plain_networks(name: str, dtype: torch.dtype) -> None:
    env = env_of(name, dtype)
    network = env.model.denoiser
    policy = env.make_policy(lora_rank=2, guidance_scale=3.0)
    wake(network)
    obs, _ = env.reset(seed=0)
    fast(network)
    got, gradients = outcome(policy, obs)
    if dtype is torch.float32:
        kinds = {type(module).__name__ for module in network.modules()}
        assert {"FastLinear", "FastFeedForward"} <= kinds, "the loader switches it on"
        policy.gradient_checkpointing = True
        again, recomputed = outcome(policy, obs)
        assert torch.equal(again, got)
        for ours, theirs in zip(recomputed, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))
        with torch.no_grad():
            assert torch.equal(policy.mean(obs), got), "rollout and update see the same numbers"
        policy.gradient_checkpointing = False
    plain(network)
    want, wanted = outcome(policy, obs)
    close(got, want, dtype)
    # Adapters together: where a layer attends to a single token, those of queries and keys are zero but for rounding.
    pairs = [(gradients[0], wanted[0]), tuple(torch.cat([g.flatten() for g in gs[1:]]) for gs in (gradients, wanted))]
    for ours, theirs in pairs:
        if dtype is not torch.bfloat16:  # single elements of a gradient are noise there
            close(ours, theirs, dtype)
        else:
            assert functional.cosine_similarity(ours.flatten().float(), theirs.flatten().float(), dim=0) > 0.98


@pytest.mark.parametrize("name", ["MovingShapes", "ModelScope"])
def test_names_types_copies_and_the_way_back(name: str) -> None:
    env = env_of(name, torch.float32)
    network, (obs, _) = env.model.denoiser, env.reset(seed=0)
    condition = env.mdp.condition(obs["prompt_id"])

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            return env.model.call(model, obs["latents"], obs["timestep"], condition)

    assert any(type(module) is FastLinear for module in network.modules())
    twin = copy.deepcopy(network)
    names, top = list(network.state_dict()), type(network)
    assert torch.equal(run(twin), run(network))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(run(twin), run(network)), "a copy computes with its own weights"
    quick, parts = run(network), [type(part) for part in fast_path._parts(network)]
    assert plain(network) is network and list(network.state_dict()) == names and type(network) is top
    modules = [part for part in fast_path._parts(network) if type(part).__module__ == fast_path.__name__]
    assert modules == []
    slow = run(network)
    close(quick, slow, torch.float32)
    assert fast(fast(network)) is network and [type(part) for part in fast_path._parts(network)] == parts
    assert torch.equal(run(network), quick)


def test_a_video_does_not_depend_on_its_place_in_the_batch() -> None:
    for name in ("MovingShapes", "ModelScope"):
        env = env_of(name, torch.float64)
        (obs, _), model = env.reset(seed=0), env.model
        condition = env.mdp.condition(obs["prompt_id"])
        with torch.no_grad():
            both = model.predict(obs["latents"], obs["timestep"], condition)
            alone = model.predict(obs["latents"][1:], obs["timestep"][1:], {k: v[1:] for k, v in condition.items()})
        close(both[1:], alone, torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator).transpose(0, 1).requires_grad_(True)
    layer = nn.Linear(8, 4, bias=bias)
    quick = copy.deepcopy(layer)
    quick.__class__ = FastLinear
    outputs = [each(x) for each in (quick, layer)]
    gradients = [
        torch.autograd.grad(output.square().sum(), [x, *each.parameters()], create_graph=True)
        for output, each in zip(outputs, (quick, layer), strict=True)
    ]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    twice = [torch.autograd.grad(first.square().sum(), x)[0] for first, *_ in gradients]
    torch.testing.assert_close(*twice, rtol=1e-5, atol=1e-4)
    with FlopCounterMode(display=False) as counted:
        quick(x)
    assert counted.get_total_flops() == 2 * 15 * 8 * 4


def test_an_input_of_a_frozen_layer_is_not_kept() -> None:
    layer = nn.Linear(8, 4).requires_grad_(False)
    layer.__class__ = FastLinear
    x = torch.randn(6, 8, requires_grad=True)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    assert (4, 8) in kept and (6, 8) not in kept


def test_feed_forward_layers_draw_the_dropout_of_the_plain_ones() -> None:
    layer = fast_path.FeedForward(8, dropout=0.5)
    quick = copy.deepcopy(layer)
    quick.__class__ = FastFeedForward
    x = torch.randn(300, 8)
    for training in (False, True):
        outputs = []
        for each in (layer, quick):
            torch.manual_seed(3)
            outputs.append(each.train(training)(x))
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_rotary_positions_are_diffusers_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 3, 8, generator=generator)
    angle = torch.randn(1, 6, 1, 4, generator=generator).repeat_interleave(2, -1)
    cos, sin = angle.cos(), angle.sin()
    for dtype in TOLERANCE:
        values = x.to(dtype)
        one, two = values.unflatten(-1, (-1, 2)).unbind(-1)
        want = torch.empty_like(values)
        want[..., 0::2] = one * cos[..., 0::2] - two * sin[..., 1::2]
        want[..., 1::2] = one * sin[..., 1::2] + two * cos[..., 0::2]
        close(rotate(values, cos, sin), want, dtype)


def test_a_text_is_projected_once_for_a_video_and_less_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_path, "LARGE_PRODUCT", 2**62)  # as on a GPU: other layouts and texts alone
    monkeypatch.setattr(fast_path, "FEW_KEYS", 0)
    monkeypatch.setattr(fast_path, "WIDE_AT_ONCE", 2**62)
    env = env_of("ModelScope", torch.float32)
    network, (obs, _) = env.model.denoiser, env.reset(seed=0)
    condition = env.mdp.condition(obs["prompt_id"])

    def cost() -> tuple[int, int]:
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            env.model.predict(obs["latents"], obs["timestep"], condition)
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as trace:
            env.model.predict(obs["latents"], obs["timestep"], condition)
        copies = sum(event.count for event in trace.key_averages() if event.key in ("aten::clone", "aten::contiguous"))
        return flops.get_total_flops(), copies

    quick, slow = cost(), (plain(network), cost())[1]
    frames = obs["latents"].shape[2]
    of_text = [
        module
        for name, module in network.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
        and "temp_attentions" not in name
        and "transformer_in" not in name
    ]
    spared = sum(2 * condition["text"].numel() * module.out_features * (frames - 1) for module in of_text)
    assert slow[0] - quick[0] == spared > 0
    assert quick[1] < slow[1]


def test_other_networks_are_refused() -> None:
    with pytest.raises(TypeError, match="no fast path for Linear, only for UNet3DConditionModel"):
        fast(nn.Linear(2, 2))


def test_the_fast_product_leaves_function_transforms_and_forward_mode_to_the_plain_layer() -> None:
    layer = fast_path.FastLinear(128, 128)
    x = torch.randn(2048, 128, generator=torch.Generator().manual_seed(0))
    assert x.numel() * layer.out_features >= fast_path.LARGE_PRODUCT
    by_transform = torch.func.grad(lambda x: layer(x).square().sum())(x)
    free = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(free).square().sum(), free)
    torch.testing.assert_close(by_transform, gradient, rtol=1e-4, atol=1e-4)
    out, tangent = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(tangent, out - layer.bias, rtol=1e-4, atol=1e-4)
