"""VideoCrafter2 against the original LVDM classes: names, shapes, UNet, sampling, autoencoder, text encoder.

Sizes, shapes, steps, guidance and names are read from the reference files, so any other set of the same layout
works.
"""

from __future__ import annotations

import copy
import math
import re
from functools import cache
from typing import Any

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from golden import golden, golden_json, golden_tensors, nested
from torch import Tensor
from transformers import CLIPTextModel

from vdm_env.models import lvdm
from vdm_env.models.base import FrameCodec, TokenTextEncoder, frozen
from vdm_env.models.conditioning import add_fps_embedding
from vdm_env.models.lvdm_keys import text_entries, unet_entries, vae_entries
from vdm_env.models.lvdm_sizes import AutoencoderSizes, TextSizes, UNetSizes
from vdm_env.models.unet3d import call_unet3d
from vdm_env.schedule import VPSchedule, latent_scale_lvdm, scaled_linear_alphas_cumprod
from vdm_env.transition import step

pytestmark = pytest.mark.golden

UNET, DDIM, VAE, TEXT = "videocrafter2_unet", "videocrafter2_ddim", "videocrafter2_vae", "videocrafter2_text"


def within(got: Tensor, want: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol)


@cache
def unet_of(folder: str) -> Any:
    """The converted network of a fixture folder (an argument, so that the cache knows the set)."""
    sizes = UNetSizes.from_lvdm(golden_json(UNET, "config.json")["unet_config"])
    parts = lvdm.convert_unet(golden_tensors(UNET, "unet.safetensors"), sizes)
    network = UNet3DConditionModel(**sizes.diffusers())
    network.load_state_dict(parts["unet"])
    add_fps_embedding(network, parts["conditioning"])
    return frozen(network)


@cache
def exact_unet_of(folder: str) -> Any:
    return copy.deepcopy(unet_of(folder)).double()


@pytest.fixture
def unet() -> Any:
    return unet_of(str(golden(UNET)))


@pytest.fixture
def exact() -> Any:
    """The same in float64.

    Narrow networks on small latents normalise groups of one element, which amplifies float32 rounding 300-fold, and
    differently on every processor: only float64 shows how well two implementations agree.
    """
    return exact_unet_of(str(golden(UNET)))


def run(network: Any, case: dict[str, Tensor], **changed: Tensor) -> Tensor:
    case = case | changed
    dtype = next(network.parameters()).dtype
    with torch.no_grad():
        condition = {"text": case["context"].to(dtype), "fps": case["fps"]}
        return call_unet3d(network, case["x"].to(dtype), case["timesteps"], condition)


# -------------------------------------------------------------------------------------------- names and shapes


def check_map(sizes: UNetSizes, wanted: dict[str, dict], arguments: dict[str, Any]) -> None:
    """Our table has exactly these names, targets and squeezes, and the network of the stated arguments."""
    entries = unet_entries(sizes)
    assert {e.source for e in entries} == set(wanted)
    for entry in entries:
        target, squeeze = wanted[entry.source]["diffusers"], bool(wanted[entry.source]["squeeze_last"])
        if target is None:
            assert entry.part == "conditioning", entry
        else:
            assert (entry.part, entry.names, bool(entry.squeeze)) == ("unet", (target,), squeeze)
    with torch.device("meta"):
        network = UNet3DConditionModel(**arguments)
    ours = {name for e in entries if e.part == "unet" for name in e.names}
    assert ours == set(network.state_dict())
    for name, value in sizes.diffusers().items():
        given = arguments[name]
        assert value == (tuple(given) if isinstance(given, list) else given), name


def test_full_size_table_has_every_published_key() -> None:
    published = golden_json(UNET, "full_size_keys.json")
    sizes = UNetSizes.from_lvdm(published["lvdm_unet_config"])
    assert sizes == UNetSizes(), "the defaults are the release's"
    keys = published["keys"]
    check_map(sizes, {key["lvdm"]: key for key in keys}, published["diffusers_unet_config"])
    entries = unet_entries(sizes)
    # The order too: a LoRA list of T2V-Turbo has nothing else to go by.
    assert [(e.source, list(e.shape)) for e in entries] == [(key["lvdm"], key["lvdm_shape"]) for key in keys]
    assert sum(math.prod(e.shape) for e in entries) == published["n_params"]
    assert published["checkpoint_prefix"] == lvdm.UNET_PREFIX


