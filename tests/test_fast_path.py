"""The fast path of UNet3D and Wan networks computes what diffusers' own layers compute."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import Shapes
from tests.every_model import small_env
from tests.weights import wake
from vdm_env import make
from vdm_env.models import fast_path, fast_wan
from vdm_env.models.fast_path import FastFeedForward, FastLinear, FastLora, fast, plain
from vdm_env.models.fast_wan import FastWanTransformerBlock, turns
from vdm_env.models.fused import turned
from vdm_env.models.releases import placed

MODELS = ("MovingShapes", "MovingShapesUNet", "ModelScope", "VideoCrafter2", "T2VTurboV2", "Wan2.1_1.3B")
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


@pytest.mark.parametrize("name", ["MovingShapes", "ModelScope", "Wan2.1_1.3B"])
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
    changed = {fast_path.__name__, fast_wan.__name__}
    assert not [part for part in fast_path._parts(network) if type(part).__module__ in changed]
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
        close(turned(values, turns(cos, sin, dtype)), want, dtype)


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


def test_both_experts_are_fast_with_their_adapters_and_saved_ones_come_back(tmp_path: Path) -> None:
    env = env_of("Wan2.2_A14B", torch.float32)
    experts, (obs, _) = env.model.denoiser, env.reset(seed=0)
    policy = env.make_policy(lora_rank=2, guidance_scale=3.0)
    kinds = [{type(part) for part in fast_path._parts(expert)} for expert in (experts.high, experts.low)]
    assert kinds[0] == kinds[1] >= {FastWanTransformerBlock, fast_path.FastWanAttention, FastLora}
    wake(experts)
    with torch.no_grad():
        both = {**obs, "timestep": torch.tensor([900.0, 200.0])}  # one video for each expert
        quick = policy.mean(both)
        again = env.make_policy(lora_rank=2, guidance_scale=3.0)
        again.load(policy.save(tmp_path))
        assert torch.equal(again.mean(both), quick)
        plain(experts)
        again.load(tmp_path)
        close(again.mean(both), quick, torch.float32)


def test_blocks_with_images_or_a_timestep_for_each_token_are_diffusers_own() -> None:
    torch.manual_seed(0)
    x, text, temb = torch.randn(2, 6, 24), torch.randn(2, 5, 24), torch.randn(2, 6, 6, 24)
    for with_images in (False, True):
        block = WanTransformerBlock(24, 32, 2, added_kv_proj_dim=24 if with_images else None)
        given = (x, torch.randn(2, 512 + 3, 24), temb[:, 0]) if with_images else (x, text, temb)
        want = block(*given, None)
        block.__class__ = FastWanTransformerBlock
        assert torch.equal(block(*given, None), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_blocks_of_wan_move_fewer_bytes(dtype: torch.dtype) -> None:
    """Counted on shapes. In half precision a token's number costs diffusers' modulations and gates 140 bytes, ours 52,
    or 84 for autograd, and rotations of query and key 30 and 20 each; what else there is is the same for both."""

    def moved(change: Any, tracked: bool) -> tuple[int, int]:
        with Shapes() as shapes:
            network = WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=64, ffn_dim=128, num_layers=1, text_dim=16, freq_dim=16
            )
            change(placed(network, "meta", dtype).requires_grad_(tracked))
            x, text = torch.empty(1, 16, 4, 64, 64, device="meta"), torch.empty(1, 8, 16, device="meta")
            shapes.operations = []
            with torch.set_grad_enabled(tracked):
                network(x.to(dtype), torch.ones(1, device="meta"), text.to(dtype))
            return sum(one.bytes for one in shapes.operations), 4 * 32 * 32 * 2 * 64

    for tracked in (False, True):
        (quick, numbers), (slow, _) = moved(fast, tracked), moved(plain, tracked)
        if dtype is torch.bfloat16:
            spared = 140 - (84 if tracked else 52) + 2 * (30 - 20)
            assert (slow - quick) / numbers == pytest.approx(spared, rel=0.06)  # cosines and sines, too, are read
        else:
            assert slow - quick > 20 * numbers


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


def test_adapters_that_are_added_to_the_weights_learn_as_peft_s_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_path, "LARGE_ADAPTED", 0)
    generator = torch.Generator().manual_seed(0)
    network = nn.ModuleDict({"q": nn.Linear(24, 16)}).requires_grad_(False)
    for name, scale in (("one", 4), ("two", 12)):
        inject_adapter_in_model(LoraConfig(r=3, lora_alpha=scale, target_modules=["q"]), network, adapter_name=name)
    layer = network["q"]
    layer.set_adapter(["one", "two"])
    trained = [parameter for name, parameter in layer.named_parameters() if "lora" in name]
    for parameter in trained:
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    x = torch.randn(5, 40, 24, generator=generator).requires_grad_()

    def results(kind: type) -> list[Tensor]:
        layer.__class__ = kind
        y = layer(x)
        first = torch.autograd.grad(y.sin().sum(), [x, *trained], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *trained])
        return [y, *first, *second]

    plain_class = type(layer)
    kept: list[tuple[int, ...]] = []
    for ours, theirs in zip(results(fast_path.FastLora), results(plain_class), strict=True):
        close(ours, theirs, torch.float32)
    layer.__class__ = fast_path.FastLora
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t._cdata, tuple(t.shape))) or t, lambda t: t):
        layer(x)
    weight = layer.get_base_layer().weight
    assert [name for name, shape in kept if shape == tuple(weight.shape)] == [weight._cdata], (
        "no sum of weights is kept"
    )


def test_few_rows_and_wide_layers_keep_their_adapters_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_path, "LARGE_ADAPTED", 0)
    network = nn.ModuleDict({"q": nn.Linear(64, 64)}).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q"]), network)
    layer = network["q"]
    layer.__class__ = fast_path.FastLora
    for rows, products in ((31, 0), (32, 1)):  # 64 x 64 numbers are added to save passes over rows x (64 + 64)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            layer(torch.ones(rows, 64))
        assert sum(e.count for e in trace.key_averages() if e.key == "_AdaptedProduct") == products


@pytest.mark.parametrize(("queries", "keys"), [(5, 3), (1, 1), (5, 0), (0, 3)])
def test_short_attention_is_attention(queries: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(7, 2, queries, 8, generator=generator).requires_grad_()
    key, value = (torch.randn(7, 2, keys, 8, generator=generator).requires_grad_() for _ in range(2))
    assert fast_path._is_short(query, key, value) == (queries > 0 and keys > 0)
    if not (queries and keys):
        return
    got, want = (
        attend(query, 3 * key, value) for attend in (fast_path.short_attention, functional.scaled_dot_product_attention)
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    pairs = zip(*(torch.autograd.grad(y.sin().sum(), [query, key, value]) for y in (got, want)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
