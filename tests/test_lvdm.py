"""VideoCrafter2's and T2V-Turbo's files: conversion, strictness, loading, and what is said when they are missing."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_env import make
from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.grids import latent_scale_lvdm, scaled_linear_alphas_cumprod
from vdm_env.models import conditioning, lvdm, t2v_turbo, unet3d
from vdm_env.models.checkpoint_files import read_checkpoint
from vdm_env.models.lvdm_keys import Entry, text_entries, unet_entries, vae_entries
from vdm_env.models.lvdm_sizes import AutoencoderSizes, TextSizes, UNetSizes

SIZES = lvdm.Sizes(
    unet=UNetSizes(
        model_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(1,),
        num_head_channels=16,
        context_dim=16,
    ),
    vae=AutoencoderSizes(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, resolution=64),
    text=TextSizes(width=16, heads=2, layers=2, embed_dim=8),
)
PLACE: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


def random_tensors(entries: tuple[Entry, ...], prefix: str = "", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {prefix + e.source: 0.1 * torch.randn(e.shape, generator=generator) for e in entries}


def checkpoint() -> dict[str, Tensor]:
    """A small checkpoint in the release's layout, with its schedule buffers."""
    alphas = scaled_linear_alphas_cumprod(1000, 0.00085, 0.012).float()
    return {
        **random_tensors(unet_entries(SIZES.unet), lvdm.UNET_PREFIX),
        **random_tensors(vae_entries(SIZES.vae), lvdm.VAE_PREFIX),
        **random_tensors(text_entries(SIZES.text), lvdm.TEXT_PREFIX),
        "betas": torch.zeros(1000),
        "alphas_cumprod": alphas,
        "scale_arr": torch.cat([latent_scale_lvdm()[:400], torch.full((1000,), 0.7)]).float(),
    }


# -------------------------------------------------------------------------------------------------- conversion


def test_everything_is_converted_or_named_as_unused() -> None:
    state = checkpoint()
    done = lvdm.convert(state, SIZES)
    last = SIZES.text.layers - 1
    for name in done.unused:
        part = name.removeprefix(lvdm.TEXT_PREFIX)
        known = part in ("text_projection", "logit_scale") or part.startswith(f"transformer.resblocks.{last}.")
        assert known or name in ("betas", "alphas_cumprod", "scale_arr")
    before = sum(t.numel() for t in state.values())
    kept = sum(t.numel() for part in (done.unet, done.conditioning, done.vae, done.text_encoder) for t in part.values())
    assert before == kept + sum(state[name].numel() for name in done.unused)
    joint = state[lvdm.TEXT_PREFIX + "transformer.resblocks.0.attn.in_proj_weight"]
    names = [f"encoder.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    assert torch.equal(torch.cat([done.text_encoder[n] for n in names]), joint)


def test_wrong_checkpoints_are_refused_with_the_list() -> None:
    state = checkpoint()
    del state[lvdm.UNET_PREFIX + "out.2.bias"]
    state[lvdm.UNET_PREFIX + "out.0.weight"] = torch.zeros(5)
    state["model_ema.decay"] = torch.zeros(())
    state[lvdm.VAE_PREFIX + "quant_conv.bias"] = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(CorruptWeightsError) as caught:
        lvdm.convert(state, SIZES, "model.ckpt")
    for piece in (
        "model.ckpt",
        "1 missing: model.diffusion_model.out.2.bias",
        "1 unexpected: model_ema.decay",
        "out.0.weight is (5,), expected (32,)",
        "floating type: first_stage_model.quant_conv.bias",
    ):
        assert piece in str(caught.value)
    with pytest.raises(CorruptWeightsError, match=r"\d{3,} missing.* and \d+ more"):
        lvdm.convert(checkpoint())  # a small one where the release's is expected


@pytest.mark.parametrize("name", ["alphas_cumprod", "scale_arr"])
def test_another_noise_schedule_is_refused(name: str) -> None:
    state = checkpoint()
    state[name] = state[name] * 0.9
    with pytest.raises(CorruptWeightsError, match=f"{name}.*another noise schedule"):
        lvdm.convert(state, SIZES)
    state = checkpoint() | {"betas": torch.zeros(999)}
    with pytest.raises(CorruptWeightsError, match="1 unexpected: betas"):
        lvdm.convert(state, SIZES)


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="use_causal_attention"):
        UNetSizes.from_lvdm({"use_causal_attention": True})
    with pytest.raises(ValueError, match="attn_resolutions"):
        AutoencoderSizes.from_lvdm({"z_channels": 4, "ch_mult": [1, 2], "attn_resolutions": [16]}, 4, 0.18215)
    with pytest.raises(ValueError, match="penultimate"):
        TextSizes.from_open_clip({"embed_dim": 8, "text_cfg": {}}, "pooled")


