"""Compiled blocks compute what the plain network does, with a bounded number of graphs, and say what goes wrong."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet3DConditionModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from tests.every_model import NAMES, load
from tests.models import PROMPTS, TEXT_WIDTH, brightness, tiny_env, tiny_model, tiny_wan
from tests.weights import redraw
from vdm_env import make
from vdm_env.compiled import SUPPORTED, CompileOptions, as_options, compile_blocks, repeated_blocks
from vdm_env.models.base import frozen
from vdm_env.models.recompute import make_recomputable

compiles = pytest.mark.skipif(
    not SUPPORTED, reason=f"torch.compile of PyTorch {torch.__version__} has no recompile_limit and isolate_recompiles"
)


def randomised(policy: Any, seed: int = 0) -> Any:
    redraw(policy.trainable_parameters(), seed=seed)
    return policy


@torch.no_grad()
def rollout(env: Any, policy: Any) -> list[Tensor]:
    obs, _ = env.reset(seed=3)
    for _ in range(env.num_steps):
        obs, reward, *_ = env.step(policy(obs))
    return [reward, obs["latents"]]


def gradients(env: Any, policy: Any) -> list[Tensor]:
    obs, _ = env.reset(seed=0)
    loss = policy.mean(obs).square().sum()
    found = torch.autograd.grad(loss, policy.trainable_parameters(), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def small(kind: str, **options: Any) -> Any:
    """An environment of either family; the UNet has one level, and the switch for recomputing each layer."""
    model = tiny_model(kind)
    if kind == "unet":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = UNet3DConditionModel(
                sample_size=4,
                down_block_types=("CrossAttnDownBlock3D",),
                up_block_types=("CrossAttnUpBlock3D",),
                block_out_channels=(16,),
                layers_per_block=1,
                cross_attention_dim=TEXT_WIDTH,
                attention_head_dim=8,
                norm_num_groups=4,
            )
        make_recomputable(network)
        model = replace(model, denoiser=frozen(network))
    return make(model=model, reward=brightness, prompts=PROMPTS, num_envs=2, guidance_scale=3.0, **options)


def compare(calls: dict[str, Callable[[Any, Any], list[Tensor]]], kind: str, counter: Any, **more: Any) -> list[int]:
    """Runs the same calls with a plain and a compiled network; returns the number of graphs after each call."""
    envs = [small(kind), small(kind, compile={"backend": counter})]
    policies = [randomised(env.make_policy(lora_rank=2, seed=1)) for env in envs]
    begun = counter.frame_count
    graphs = []
    for name, call in calls.items():
        want, got = (call(env, policy) for env, policy in zip(envs, policies, strict=True))
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}", **more)
        graphs.append(counter.frame_count - begun)
    return graphs


def with_reference(call: Callable[[Any, Any], list[Tensor]]) -> Callable[[Any, Any], list[Tensor]]:
    def inside(env: Any, policy: Any) -> list[Tensor]:
        with policy.reference():
            return call(env, policy)

    return inside


def checkpointed(env: Any, policy: Any) -> list[Tensor]:
    policy.gradient_checkpointing = True
    try:
        return gradients(env, policy)
    finally:
        policy.gradient_checkpointing = False


def offloaded(env: Any, policy: Any) -> list[Tensor]:
    policy.offload_activations = True
    try:
        return gradients(env, policy)
    finally:
        policy.offload_activations = False


def snapshot(env: Any, policy: Any) -> list[Tensor]:
    """The policy, a reference that is an older policy, and the policy again."""
    policy.refresh_reference()
    randomised(policy, seed=7)
    with torch.no_grad():
        obs, _ = env.reset(seed=0)
        with policy.reference():
            old = policy.mean(obs)
        found = [old, policy.mean(obs)]
    assert not torch.equal(*found)
    policy.reset_reference()
    return found


def second_policy(env: Any, policy: Any) -> list[Tensor]:
    other = randomised(env.make_policy(lora_rank=2, seed=2), seed=9)
    return [*rollout(env, other), *rollout(env, policy), *rollout(env, other)]


def all_weights(env: Any, policy: Any) -> list[Tensor]:
    return gradients(env, env.make_policy(lora_rank=0))


CALLS: dict[str, Callable[[Any, Any], list[Tensor]]] = {
    "rollout": rollout,
    "rollout again": rollout,
    "reference": with_reference(rollout),
    "policy after the reference": rollout,
    "gradients": gradients,
    "checkpointed": checkpointed,
    "offloaded": offloaded,
    "snapshot": snapshot,
    "all": lambda env, policy: [*rollout(env, policy), *gradients(env, policy)],
    "three videos": lambda env, policy: rollout(env.derive(num_envs=3), policy),
    "two videos again": lambda env, policy: [*rollout(env, policy), *gradients(env, policy)],
    "three videos again": lambda env, policy: rollout(env.derive(num_envs=3), policy),
    "a second policy": second_policy,
    "a copy that trains all weights": all_weights,
}


@compiles
def test_every_use_of_a_policy_gives_the_same_numbers_with_few_graphs() -> None:
    """Backend "eager" runs the traced graphs operation by operation: what differed would be wrong, not rounding."""
    counter = CompileCounterWithBackend("eager")
    graphs = dict(zip(CALLS, compare(CALLS, "flow", counter, rtol=0, atol=0), strict=True))
    assert graphs["rollout"] == graphs["rollout again"] == 1, "two blocks share a graph, and four steps do"
    assert graphs["reference"] == graphs["policy after the reference"] == 2
    # The first block's input needs no gradient, the second's does.
    assert graphs["gradients"] == graphs["checkpointed"] == graphs["offloaded"] == 4
    assert graphs["snapshot"] == graphs["all"] == 5
    assert graphs["three videos"] == graphs["two videos again"] == graphs["three videos again"] == 6
    assert graphs["a second policy"] <= 8 and graphs["a copy that trains all weights"] <= 10


@compiles
def test_layers_of_a_unet() -> None:
    names = ("rollout", "checkpointed")
    counter = CompileCounterWithBackend("eager")
    calls = {name: CALLS[name] for name in names}
    graphs = dict(zip(calls, compare(calls, "unet", counter, rtol=0, atol=0), strict=True))
    blocks = list(repeated_blocks(small("unet").model.denoiser))
    assert {type(block).__name__ for block in blocks} == {
        "ResnetBlock2D", "TemporalConvLayer", "Transformer2DModel", "TransformerTemporalModel",
    }  # fmt: skip
    assert 4 <= graphs["rollout"] < len(blocks), "layers share graphs"
    assert graphs["rollout"] < graphs["checkpointed"] <= 3 * graphs["rollout"]


@compiles
def test_gradients_of_compiled_backward_passes() -> None:
    """Backend "aot_eager" makes backward graphs too, with operations taken apart: rounding may differ."""
    counter = CompileCounterWithBackend("aot_eager")
    names = ("gradients", "checkpointed", "gradients again")
    calls = {name: CALLS.get(name, gradients) for name in names}
    assert compare(calls, "flow", counter, rtol=1e-4, atol=1e-5) == [2, 2, 2]


@compiles
def test_a_limit_of_graphs_warns_once_and_goes_on() -> None:
    counter = CompileCounterWithBackend("eager")
    plain, env = tiny_env(), tiny_env(compile={"backend": counter, "recompile_limit": 1})
    policies = [randomised(one.make_policy(lora_rank=2, seed=1)) for one in (plain, env)]
    begun = counter.frame_count
    before = torch._dynamo.config.fail_on_recompile_limit_hit, torch._dynamo.config.recompile_limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = rollout(env, policies[1])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = [rollout(env.derive(num_envs=n), policies[1]) for n in (3, 4, 2)] + [gradients(env, policies[1])]
    (warning,) = [one for one in told if "compile" in str(one.message)]
    assert "WanTransformerBlock has 1 graphs, its limit" in str(warning.message)
    assert "recompile_limit': 2" in str(warning.message)
    want = [rollout(plain.derive(num_envs=n), policies[0]) for n in (3, 4, 2)] + [gradients(plain, policies[0])]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert torch.equal(got[2][1], first[1]) and counter.frame_count == begun + 1
    assert before == (torch._dynamo.config.fail_on_recompile_limit_hit, torch._dynamo.config.recompile_limit)


@compiles
def test_operations_are_still_counted() -> None:
    """`algos.flops` prices a run by what the network's operations cost."""
    counts = []
    for compiled in (False, "eager"):
        env = tiny_env(compile=compiled)
        policy, (obs, _) = env.make_policy(lora_rank=2), env.reset(seed=0)
        for _ in range(2):  # before there are graphs, and with them
            with torch.no_grad():
                policy.mean(obs)
                with FlopCounterMode(display=False) as counter:
                    policy.mean(obs)
            counts.append(counter.get_total_flops())
    assert len(set(counts)) == 1 and counts[0] > 0


