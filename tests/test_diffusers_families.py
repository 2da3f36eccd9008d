"""The environment's deterministic sampling against the pipelines of diffusers; LoRAs that those pipelines load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.families import NAMES, PROMPTS, latents, new_tiny, pipeline, run_pipeline, tiny
from tests.models import brightness, tiny_env
from tests.weights import redraw
from vdm_env import make
from vdm_env.lora_export import diffusers_lora, save_diffusers_lora

STEPS = 4


def environment(name: str, **options: Any) -> Any:
    flow = tiny(name).schedule.prediction == "flow"
    sampler = {"sampler": "flow_ode", "noise_level": 0.0} if flow else {"sampler": "ddim", "noise_level": 0.0}
    return make(
        model=tiny(name), reward=brightness, prompts=PROMPTS, num_envs=2, num_steps=STEPS, **(sampler | options)
    )


@torch.no_grad()
def sample(env: Any, policy: Any, start: Tensor) -> Tensor:
    obs, _ = env.reset(seed=0, options={"latents": start, "prompt_ids": [0, 1]})
    for _ in range(env.num_steps):
        assert not obs["stochastic"].any()
        obs, *_ = env.step(policy(obs))
    return obs["latents"]


@pytest.mark.parametrize("name", NAMES)
def test_sampling_equals_the_pipeline(name: str) -> None:
    guidance = 2.5
    start = latents(tiny(name))
    env = environment(name, guidance_scale=guidance)
    ours = sample(env, env.make_policy(lora_rank=2), start)
    theirs = run_pipeline(tiny(name), start, guidance, STEPS)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    # what would go unnoticed if the comparison had no teeth: guidance, prompts, and the network altogether
    plain = sample(env, env.make_policy(lora_rank=2, guidance_scale=1.0), start)
    assert (ours - plain).abs().max() > 2e-3
    assert (ours - start).abs().max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_loads_a_lora(name: str, tmp_path: Path) -> None:
    model, env = tiny(name), environment(name)
    policy = env.make_policy(lora_rank=2, lora_alpha=6.0, seed=3)
    redraw(policy.trainable_parameters(), 0.2, seed=5)
    x, t = latents(model), torch.tensor([900.0, 200.0])  # on both sides of Wan 2.2's boundary
    with torch.no_grad():
        want = policy.predict(x, t, [0, 1])
        with policy.reference():
            untrained = policy.predict(x, t, [0, 1])
    assert (want - untrained).abs().max() > 1e-3
    files = save_diffusers_lora(policy, tmp_path)
    fresh = new_tiny(name)  # the same weights, without adapters
    pipe = pipeline(fresh)
    pipe.load_lora_weights(tmp_path, weight_name=files[0].name)
    if name == "Wan2.2_A14B":
        pipe.load_lora_weights(tmp_path, weight_name=files[1].name, load_into_transformer_2=True)
    with torch.no_grad():
        got = fresh.predict(x, t, fresh.encode_prompts(PROMPTS))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_what_has_no_lora_for_a_pipeline() -> None:
    env = tiny_env("flow")
    with pytest.raises(ValueError, match="lora_rank=0"):
        diffusers_lora(env.make_policy(lora_rank=0))
    policy = env.make_policy(lora_rank=2)
    policy._model = type("Model", (), {"denoiser": torch.nn.Linear(2, 2)})()
    with pytest.raises(ValueError, match="no pipeline of diffusers runs Linear"):
        diffusers_lora(policy)


def test_names_and_scale_of_an_exported_lora(tmp_path: Path) -> None:
    policy = tiny_env("flow").make_policy(lora_rank=2, lora_alpha=1.0)
    own = policy.lora_state_dict()
    (file,) = save_diffusers_lora(policy, tmp_path)
    stored = load_file(file)
    assert set(stored) == {f"transformer.{name}" for name in own}
    for name, value in own.items():
        torch.testing.assert_close(stored[f"transformer.{name}"], value * (0.5 if ".lora_B." in name else 1.0))