class Attack:
    """A pickle that would make a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_damaged_and_unsafe_files(tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": checkpoint()}, file)
    content = file.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 30):
        file.write_bytes(content[:size])
        with pytest.raises(CorruptWeightsError, match=r"model\.ckpt \(\d+ bytes\) is truncated, damaged.*fetch"):
            read_checkpoint(file)
    torch.save({"state_dict": Attack(tmp_path / "made")}, file)
    with pytest.raises(CorruptWeightsError, match="without running code"):
        read_checkpoint(file)
    assert not (tmp_path / "made").exists()
    torch.save({"state_dict": {"a": 1}}, file)
    with pytest.raises(CorruptWeightsError, match="expected the dictionary of tensors"):
        read_checkpoint(file)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.ckpt")


def test_folders_are_written_whole_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = lvdm.convert(checkpoint(), SIZES)
    with monkeypatch.context() as patch:
        patch.setattr(lvdm, "MARKER", "no/such/folder")  # writing the last file fails
        with pytest.raises(FileNotFoundError):
            lvdm.save_folders(done, tmp_path / "out", SIZES)
    assert not list(tmp_path.iterdir())
    folder = lvdm.save_folders(done, tmp_path / "out", SIZES)
    assert lvdm.is_converted(folder) and not lvdm.is_converted(folder, "Other") and not lvdm.is_converted(tmp_path)
    with pytest.raises(FileExistsError, match="remove it"):
        lvdm.save_folders(done, folder, SIZES)
    parts = unet3d.load_converted(folder, **PLACE)
    for module, wanted in ((parts.unet, done.unet), (parts.vae, done.vae), (parts.text, done.text_encoder)):
        own = module.state_dict()
        assert set(own) == set(wanted) and all(torch.equal(own[name], wanted[name]) for name in wanted)
    assert parts.vae.config.scaling_factor == SIZES.vae.scale_factor
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CorruptWeightsError, match="truncated, damaged or another file"):
        unet3d.load_converted(folder, **PLACE)


# ----------------------------------------------------------------------------------------------------- loading


def brightness(video: Tensor, prompts: list[str]) -> Tensor:
    return video.mean((1, 2, 3, 4))


def test_environment_from_a_checkpoint_on_this_machine(only_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = only_here / "model.ckpt"
    torch.save({"state_dict": checkpoint(), "global_step": 7}, file)
    monkeypatch.setattr(lvdm, "Sizes", lambda: SIZES)
    options: dict[str, Any] = dict(
        reward=brightness, num_steps=2, num_frames=2, height=64, width=64, prompts=["a", "b"]
    )
    env = make(model="VideoCrafter2", num_envs=2, **options)
    assert lvdm.is_converted(only_here / "VideoCrafter2" / "converted")
    x, t = torch.ones(2, 4, 2, 8, 8), torch.tensor([999, 1])
    condition = env.mdp.condition([0, 1])
    assert condition["fps"].tolist() == [[28.0], [28.0]]
    with torch.no_grad():
        first = env.mdp.model.predict(x, t, condition)
    policy = env.make_policy(lora_rank=2)
    obs, _ = env.reset(seed=0)
    while bool((obs["step"] < env.num_steps).all()):
        obs, reward, terminated, _, _ = env.step(policy(obs))
    assert terminated.all() and reward.isfinite().all()
    file.unlink()  # the second time it comes from the converted folder
    again = make(model="VideoCrafter2", **options).mdp.model
    with torch.no_grad():
        assert torch.equal(again.predict(x, t, condition), first)
        assert not torch.equal(again.predict(x, t, condition | {"fps": torch.tensor([28.0, 8.0])})[1], first[1])


def test_frame_rate_conditions_are_checked(only_here: Path) -> None:
    with pytest.warns(UserWarning, match="random weights"):
        model = unet3d.load(unet3d.VIDEOCRAFTER2, weights="random", scale="tiny", **PLACE)
    x, t, text = torch.zeros(2, 4, 1, 8, 8), torch.tensor([1, 2]), model.encode_prompts(["a", "b"])["text"]
    with pytest.raises(ValueError, match="one number for each of the 2 videos"):
        model.predict(x, t, {"text": text, "fps": torch.ones(3)})
    with pytest.raises(ValueError, match="not \\['guidance'\\]"):
        model.predict(x, t, {"text": text, "guidance": torch.ones(2)})
    with pytest.warns(UserWarning, match="random weights"):
        plain = unet3d.load(unet3d.MODELSCOPE, weights="random", scale="tiny", **PLACE)
    with pytest.raises(ValueError, match="text alone"):
        plain.predict(x, t, {"text": text, "fps": torch.ones(2)})


@pytest.mark.parametrize(
    ("model", "repository", "file"),
    [
        ("VideoCrafter2", "VideoCrafter/VideoCrafter2", "model.ckpt"),
        ("ModelScope", "ali-vilab/text-to-video-ms-1.7b", "unet/*"),
        ("Zeroscope", "cerspense/zeroscope_v2_576w", "unet/*"),
        ("T2VTurbo", "jiachenli-ucsb/T2V-Turbo-VC2", "unet_lora.pt"),
        ("T2VTurboV2", "jiachenli-ucsb/T2V-Turbo-v2", "unet_mg.pt"),
    ],
)
def test_missing_weights_are_one_clear_error(only_here: Path, model: str, repository: str, file: str) -> None:
    specs = (unet3d.VIDEOCRAFTER2, unet3d.MODELSCOPE, unet3d.ZEROSCOPE, t2v_turbo.T2V_TURBO, t2v_turbo.T2V_TURBO_V2)
    spec = {spec.name: spec for spec in specs}[model]
    load = t2v_turbo.load if model.startswith("T2V") else unet3d.load
    with pytest.raises(MissingWeightsError) as caught:
        load(spec, weights="pretrained", scale="full", **PLACE)
    pieces = (
        repository,
        file,
        "GB",
        "Licence",
        "VDM_WEIGHTS",
        f"`vdm-env download {model}`",
        'make("MovingShapes-HPS")',
    )
    for piece in pieces:
        assert piece in str(caught.value)


def test_a_converted_videocrafter2_is_not_taken_for_modelscope(only_here: Path) -> None:
    only_here.rmdir()
    lvdm.save_folders(lvdm.convert(checkpoint(), SIZES), only_here, SIZES)
    with pytest.raises(MissingWeightsError, match="ModelScope"):
        unet3d.load(unet3d.MODELSCOPE, weights="pretrained", scale="full", **PLACE)
    assert unet3d.load(unet3d.VIDEOCRAFTER2, weights="pretrained", scale="full", **PLACE).spec.name == "VideoCrafter2"
    shutil.rmtree(only_here / "conditioning")
    with pytest.raises(FileNotFoundError, match="conditioning"):
        unet3d.load(unet3d.VIDEOCRAFTER2, weights="pretrained", scale="full", **PLACE)


# --------------------------------------------------------------------------------------------------- T2V-Turbo


def lora_list(sizes: UNetSizes, rank: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    flat = []
    for layer in t2v_turbo.lora_layers(sizes):
        r = min(rank, layer.shape[0], layer.shape[1])
        flat.append(torch.randn((layer.shape[0], r) + (1,) * (len(layer.shape) - 2), generator=generator))
        flat.append(torch.randn((r, *layer.shape[1:]), generator=generator))
    return flat


def test_merged_lora_is_the_layer_plus_its_branch(tmp_path: Path) -> None:
    sizes = replace(SIZES.unet, time_cond_proj_dim=256)
    torch.save(lora_list(sizes), tmp_path / "unet_lora.pt")
    pairs = t2v_turbo.read_lora(tmp_path / "unet_lora.pt")
    state = random_tensors(unet_entries(sizes))
    parts = lvdm.convert_unet({name: tensor.clone() for name, tensor in state.items()}, sizes)
    t2v_turbo.merge_lora(parts, pairs, sizes)
    generator, kinds = torch.Generator().manual_seed(2), set()
    for layer, (up, down) in zip(t2v_turbo.lora_layers(sizes), pairs, strict=True):
        before, after = state[layer.source], parts[layer.part][layer.names[0]]
        size = before.ndim - 2
        apply = {0: F.linear, 2: F.conv2d, 3: F.conv3d}[size]
        x = torch.randn(2, before.shape[1], *(5,) * size, generator=generator)
        torch.testing.assert_close(apply(x, after), apply(x, before) + apply(apply(x, down), up), atol=2e-3, rtol=1e-4)
        kinds.add(size)
    assert kinds == {0, 2, 3}
    for name in ("init_attn.0.proj_in.weight", "out.0.weight"):  # 1-D convolutions and norms stay
        entry = next(e for e in unet_entries(sizes) if e.source == name)
        assert torch.equal(parts["unet"][entry.names[0]], state[name].reshape(parts["unet"][entry.names[0]].shape))


def test_lora_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    sizes = SIZES.unet
    parts = lvdm.convert_unet(random_tensors(unet_entries(sizes)), sizes)
    before = {name: tensor.clone() for name, tensor in parts["unet"].items()}
    flat = lora_list(sizes)
    with pytest.raises(CorruptWeightsError, match="pair 0 is"):
        t2v_turbo.merge_lora(parts, t2v_turbo.lora_pairs(flat[::-1], tmp_path), sizes)
    with pytest.raises(CorruptWeightsError, match=r"\d+ pairs for \d+ layers"):
        t2v_turbo.merge_lora(parts, t2v_turbo.lora_pairs(flat[:-2], tmp_path), sizes)
    assert all(torch.equal(parts["unet"][name], tensor) for name, tensor in before.items())
    for content in ([], flat[:-1], [1, 2], {"a": flat[0]}):
        with pytest.raises(CorruptWeightsError, match="expected a list of tensors"):
            t2v_turbo.lora_pairs(content, tmp_path)
    file = tmp_path / "unet_lora.pt"
    torch.save(flat, file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CorruptWeightsError, match="truncated"):
        t2v_turbo.read_lora(file)


def test_turbo_from_files_on_this_machine(only_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lvdm.save_folders(lvdm.convert(checkpoint(), SIZES), only_here / "VideoCrafter2", SIZES)
    monkeypatch.setattr(t2v_turbo, "UNetSizes", lambda: SIZES.unet)
    for name in ("T2VTurbo", "T2VTurboV2"):
        (only_here / name).mkdir()
    guided = replace(SIZES.unet, time_cond_proj_dim=256)
    torch.save(lora_list(guided), only_here / "T2VTurbo" / "unet_lora.pt")
    motion = replace(guided, motion_cond_proj_dim=256)
    torch.save(random_tensors(unet_entries(motion), seed=3), only_here / "T2VTurboV2" / "unet_mg.pt")
    options: dict[str, Any] = {"weights": "pretrained", "scale": "full", **PLACE}
    v1, v2 = t2v_turbo.load(t2v_turbo.T2V_TURBO, **options), t2v_turbo.load(t2v_turbo.T2V_TURBO_V2, **options)
    x, t = torch.zeros(2, 4, 1, 8, 8), torch.tensor([999, 279])
    with torch.no_grad():
        for model, names in ((v1, {"fps", "guidance"}), (v2, {"fps", "guidance", "motion"})):
            condition = model.encode_prompts(["a", "b"])
            assert set(condition) == {"text"} | names
            out = model.predict(x, t, condition)
            assert not torch.allclose(out, model.predict(x, t, condition | {"guidance": torch.ones(2)}))
        still = v2.predict(x, t, condition | {"motion": torch.zeros(2)})
    # Motion guidance acts early in the process only: on the first of these two videos.
    assert not torch.allclose(still[0], out[0]) and torch.equal(still[1], out[1])


@pytest.mark.parametrize("spec", [t2v_turbo.T2V_TURBO, t2v_turbo.T2V_TURBO_V2], ids=lambda spec: spec.name)
def test_turbo_environment(spec: Any) -> None:
    with pytest.warns(UserWarning, match="random weights"):
        model = t2v_turbo.load(spec, weights="random", scale="tiny", **PLACE)
    env = make(
        model=model, reward=brightness, num_envs=1, num_frames=2, height=64, width=64, num_steps=4, prompts=["a"]
    )
    wanted = {"T2VTurbo": [999, 759, 519, 279], "T2VTurboV2": [999, 749, 499, 249]}[spec.name]
    assert env.mdp.table.timesteps.tolist() == wanted
    policy = env.make_policy(lora_rank=2)
    assert policy.guidance_scale == 1.0
    obs, _ = env.reset(seed=0)
    for k in range(4):
        assert bool(obs["stochastic"].all()) == (k < 3)
        obs, reward, _, _, _ = env.step(policy(obs))
    reward.sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.trainable_parameters())


def test_guidance_embedding_is_checked() -> None:
    with pytest.raises(ValueError, match="even number"):
        conditioning.guidance_embedding(torch.ones(1), 3)
    with pytest.warns(UserWarning, match="random weights"):
        model = t2v_turbo.load(t2v_turbo.T2V_TURBO_V2, weights="random", scale="tiny", **PLACE)
    condition = model.encode_prompts(["a"])
    del condition["guidance"]
    with pytest.raises(ValueError, match="needs condition 'guidance'"):
        model.predict(torch.zeros(1, 4, 1, 8, 8), torch.tensor([1]), condition)
