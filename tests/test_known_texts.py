"""Rewards that let go of their text towers, and decoders that are computed anew layer by layer: the same results."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.every_model import load, small_env
from vdm_env.models import codec
from vdm_env.registry import make_reward
from vdm_env.rewards import Chunked, as_reward
from vdm_env.rewards.known_texts import with_known_texts

TEXTS = ["a dog", "a cat", "a dog"]


def reward_of(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_reward(name, weights="random", scale="tiny")


def video(seed: int = 0) -> Tensor:
    return torch.rand(3, 2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["HPS", "PickScore", "HPS+0.1*Aesthetic"])
def test_scores_stay(name: str) -> None:
    reward = reward_of(name)
    wanted = reward(video(), TEXTS)
    known = with_known_texts(reward, TEXTS)
    torch.testing.assert_close(known(video(), TEXTS), wanted, rtol=1e-5, atol=1e-6)
    assert (known.name, known.range, known.frames) == (reward.name, reward.range, reward.frames)
    assert torch.equal(reward(video(), ["something else"] * 3), reward(video(), ["something else"] * 3))
    wrapped = with_known_texts(as_reward(Chunked(reward, 2), name="own"), TEXTS)
    torch.testing.assert_close(wrapped(video(), TEXTS), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"text tower .* freed .*\['a fox'\].*give make\(prompts=...\) all prompts"):
        known(video(), ["a dog", "a fox", "a cat"])


@pytest.mark.parametrize("name", ["HPS", "Aesthetic"])
def test_the_tower_s_memory_is_given_back(name: str) -> None:
    reward = reward_of(name)
    model = reward.backbone.model
    tower = weakref.ref(model.transformer if name == "HPS" else model.text_model)
    before = sum(p.numel() for p in model.parameters())
    known = with_known_texts(reward, TEXTS)
    del reward, model
    gc.collect()
    assert tower() is None and sum(p.numel() for p in known.backbone.parameters()) < 0.2 * before
    assert bool(torch.isfinite(known(video(), TEXTS)).all())


def test_others_stay_what_they_are() -> None:
    reward = as_reward(lambda video, prompts: video.mean((1, 2, 3, 4)), name="mean")
    assert with_known_texts(reward, TEXTS) == reward


def test_an_environment_frees_both() -> None:
    options: dict[str, Any] = {"prompts": {"train": TEXTS[:2]}, "decode_frames": "first"}
    env = small_env("ModelScope-HPS+Aesthetic", **options)
    freed = small_env("ModelScope-HPS+Aesthetic", free_text_encoder=True, **options)
    scores = [one.mdp.score(video()[:2], TEXTS[:2]) for one in (env, freed)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-6)
    assert freed.config.reward is freed.mdp.reward and freed.derive(num_steps=3).mdp.reward is freed.mdp.reward


def test_large_frames_are_decoded_anew_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = copy.copy(load("ModelScope"))
    latents = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for large in (2**30, 1):
        monkeypatch.setattr(codec, "LARGE_FRAME", large)
        kept: list[int] = []
        x = latents.clone().requires_grad_()

        def note(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            decoded = model.decode(x)
        (gradient,) = torch.autograd.grad(decoded.square().sum(), x)
        found.append((decoded.detach(), gradient, sum(kept)))
        with torch.no_grad():
            assert torch.equal(model.decode(latents), found[0][0])
    (plain, wanted, before), (anew, got, after) = found
    assert torch.equal(plain, anew) and torch.equal(wanted, got) and after < 0.5 * before
