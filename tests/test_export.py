"""Exported weights: both formats act as the policy does, the card says what was done, and the upload is the user's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError
from models import LATENT_SHAPE, tiny_env
from peft import PeftModel
from safetensors.torch import load_file

from algos import export as exports
from algos.export import Card, Change, PushError, export, model_card, push, write_card


def trained_policy(**options: Any) -> Any:
    """A policy whose adapter does something."""
    policy = tiny_env().make_policy(**{"lora_rank": 2, "lora_alpha": 6.0} | options)
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable_parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return policy


def output(network: Any) -> torch.Tensor:
    """Of a flow transformer at fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, *LATENT_SHAPE, generator=generator), torch.randn(1, 8, 16, generator=generator)
    with torch.no_grad():
        return network(hidden_states=x, timestep=torch.tensor([500.0]), encoder_hidden_states=text).sample


def card(**changes: Any) -> Card:
    given: dict[str, Any] = {
        "title": "A title", "env_id": "Tinyflow-HPS", "model": "Tinyflow", "repositories": ["someone/base"],
        "licence": "as its page says", "spdx": "other", "reward": "HPS", "algorithm": "vader", "updates": 7, "seed": 3,
        "command": "vdm-env train --algo vader", "config": {"algorithm": {"learning_rate": 0.5}},
        "sampling": {"num_steps": 4}, "changes": [Change(name="reward", before=0.5, after=0.75, low=0.2, high=0.3)],
    }  # fmt: skip
    return Card(**given | changes)


def test_both_formats_act_like_the_policy(tmp_path: Path) -> None:
    policy = trained_policy()
    files = export(policy, tmp_path)
    names = ["adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors"]
    assert [file.name for file in files] == names and all(file.is_file() for file in files)
    expected = output(policy._switched_on(untrained=False).denoiser)
    plain = tiny_env().model.denoiser
    assert not torch.allclose(output(plain), expected, atol=1e-3)
    # diffusers' names, by hand: W + B A, where the scale of 3 is inside B.
    fused = tiny_env().model.denoiser
    layers, weights = dict(fused.named_modules()), load_file(files[2])
    with torch.no_grad():
        for name in [name for name in weights if ".lora_A." in name]:
            layer = layers[name.removeprefix("transformer.").partition(".lora_A.")[0]]
            layer.weight += weights[name.replace("lora_A", "lora_B")] @ weights[name]
    torch.testing.assert_close(output(fused), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output(PeftModel.from_pretrained(plain, tmp_path)), expected, atol=1e-5, rtol=1e-4)


def test_all_weights_are_exported_as_they_are(tmp_path: Path) -> None:
    policy = trained_policy(lora_rank=0, lora_alpha=None)
    (file,) = export(policy, tmp_path)
    assert file.name == "model.safetensors" and set(load_file(file)) == set(policy.lora_state_dict())
    text = model_card(card(diffusers=False), policy)
    assert "All weights of the network" in text and "load_lora_weights" not in text


def test_the_card_says_what_was_done(tmp_path: Path) -> None:
    policy = trained_policy()
    text = write_card(card(), policy, tmp_path).read_text(encoding="utf-8")
    about = yaml.safe_load(text.split("---")[1])
    assert about["base_model"] in ("someone/base", ["someone/base"]) and about["license"] == "other"
    assert about["library_name"] == "diffusers" and "lora" in about["tags"]
    assert "| reward | 0.5 | 0.75 | +0.25 [+0.2, +0.3] |" in text and "learning_rate: 0.5" in text
    assert "LoRA of rank 2" in text and "vader, 7 updates, seed 3" in text and "as its page says" in text
    assert 'make("Tinyflow-HPS", num_steps=4)' in text and "lora_rank=2, lora_alpha=6.0" in text
    assert "pipeline.load_lora_weights" in text
    other = model_card(card(diffusers=False, changes=(), repositories=(), command=None), policy)
    assert "was not evaluated" in other and "No pipeline of diffusers" in other and "come with vdm_env" in other


def test_upload_with_the_users_own_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def noted(name: str, answer: Any) -> Any:
        def call(*positional: Any, **named: Any) -> Any:
            calls.append((name, {"positional": positional, **named}))
            return answer

        return call

    fake = SimpleNamespace(create_repo=noted("create", "https://hub/me/x"), upload_folder=noted("upload", None))
    monkeypatch.setattr(exports, "HfApi", lambda: fake)
    assert push(tmp_path, "me/x") == "https://hub/me/x"
    (first, made), (second, sent) = calls
    assert (first, second) == ("create", "upload") and made["positional"] == ("me/x",) and made["private"] is True
    assert sent["repo_id"] == "me/x" and sent["folder_path"] == str(tmp_path)

    def refuses(*_: Any, **__: Any) -> None:
        raise LocalTokenNotFoundError("no token")

    fake.create_repo = refuses
    with pytest.raises(PushError, match="hf auth login"):
        push(tmp_path, "me/x")