def test_small_table() -> None:
    published = golden_json(UNET, "small_key_map.json")
    sizes = UNetSizes.from_lvdm(golden_json(UNET, "config.json")["unet_config"])
    stored = golden_tensors(UNET, "unet.safetensors")
    wanted = dict(published["map"])
    # The map may leave out the tensors that have no counterpart.
    wanted |= {name: {"diffusers": None, "squeeze_last": None} for name in set(stored) - set(wanted)}
    assert all(name.startswith("fps_embedding.") for name, entry in wanted.items() if entry["diffusers"] is None)
    check_map(sizes, wanted, published["diffusers_unet_config"])
    assert {e.source: e.shape for e in unet_entries(sizes)} == {name: tuple(t.shape) for name, t in stored.items()}


def test_full_size_autoencoder_and_text_encoder() -> None:
    config = golden_json(VAE, "config.json")
    full = AutoencoderSizes.from_lvdm(config["full_size_ddconfig"], config["embed_dim"], config["scale_factor"])
    assert full == AutoencoderSizes()
    assert sum(math.prod(e.shape) for e in vae_entries(full)) == config["full_size_params"]
    assert config["checkpoint_prefix"] == lvdm.VAE_PREFIX
    text = golden_json(TEXT, "config.json")
    stated, ours = text["full_size"], TextSizes()
    assert (ours.width, ours.heads, ours.layers, ours.context_length) == tuple(
        stated[name] for name in ("width", "heads", "layers", "context_length")
    )
    assert text["checkpoint_prefix"] == lvdm.TEXT_PREFIX
    layers = {e.source.split(".")[2] for e in text_entries(ours) if e.source.startswith("transformer.") and e.part}
    assert len(layers) == stated["layers"] - ours.skipped_layers


# ----------------------------------------------------------------------------------------------------- network


def test_embeddings_of_time_and_frame_rate(unet: Any) -> None:
    want = golden_tensors(UNET, "embeddings.safetensors")
    (name, fps) = next((m[0], float(m[1])) for key in want if (m := re.fullmatch(r"fps_embed_(\d+)", key)))
    sinusoid = unet.time_proj(want["timesteps"])
    within(sinusoid, want["sinusoidal_t"], 5e-5)
    embedding = unet.time_embedding
    total = embedding(sinusoid, {"fps": torch.full(want["timesteps"].shape, fps)})
    within(embedding.time_embedding(sinusoid), want["time_embed"], 5e-5)
    within(total - embedding.time_embedding(sinusoid), want[name], 5e-5)
    within(total, want["emb_total"], 5e-5)


def test_unet_outputs(unet: Any, exact: Any) -> None:
    cases = nested(golden_tensors(UNET, "cases.safetensors"))
    assert cases
    for case in cases.values():
        within(run(exact, case), case["output"], 5e-5, 1e-4)
        within(run(unet, case), case["output"], 4e-4, 1e-4)