@compiles
def test_only_blocks_of_the_network_are_compiled() -> None:
    env = tiny_env("unet", compile="eager")
    assert env.config.compile == CompileOptions(backend="eager") and tiny_env().config.compile is None
    modules = (env.model.denoiser, env.model.codec.vae, env.model.text.encoder)
    compiled = [[m for m in module.modules() if m._compiled_call_impl is not None] for module in modules]
    assert compiled[0] == list(repeated_blocks(env.model.denoiser)) and not compiled[1] and not compiled[2]
    assert all(m._compiled_call_impl is None for m in copy.deepcopy(env.model.denoiser).modules())
    assert env.derive(num_steps=2).config.compile == env.config.compile


@pytest.mark.parametrize("name", NAMES)
def test_the_blocks_of_every_model_are_known(name: str) -> None:
    denoiser = load(name).denoiser
    blocks = list(repeated_blocks(denoiser))
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    weights = {id(p): p.numel() for p in denoiser.parameters()}
    assert sum(size for key, size in weights.items() if key in inside) > 0.3 * sum(weights.values())
    nested = [m for block in blocks for m in block.modules() if m is not block and m in set(blocks)]
    assert not nested


def one_block() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = tiny_wan(num_layers=1)
    return replace(tiny_model(), denoiser=frozen(network))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
