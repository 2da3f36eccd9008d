"""What saves memory changes no result: checkpoints, offloading, freed text encoders, chosen frames, half precision."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.every_model import NAMES, load, small_env
from tests.models import PROMPTS, brightness, tiny_env, tiny_model
from tests.weights import trained
from vdm_env import make
from vdm_env.memory import FreedText, activations_in_main_memory
from vdm_env.models.wan import BOUNDARY

IMAGE_MODELS = ("SVD", "SVDXT")
ALIKE = ("Wan2.1_14B", "SVDXT", "T2VTurbo")
"""Their tiny networks and conditions are those of another model, or a part of them."""
EXPERTS = ("Wan2.2_A14B",)
"""They have two networks, one for the noisy steps and one for the others."""
DIFFERENT = [name for name in NAMES if name not in ALIKE]
BLOCKS = [name for name in DIFFERENT if name != "T2VTurboV2"]
"""Those of T2VTurboV2, and its text encoder, are VideoCrafter2's."""


@cache
def env_of(name: str, num_steps: int = 2) -> Any:
    return small_env(f"{name}-Brightness", decode_frames="first", num_steps=num_steps)


@contextmanager
def counting() -> Iterator[list[int]]:
    """Bytes of each tensor that autograd keeps inside; those of inner hooks are theirs."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def gradients(policy: Any, obs: dict[str, Tensor]) -> tuple[list[Tensor], int]:
    """Of a loss on the policy's mean, and the bytes kept for them.

    Zeros for the expert of two (Wan2.2_A14B) that this observation's timestep does not belong to.
    """
    with counting() as kept:
        loss = policy.mean(obs).square().mean()
    return list(torch.autograd.grad(loss, policy.trainable_parameters(), materialize_grads=True)), sum(kept)


class Spy(torch.autograd.graph.saved_tensors_hooks):
    """Notes what the hooks of `vdm_env.memory` move and what they leave."""

    moved: list[Tensor] = []
    left: list[Tensor] = []

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        def noted(tensor: Tensor) -> Any:
            packed = pack(tensor)
            (Spy.left if isinstance(packed, Tensor) else Spy.moved).append(tensor.detach())
            return packed

        super().__init__(noted, unpack)


def size_of(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(("name", "step"), [*((name, 0) for name in BLOCKS), *((name, 3) for name in EXPERTS)])
def test_recomputing_and_offloading_give_the_same_gradients(
    name: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = env_of(name, max(2, step + 1))
    policy = trained(env)
    obs, _ = env.reset(seed=0)
    for _ in range(step):
        with torch.no_grad():
            obs = env.step(policy(obs))[0]
    if name in EXPERTS:
        assert bool((obs["timestep"] < BOUNDARY).all()) == (step == 3), "the last of four steps is the other expert's"
    wanted, kept = gradients(policy, obs)
    assert any(bool(gradient.any()) for gradient in wanted)

    policy.gradient_checkpointing = True
    got, kept_by_checkpoint = gradients(policy, obs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    assert kept_by_checkpoint < kept / 4, f"{kept_by_checkpoint} bytes instead of {kept}"

    policy.gradient_checkpointing, policy.offload_activations = False, True
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", Spy)
    monkeypatch.setattr(Spy, "moved", [])
    monkeypatch.setattr(Spy, "left", [])
    loss = policy.mean(obs).square().mean()
    got = list(torch.autograd.grad(loss, policy.trainable_parameters(), materialize_grads=True))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    denoiser = env.model.denoiser
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    assert Spy.moved and {t.untyped_storage().data_ptr() for t in Spy.left} <= weights
    moved = size_of(Spy.moved)

    policy.gradient_checkpointing = True  # both: only what a recomputation starts from is moved
    Spy.moved.clear()
    policy.mean(obs)
    assert 0 < size_of(Spy.moved) < moved / 4


def test_offloading_and_recomputing_together() -> None:
    env = tiny_env("unet")
    policy = trained(env)
    obs, _ = env.reset(seed=0)
    wanted, _ = gradients(policy, obs)
    both = trained(env, gradient_checkpointing=True, offload_activations=True)
    torch.testing.assert_close(gradients(both, obs)[0], wanted, rtol=1e-5, atol=1e-7)


def test_offloading_is_off_by_itself_and_without_gradients() -> None:
    layer = nn.Linear(3, 3)
    x = torch.ones(2, 3, requires_grad=True)
    with counting() as kept, activations_in_main_memory(layer, on=False):
        layer(x).square().sum()
    with counting() as kept_when_on, activations_in_main_memory(layer):
        layer(x).square().sum()
    assert sum(kept) > 0 == sum(kept_when_on)
    env = tiny_env()
    obs, _ = env.reset(seed=0)
    policy = env.make_policy(offload_activations=True)
    with torch.no_grad():
        assert torch.equal(policy(obs), env.make_policy()(obs))


@pytest.mark.parametrize("name", DIFFERENT)
def test_half_precision_networks(name: str) -> None:
    env = small_env(f"{name}-Brightness", dtype=torch.bfloat16, decode_frames="first")
    kinds = {parameter.dtype for parameter in env.model.denoiser.parameters()}
    assert torch.bfloat16 in kinds and kinds <= {torch.bfloat16, torch.float32}
    policy = trained(env)
    obs, _ = env.reset(seed=0)
    exact, _ = env_of(name).reset(seed=0)
    assert obs["latents"].dtype == torch.float32 and torch.equal(obs["latents"], exact["latents"])
    policy.gradient_checkpointing = True
    for _ in range(env.num_steps):
        dist = policy.dist(obs)
        action = dist.rsample(noise=torch.ones_like(obs["latents"]))
        log_prob = dist.log_prob(action.detach())
        assert action.dtype == log_prob.dtype == obs["latents"].dtype == torch.float32
        assert bool(torch.isfinite(log_prob).all())
        obs, reward, *_ = env.step(action)
    assert obs["latents"].dtype == reward.dtype == torch.float32
    found = torch.autograd.grad(reward.sum(), policy.trainable_parameters(), allow_unused=True)
    some = [gradient for gradient in found if gradient is not None]
    assert all(g.dtype == torch.float32 and bool(torch.isfinite(g).all()) for g in some)
    assert any(bool(gradient.any()) for gradient in some)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in IMAGE_MODELS])
def test_a_freed_text_encoder_leaves_its_embeddings(name: str) -> None:
    texts = {"train": ["a dog", "a cat"], "test": ["a red fox in the snow"]}
    model: Any = load(name)
    encoders = [weakref.ref(part) for part in vars(model.text).values() if isinstance(part, nn.Module)]
    assert encoders
    wanted = [model.encode_prompts([text]) for text in ("a cat", "a red fox in the snow")]
    options: dict[str, Any] = {"reward": brightness, "prompts": texts, "num_steps": 2}
    env = make(model=model, **options, free_text_encoder=True)
    del model
    gc.collect()
    assert all(encoder() is None for encoder in encoders)
    twin = env.derive(split="test", num_steps=4)
    for number, condition in zip((1, 2), wanted, strict=True):
        got = twin.mdp.condition([number])
        assert set(got) == set(condition)
        for key, value in condition.items():  # embedded in another batch
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)
    obs, _ = twin.reset(seed=0)
    policy = twin.make_policy(lora_rank=1, guidance_scale=2.0)
    assert bool(torch.isfinite(policy.mean(obs)).all())
    obs, _ = env.reset(options={"prompts": ["something else"]})
    with pytest.raises(ValueError, match=r"freed .*\['something else'\].*give make\(prompts=...\) all prompts"):
        policy.predict(obs["latents"], obs["timestep"], obs["prompt_id"])


def test_what_has_no_text_encoder_keeps_it() -> None:
    with pytest.raises(ValueError, match="SVD has no text encoder to free: images are encoded anew"):
        small_env("SVD-Brightness", free_text_encoder=True)

    class Own:
        """A model of somebody else's, that is no dataclass."""

        def __init__(self) -> None:
            self.whole = tiny_model()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["whole"], name)

    with pytest.raises(ValueError, match="in a field `text`; leave free_text_encoder out"):
        make(model=Own(), reward=brightness, prompts=PROMPTS, free_text_encoder=True)
    with pytest.raises(ValueError, match="cannot be embedded"):
        FreedText(model="Own")(["a dog"])


@pytest.mark.parametrize("name", ["ModelScope", "Wan2.1_1.3B"])
def test_chosen_frames_alone_are_decoded(name: str) -> None:
    """The autoencoder is most of the memory of reward back-propagation; early frames need a part of it."""
    env = env_of(name)
    latents = torch.randn(1, *env.mdp.latent_shape, generator=torch.Generator().manual_seed(0))
    kept = []
    for frames in (None, torch.tensor([[0]])):
        with counting() as sizes:
            video = env.mdp.decode(latents.clone().requires_grad_(True), frames)
        kept.append(sum(sizes))
        first = video[:, :1] if frames is None else video
    assert kept[1] < 0.7 * kept[0]
    with torch.no_grad():
        torch.testing.assert_close(first, env.mdp.decode(latents)[:, :1], rtol=0, atol=1e-5)