def test_each_video_has_its_own_frame_rate(exact: Any) -> None:
    cases = [c for c in nested(golden_tensors(UNET, "cases.safetensors")).values() if len(c["x"]) > 1]
    if not cases:
        pytest.skip("no case of these reference vectors has two videos")
    for case in cases:
        last = {name: tensor[-1:] for name, tensor in case.items()}
        within(run(exact, last, fps=last["fps"][:, None]), last["output"], 5e-5, 1e-4)
        got = run(exact, case, fps=torch.cat([case["fps"][:-1], case["fps"][-1:] + 7]))
        within(got[:-1], case["output"][:-1], 5e-5, 1e-4)
        assert (got[-1] - case["output"][-1]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------- sampling


def runs() -> list[tuple[dict, dict[str, Tensor]]]:
    tensors = nested(golden_tensors(DDIM, "trajectories.safetensors"))
    found = [(setting, tensors[setting["run"]]) for setting in golden_json(DDIM, "runs.json")["runs"]]
    assert found
    return found


def table_of(setting: dict) -> Any:
    p = golden_json(DDIM, "runs.json")["params"]
    scale = latent_scale_lvdm(p["timesteps"], p["scale_b"], p["mid_step"]) if setting["use_scale"] else None
    alphas = scaled_linear_alphas_cumprod(p["timesteps"], p["linear_start"], p["linear_end"])
    return VPSchedule(alphas_cumprod=alphas, latent_scale=scale, spacing="lvdm").table(
        setting["S"], "ddim", setting["eta"]
    )


def both(unet: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Unconditional and conditional output, as the policy calls the network: one doubled batch."""
    inputs = nested(golden_tensors(DDIM, "trajectories.safetensors"))["inputs"]
    text = torch.cat([inputs["uncond_context"].expand_as(inputs["context"]), inputs["context"]])
    dtype = next(unet.parameters()).dtype
    with torch.no_grad():
        condition = {"text": text.to(dtype), "fps": inputs["fps"].expand(len(x)).repeat(2)}
        out = call_unet3d(unet, x.repeat(2, 1, 1, 1, 1).to(dtype), t.expand(2 * len(x)), condition)
    eps_u, eps_c = out.chunk(2)
    return eps_u, eps_c


def test_network_along_the_reference_trajectories(exact: Any) -> None:
    for setting, r in runs():
        for k in range(setting["n_steps"]):
            eps_u, eps_c = both(exact, r["x_t"][k], r["t"][k])
            within(eps_c, r["eps_cond"][k], 2e-4)
            if setting["cfg"] != 1:
                within(eps_u, r["eps_uncond"][k], 2e-4)


def test_free_running_trajectories(exact: Any) -> None:
    start = nested(golden_tensors(DDIM, "trajectories.safetensors"))["inputs"]["x_T"]
    for setting, r in runs():
        table, x = table_of(setting), start
        for k in range(setting["n_steps"]):
            eps_u, eps_c = (eps.float() for eps in both(exact, x, table.timesteps[k]))
            action = eps_c if setting["cfg"] == 1 else eps_u + setting["cfg"] * (eps_c - eps_u)
            action = action + float(table.sigma[k] / table.B[k]) * r["noise"][k]
            x = step(table, x, action, torch.full((len(x),), k))
        # The tolerance was stated for latents up to 200; rounding of float32 grows with them.
        within(x, r["sample"], 2e-2 * max(1.0, float(r["x_t"].abs().max()) / 200))


# ------------------------------------------------------------------------------------- autoencoder, text encoder


def test_autoencoder() -> None:
    config, case = golden_json(VAE, "config.json"), golden_tensors(VAE, "cases.safetensors")
    sizes = AutoencoderSizes.from_lvdm(config["ddconfig"], config["embed_dim"], config["scale_factor"])
    vae = AutoencoderKL(**sizes.diffusers())
    vae.load_state_dict(lvdm.convert_vae(golden_tensors(VAE, "vae.safetensors"), sizes))
    codec = FrameCodec(vae=frozen(vae))
    frames = case["video"].transpose(1, 2)  # [B,F,3,H,W] in [-1,1]
    with torch.no_grad():
        moments = vae.encode(frames.flatten(0, 1)).latent_dist.parameters.unflatten(0, frames.shape[:2]).transpose(1, 2)
        raw = vae.decode(case["z_scaled"].transpose(1, 2).flatten(0, 1) / config["scale_factor"]).sample
    within(moments, case["moments"], 5e-5)
    within(codec.encode(frames / 2 + 0.5), case["latent_mode_scaled"], 5e-5)
    within(raw.unflatten(0, frames.shape[:2]).transpose(1, 2), case["decoded"], 5e-5)
    within(codec.decode(case["z_scaled"]), (case["decoded"].transpose(1, 2) / 2 + 0.5).clamp(0, 1), 5e-5)
    last = torch.full((len(frames), 1), frames.shape[1] - 1)
    within(codec.decode(case["z_scaled"], last), codec.decode(case["z_scaled"])[:, -1:], 5e-5)


def test_text_encoder_and_tokens() -> None:
    config, case = golden_json(TEXT, "config.json"), golden_tensors(TEXT, "cases.safetensors")
    sizes = TextSizes.from_open_clip(config["open_clip_cfg"], config["layer"])
    encoder = CLIPTextModel(sizes.transformers())
    encoder.load_state_dict(lvdm.convert_text(golden_tensors(TEXT, "text_encoder.safetensors"), sizes))
    tokenize = open_clip.get_tokenizer("ViT-H-14", context_length=sizes.context_length)
    text = TokenTextEncoder(encoder=frozen(encoder), tokenize=tokenize)
    assert torch.equal(text.tokenize(config["texts"]), case["tokens"])
    within(text(config["texts"])["text"], case["embeddings"], 1e-5)