@compiles
def test_inductor_on_a_cpu() -> None:
    options: dict[str, Any] = {"reward": brightness, "prompts": PROMPTS, "num_envs": 2}
    envs = [make(model=one_block(), **options), make(model=one_block(), **options, compile=True)]
    policies = [randomised(env.make_policy(lora_rank=2, seed=1)) for env in envs]
    want, got = (gradients(env, policy) for env, policy in zip(envs, policies, strict=True))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert any(bool(gradient.any()) for gradient in got)


@compiles
def test_a_machine_that_cannot_compile_says_so() -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("no compiler here")

    with pytest.raises(
        ValueError, match=r"cannot compile here \(.*\); 'inductor' needs a C\+\+ compiler.*leave compil"
    ):
        tiny_env(compile={"backend": missing})

    calls = []

    def later(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward if len(calls) == 1 else missing()

    env = tiny_env(compile={"backend": later})  # the trial went well
    with pytest.raises(RuntimeError, match=r"leave compile out \(WanTransformerBlock\)"):
        rollout(env, env.make_policy(lora_rank=1))


@compiles
def test_inductor_without_a_compiler() -> None:
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(ValueError, match=r"backend 'inductor' cannot compile here .*leave compile out"),
    ):
        tiny_env(compile=True)


def test_an_old_pytorch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdm_env.compiled.SUPPORTED", False)
    with pytest.raises(ValueError, match="compile needs torch.compile with recompile_limit .*leave compile out"):
        tiny_env(compile=True)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("inductr", ValueError, "unknown backend 'inductr'; known: .*inductor"),
        ({"mode": "reduce-overhead"}, ValueError, "uses CUDA graphs, which write outputs of later calls over those"),
        ({"mode": "max-autotune"}, ValueError, "take mode='max-autotune-no-cudagraphs'"),
        ({"options": {"triton.cudagraphs": True}}, ValueError, "uses CUDA graphs"),
        ("cudagraphs", ValueError, "uses CUDA graphs"),
        ({"mode": "fast"}, ValueError, "unknown mode 'fast'"),
        ({"mode": "default", "options": {"shape_padding": True}}, ValueError, "give one of the two"),
        ({"recompile_limit": 0}, ValueError, "expected a whole number of at least 1"),
        ({"dynamic": True}, ValueError, r"unknown \['dynamic'\]; expected some of \['backend'"),
        (3, TypeError, "compile=3: expected True, False, the name of a backend, or a mapping"),
    ],
)
def test_wrong_options(given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        tiny_env(compile=given)
    assert as_options(False) is as_options(None) is None and as_options(True) == CompileOptions()


def test_a_network_that_names_no_blocks() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    with pytest.raises(ValueError, match="Own does not say which blocks it repeats; give its class an attribute"):
        compile_blocks(Own(), CompileOptions(backend="eager"))
    Own._repeated_blocks = ["Linear"]  # type: ignore[attr-defined]
    assert len(list(repeated_blocks(Own()))) == 2
