"""T2V-Turbo against the original classes: guidance as an input, its embedding, consistency sampling.

Sizes, shapes, steps, guidance and names are read from the reference files, so any other set of the same layout
works.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet3DConditionModel
from golden import golden, golden_json, golden_tensors, nested
from safetensors.torch import load_file
from torch import Tensor

from vdm_env.models import lvdm
from vdm_env.models.base import frozen
from vdm_env.models.conditioning import add_guided_embedding, guidance_embedding
from vdm_env.models.lvdm_sizes import UNetSizes
from vdm_env.models.t2v_turbo import lora_layers
from vdm_env.models.unet3d import call_unet3d
from vdm_env.samplers import lcm_table
from vdm_env.transition import predict_x0, step

pytestmark = pytest.mark.golden

TURBO = "t2v_turbo_vc2"


def within(got: Tensor, want: Tensor, atol: float) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=0)


@cache
def network_of(folder: str, version: str, dtype: torch.dtype) -> Any:
    config = golden_json(TURBO, "config.json")
    sizes = UNetSizes.from_lvdm(config[f"unet_config_{version}"])
    names = ["time_cond_proj"] + (["motion_cond_proj", "combine_proj"] if sizes.motion_cond_proj_dim else [])
    extra = golden_tensors(TURBO, "extra_weights.safetensors")
    state = load_file(Path(folder) / config["base_weights"]) | {
        f"{name}.weight": extra[f"{name}.weight"] for name in names
    }
    parts = lvdm.convert_unet(state, sizes)
    unet = UNet3DConditionModel(**sizes.diffusers())
    unet.load_state_dict(parts["unet"])
    widths = {"guidance_width": sizes.time_cond_proj_dim, "motion_width": sizes.motion_cond_proj_dim}
    add_guided_embedding(unet, parts["conditioning"], **widths)
    return frozen(unet.to(dtype))


def network(version: str, dtype: torch.dtype = torch.float64) -> Any:
    """In float64 by default: these narrow networks amplify the rounding of float32, differently on every processor."""
    return network_of(str(golden(TURBO)), version, dtype)


def case() -> dict[str, Tensor]:
    return nested(golden_tensors(TURBO, "cases.safetensors"))["unet"]


def call(net: Any, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """The network in its own type, float32 back."""
    with torch.no_grad():
        return call_unet3d(net, x.to(next(net.parameters()).dtype), t, condition).float()


def output(version: str, dtype: torch.dtype = torch.float64, **numbers: Tensor) -> Tensor:
    c = case()
    condition = {"text": c["context"], "fps": c["fps"], **numbers}
    return call(network(version, dtype), c["x"], c["timesteps"], condition)


def test_guidance_embeddings() -> None:
    c = case()
    within(guidance_embedding(c["w"], c["w_embedding"].shape[1]), c["w_embedding"], 1e-5)
    within(guidance_embedding(c["motion_gs"], c["motion_embedding"].shape[1]), c["motion_embedding"], 1e-5)


def test_network_v1() -> None:
    within(output("v1", guidance=case()["w"]), case()["output_v1"], 5e-5)
    within(output("v1"), case()["output_no_cond"], 5e-5)


def test_network_v2() -> None:
    c = case()
    within(output("v2", guidance=c["w"], motion=c["motion_gs"]), c["output_v2_motion"], 5e-5)
    within(output("v2", guidance=c["w"]), c["output_v1"], 5e-5)
    within(output("v2"), c["output_no_cond"], 5e-5)


def test_networks_in_float32() -> None:
    c = case()
    within(output("v1", torch.float32, guidance=c["w"]), c["output_v1"], 4e-4)
    within(output("v2", torch.float32, guidance=c["w"], motion=c["motion_gs"]), c["output_v2_motion"], 4e-4)


def test_each_video_has_its_own_guidance() -> None:
    w = case()["w"].clone()
    w[-1] += 3
    got = output("v1", guidance=w)
    within(got[:-1], case()["output_v1"][:-1], 5e-5)
    assert (got[-1] - case()["output_v1"][-1]).abs().max() > 1e-3


def test_consistency_sampling_with_the_network() -> None:
    groups = nested(golden_tensors(TURBO, "cases.safetensors"))
    alphas = golden_tensors(TURBO, "schedules.safetensors")["alphas_cumprod"]
    settings = golden_json(TURBO, "config.json")["runs"]
    assert settings
    for run in settings:
        r = groups[run["run"]]
        assert r["t"].tolist() == run["timesteps"]
        table, x = lcm_table(alphas, r["t"]), r["x_t"][0]
        videos = len(x)
        condition = {
            "text": groups["traj"]["context"],
            "fps": torch.full((videos,), float(run["fps"])),
            "guidance": torch.full((videos,), float(run["w"])),
        }
        scale = max(1.0, float(r["denoised"].abs().max()), float(r["x_t"].abs().max()))
        for k in range(len(r["t"])):
            at = torch.full((videos,), k)
            forced = call(network("v1"), r["x_t"][k], r["t"][k].expand(videos), condition)
            eps = call(network("v1"), x, r["t"][k].expand(videos), condition)
            within(forced, r["eps"][k], 2e-4)
            within(predict_x0(table, x, eps, at), r["denoised"][k], 2e-4 * scale)
            noise = float(table.sigma[k] / table.B[k]) * r["noise"][k] if table.stochastic[k] else 0.0
            x = step(table, x, eps + noise, at)
        within(x, r["final_denoised"], 2e-4 * scale)


def test_lora_layers_are_the_linear_and_convolution_layers_in_order() -> None:
    """The list's order is that of the original's modules, with the projection of w after the frame-rate layers."""
    published = golden_json("videocrafter2_unet", "full_size_keys.json")
    sizes = UNetSizes(time_cond_proj_dim=golden_json(TURBO, "config.json")["unet_config_v1"]["time_cond_proj_dim"])
    names = [
        k["lvdm"] for k in published["keys"] if k["lvdm"].endswith(".weight") and len(k["lvdm_shape"]) in (2, 4, 5)
    ]
    place = 1 + max(i for i, name in enumerate(names) if name.startswith("fps_embedding."))
    names.insert(place, "time_cond_proj.weight")
    layers = lora_layers(sizes)
    assert [layer.source for layer in layers] == names
    assert not any(layer.source.startswith("init_attn.0.proj_") for layer in layers)
    assert all(min(layer.shape[0], math.prod(layer.shape[1:])) > 0 for layer in layers)
