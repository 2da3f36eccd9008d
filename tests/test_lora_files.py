"""LoRAs trained here go back into fresh networks: by PEFT for every family, by diffusers' pipelines where they can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet3DConditionModel, UNetSpatioTemporalConditionModel
from peft import PeftModel
from torch import Tensor

from tests.every_model import load, small_env
from tests.weights import redraw
from vdm_env.lora_export import diffusers_lora, save_diffusers_lora

UNETS = ("ModelScope", "Zeroscope", "VideoCrafter2", "T2VTurboV2")
OTHERS = ("SVD", "OpenSora1.2")


def trained(name: str) -> tuple[Any, Any]:
    """An environment and a policy of its model with a LoRA that is not zero, scaled by 3."""
    env = small_env(f"{name}-Brightness")
    policy = env.make_policy(lora_rank=2, lora_alpha=6.0, seed=3)
    redraw(policy.trainable_parameters(), 0.2, seed=5)
    return env, policy


def outputs(env: Any, policy: Any) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Latents, timesteps and condition, and what the trained network says to them."""
    x = torch.randn(1, *env.mdp.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.5 if env.model.spec.conditioned_on == "image" else 500.0])
    condition = env.mdp.condition([0])
    with torch.no_grad():
        want = policy._network(x, t, condition)
        with policy.reference():
            assert (policy._network(x, t, condition) - want).abs().max() > 1e-3
    return x, t, condition, want


@pytest.mark.parametrize("name", [*UNETS, *OTHERS])
def test_peft_reads_it(name: str, tmp_path: Path) -> None:
    env, policy = trained(name)
    x, t, condition, want = outputs(env, policy)
    policy.save(tmp_path)
    fresh: Any = load(name)  # the same weights, without adapters
    PeftModel.from_pretrained(fresh.denoiser, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(fresh.predict(x, t, condition), want, atol=1e-5, rtol=1e-4)
    again = small_env(f"{name}-Brightness").make_policy(lora_rank=2, lora_alpha=6.0)
    again.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again._network(x, t, condition), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ModelScope", "VideoCrafter2", "SVD"])
def test_where_no_pipeline_reads_one_this_is_said(name: str, tmp_path: Path) -> None:
    _, policy = trained(name)
    with pytest.raises(ValueError, match=r"diffusers loads no LoRA into UNet.*load_lora_adapter.*PeftModel"):
        save_diffusers_lora(policy, tmp_path)
    assert not list(tmp_path.iterdir())


def test_diffusers_still_loads_none_into_these() -> None:
    """Once it does, exports for them can be written and tested like the transformers'."""
    for network in (UNet3DConditionModel, UNetSpatioTemporalConditionModel):
        assert not hasattr(network, "load_lora_adapter")


def test_own_networks_have_no_pipeline() -> None:
    _, policy = trained("OpenSora1.2")
    with pytest.raises(ValueError, match="no pipeline of diffusers runs STDiT3.*PEFT's format"):
        diffusers_lora(policy)
