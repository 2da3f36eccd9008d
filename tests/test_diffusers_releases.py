"""Release folders of the families that are diffusers pipelines: found, told apart, read strictly, clearly missed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import latents, new_tiny
from vdm_env import make
from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.models import MODELS, animatediff, cogvideox, hunyuan_video, ltx, mochi, wan
from vdm_env.models.base import TokenTextEncoder
from vdm_env.models.opensora_weights import hub_tokenizer
from vdm_env.models.parts import PipelineModel
from vdm_env.models.releases import Release
from vdm_env.worlds.moving_shapes.networks import build_tokenizer

FAMILIES: dict[str, tuple[Any, Release]] = {
    **{name: (cogvideox, wanted) for name, wanted in cogvideox.RELEASES.items()},
    **{name: (wan, wanted) for name, wanted in wan.RELEASES.items()},
    "HunyuanVideo": (hunyuan_video, hunyuan_video.RELEASE),
    "LTXVideo": (ltx, ltx.RELEASE),
    "Mochi": (mochi, mochi.RELEASE),
}

SPECS = {
    "CogVideoX5B": cogvideox.COGVIDEOX_5B,
    "Wan2.1_1.3B": wan.WAN21_1B,
    "Wan2.2_A14B": wan.WAN22_A14B,
    "HunyuanVideo": hunyuan_video.HUNYUAN_VIDEO,
    "LTXVideo": ltx.LTX_VIDEO,
    "Mochi": mochi.MOCHI,
}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vdm_env.models.local_weights.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VDM_WEIGHTS", raising=False)


def parts_of(name: str, model: PipelineModel) -> dict[str, Any]:
    """The networks of a model by sub-folder."""
    denoisers: dict[str, Any] = {"transformer": model.denoiser}
    if name == "Wan2.2_A14B":
        denoisers = {"transformer": model.denoiser.high, "transformer_2": model.denoiser.low}
    text: Any = model.text
    encoders = (
        {"text_encoder": text.llama, "text_encoder_2": text.clip}
        if name == "HunyuanVideo"
        else {"text_encoder": text.encoder}
    )
    return denoisers | {"vae": model.codec.vae} | encoders


def save_release(name: str, model: PipelineModel, folder: Path) -> Path:
    for part, network in parts_of(name, model).items():
        network.save_pretrained(folder / part)
    for part in ("tokenizer", "tokenizer_2"):
        build_tokenizer().save_pretrained(folder / part)
    return folder


def without_marks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The release's own sizes are its marks; tiny networks have others."""
    module, wanted = FAMILIES[name]
    plain = replace(wanted, marks={})
    if hasattr(module, "RELEASES"):
        monkeypatch.setattr(module, "RELEASES", module.RELEASES | {name: plain})
    else:
        monkeypatch.setattr(module, "RELEASE", plain)


def load(name: str, dtype: torch.dtype = torch.float32) -> PipelineModel:
    return MODELS[name].load(weights="pretrained", scale="full", device="cpu", dtype=dtype)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["CogVideoX5B", "Wan2.1_1.3B", "Wan2.2_A14B", "HunyuanVideo", "LTXVideo", "Mochi"])
def test_a_release_folder_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = new_tiny(name)
    save_release(name, made, tmp_path / "weights" / name)
    monkeypatch.setenv("VDM_WEIGHTS", str(tmp_path / "weights"))
    with pytest.raises(MissingWeightsError):  # tiny networks are no release
        load(name)
    without_marks(monkeypatch, name)
    model = load(name)
    x, t = latents(made, 1), torch.tensor([300.0])
    condition = made.encode_prompts(["a dog"])
    with torch.no_grad():
        torch.testing.assert_close(model.predict(x, t, condition), made.predict(x, t, condition))
        torch.testing.assert_close(model.decode(x), made.decode(x))
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    spec = model.spec
    assert (spec.num_frames, spec.height) == (SPECS[name].num_frames, SPECS[name].height)
    if name.startswith("Wan"):
        half = load(name, torch.bfloat16)
        random = new_tiny(name, torch.bfloat16)  # what is random keeps the same layers in float32
        types = [{n: v.dtype for n, v in m.denoiser.state_dict().items()} for m in (half, random)]
        assert types[0] == types[1] and len(set(types[0].values())) == 2


@pytest.mark.parametrize("name", list(FAMILIES))
def test_missing_weights_say_what_to_fetch(name: str) -> None:
    _, wanted = FAMILIES[name]
    with pytest.raises(MissingWeightsError) as error:
        make(f"{name}-HPS")
    text = str(error.value)
    for expected in (wanted.published.repository, "transformer/*", "tokenizer", "GB", "Licence", "vdm-env download"):
        assert expected in text
    assert f'make("{name}-...", weights="random", scale="tiny")' in text


def test_relatives_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is found by its sizes, not by its name alone."""
    monkeypatch.setenv("VDM_WEIGHTS", str(tmp_path))
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    config = tmp_path / "transformer" / "config.json"
    for layers, channels, found in ((30, 16, "Wan2.1_1.3B"), (40, 16, "Wan2.1_14B"), (30, 48, "Wan2.2_5B")):
        config.write_text(json.dumps({"num_layers": layers, "in_channels": channels}))
        for name in ("Wan2.1_1.3B", "Wan2.1_14B", "Wan2.2_5B"):
            # of the right one only the weights themselves are missing
            with pytest.raises(MissingWeightsError, match="no weights of" if name == found else "vdm-env download"):
                load(name)
    config.write_text(json.dumps({"num_layers": 40, "in_channels": 16}))
    shutil.copytree(tmp_path / "transformer", tmp_path / "transformer_2")
    with pytest.raises(MissingWeightsError, match="vdm-env download"):
        load("Wan2.1_14B")
    with pytest.raises(MissingWeightsError, match="no weights of"):
        load("Wan2.2_A14B")
    config.write_text("{")
    with pytest.raises(CorruptWeightsError, match="no JSON"):
        load("Mochi")


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = new_tiny("Mochi")
    folder = save_release("Mochi", made, tmp_path / "Mochi")
    monkeypatch.setenv("VDM_WEIGHTS", str(tmp_path))
    without_marks(monkeypatch, "Mochi")
    with pytest.raises(CorruptWeightsError, match="does not hold a tokenizer"):
        hub_tokenizer(folder / "vae", 8)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CorruptWeightsError, match="damaged or truncated"):
        load("Mochi")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(MissingWeightsError, match="genmo/mochi-1-preview"):
        load("Mochi")


def test_animatediff_is_two_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import MotionAdapter, UNet2DConditionModel

    base_name, adapter_name = "stable-diffusion-v1-5", "animatediff-motion-adapter-v1-5-3"
    with pytest.raises(MissingWeightsError) as error:
        load("AnimateDiff")
    assert adapter_name in str(error.value) and base_name in str(error.value)
    monkeypatch.setenv("VDM_WEIGHTS", str(tmp_path))
    widths = (8, 8, 8, 8)
    adapter = MotionAdapter(block_out_channels=widths, motion_layers_per_block=1, motion_norm_num_groups=4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02)
    adapter.save_pretrained(tmp_path / adapter_name)
    with pytest.raises(MissingWeightsError, match=base_name):
        load("AnimateDiff")
    made = new_tiny("AnimateDiff")
    unet = UNet2DConditionModel(
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    unet.save_pretrained(tmp_path / base_name / "unet")
    made.codec.vae.save_pretrained(tmp_path / base_name / "vae")
    assert isinstance(made.text, TokenTextEncoder)
    made.text.encoder.save_pretrained(tmp_path / base_name / "text_encoder")
    monkeypatch.setattr(animatediff, "BASE", replace(animatediff.BASE, marks={}))
    model = load("AnimateDiff")
    assert model.spec.max_frames == 32 and model.spec == animatediff.ANIMATEDIFF
    stored = model.denoiser.state_dict()
    assert any("motion_modules" in name for name in stored)
    for name, value in unet.state_dict().items():
        assert torch.equal(stored[name], value)
    small = model.with_size(2, 32, 32)
    x = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = small.predict(x, torch.tensor([500.0]), small.encode_prompts(["a dog"]))
    assert out.shape == x.shape and torch.isfinite(out).all()
