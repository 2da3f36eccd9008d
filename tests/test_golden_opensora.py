"""Open-Sora 1.2 against the original networks and sampler: STDiT3, both autoencoder stages, guided trajectories.

Shapes, sizes, step counts, guidance and names are read from the reference files, so any other set of the same layout
works.
"""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Any

import pytest
import torch
from golden import golden_json, golden_tensors, nested
from torch import Tensor

from vdm_env.models import stdit3
from vdm_env.models.opensora import call_stdit3, release_schedule
from vdm_env.models.opensora_vae import OpenSoraVAE, TemporalVAEConfig, VideoVAEConfig, temporal_config
from vdm_env.models.opensora_weights import load_exactly
from vdm_env.models.stdit3 import STDiT3, STDiT3Config, position_embedding
from vdm_env.schedule import FlowSchedule
from vdm_env.transition import step

pytestmark = pytest.mark.golden

NETWORK, VAE, FLOW = "opensora_v12_stdit3", "opensora_v12_vae", "opensora_v12_rflow"


def within(got: Tensor, want: Tensor, atol: float) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=0)


def vae_config(small: bool = True) -> VideoVAEConfig:
    config = golden_json(VAE, "config.json")
    full = VideoVAEConfig()
    return VideoVAEConfig(
        temporal=temporal_config(config["temporal_config"] if small else config["full_temporal_config"]),
        spatial=config["spatial_config"] if small else full.spatial,
        chunk_frames=config["micro_frame_size"],
        batch_frames=config["micro_batch_size"],
        spatial_scale=config["spatial_scaling_used"],
        shift=tuple(config["shift"]),
        scale=tuple(config["scale"]),
    )


@cache
def network() -> STDiT3:
    net = STDiT3(STDiT3Config.of(golden_json(NETWORK, "config.json")["config"]))
    load_exactly(net, golden_tensors(NETWORK, "stdit3.safetensors"), "stdit3.safetensors")
    return net.eval().requires_grad_(False)


@cache
def vae() -> OpenSoraVAE:
    net = OpenSoraVAE(vae_config())
    both = golden_tensors(VAE, "spatial_vae.safetensors") | golden_tensors(VAE, "temporal_vae.safetensors")
    load_exactly(net, both, "spatial_vae.safetensors and temporal_vae.safetensors")
    return net.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ STDiT3


def network_cases() -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    tensors = nested(golden_tensors(NETWORK, "cases.safetensors"))
    cases = [(case, tensors[case["case"]]) for case in golden_json(NETWORK, "config.json")["cases"]]
    assert cases and len(cases) == len(tensors)
    return cases


def run_network(net: STDiT3, f: dict[str, Tensor], **change: Tensor) -> Tensor:
    f = f | change
    size = {name: f[name] for name in ("fps", "height", "width")}
    return net(f["x"], f["timestep"], f["y"], f["mask"], **size, x_mask=f.get("x_mask"))


def test_network_outputs() -> None:
    for _, f in network_cases():
        within(run_network(network(), f), f["output"], 2e-5)


def test_network_outputs_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the sinusoids of the time: their phases of up to 1000 were rounded to float32 in the original.

    Exact ones change the output by 2e-5, ten times more than all other rounding, so the trajectories stay in float32.
    """
    net, rounded = copy.deepcopy(network()).double(), stdit3.sinusoid
    monkeypatch.setattr(stdit3, "sinusoid", lambda values: rounded(values.float()).double())
    for _, f in network_cases():
        inputs = {name: f[name].double() for name in ("x", "y")}
        got = run_network(net, f, **inputs)
        assert got.dtype == torch.float64
        within(got, f["output"], 2e-5)


def test_network_takes_whole_masks_and_checkpoints_blocks() -> None:
    """A mask of B rows does what a shorter, repeated one does; recomputing blocks changes nothing, gradients flow."""
    net = network()
    for _, f in network_cases():
        whole = f["mask"].repeat(len(f["x"]) // len(f["mask"]), 1)
        within(run_network(net, f, mask=whole), f["output"], 2e-5)
    x = f["x"].clone().requires_grad_(True)
    gradients = []
    for net.gradient_checkpointing in (True, False):
        output = run_network(net, f, x=x)
        within(output.detach(), f["output"], 2e-5)
        gradients.append(torch.autograd.grad(output.square().sum(), x)[0])
    within(gradients[0], gradients[1], 1e-5 * float(gradients[1].abs().max()))


def test_null_caption_is_the_one_of_the_guidance_cases() -> None:
    null = network().y_embedder.y_embedding
    guided = [f for case, f in network_cases() if case["null_second_half"]]
    if not guided:
        pytest.skip("no case of these reference vectors has the null caption in its second half")
    for f in guided:
        half = len(f["y"]) // 2
        within(f["y"][half:, 0], null.expand(half, -1, -1), 0)


def test_network_partials() -> None:
    tensors, seen = golden_tensors(NETWORK, "partials.safetensors"), 0
    within(network().rope.freqs, tensors["rope_freqs"], 1e-7)
    for name, want in tensors.items():
        if match := re.fullmatch(r"pos_embed_h(\d+)_w(\d+)_px(\d+)x(\d+)", name):
            rows, columns, height, width = (int(v) for v in match.groups())
            side = network().config.input_sq_size
            got = position_embedding(
                rows, columns, want.shape[-1], height=height, pixel_width=width, input_sq_size=side, like=want
            )
            within(got[None], want, 1e-6)
            seen += 1
    assert seen


def test_network_full_size_keys() -> None:
    want = golden_json(NETWORK, "full_size_keys.json")
    with torch.device("meta"):
        net = STDiT3(STDiT3Config.of(want["config"]))
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == want["state_dict_shapes"]
    # The original counts the rotary frequencies as parameters; here they are a buffer, which LoRA and optimisers
    # leave alone.
    assert sum(p.numel() for p in net.parameters()) + net.rope.freqs.numel() == want["n_params"]


# ----------------------------------------------------------------------------------------------------------- the VAE


def vae_cases() -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    tensors = nested(golden_tensors(VAE, "cases.safetensors"))
    cases = [(case, tensors[case["case"]]) for case in golden_json(VAE, "config.json")["cases"]]
    assert cases and len(cases) == len(tensors)
    return cases


def test_vae_encodes() -> None:
    net = vae()
    for _, f in vae_cases():
        within(net.spatial_encode(f["video"]), f["spatial_latent_mode"], 5e-5)
        first = f["spatial_latent_mode"][:, :, : net.config.chunk_frames]
        within(net.temporal_vae.moments(first), f["temporal_moments_first_chunk"], 5e-5)
        within(net.encode(f["video"]), f["latent_mode"], 5e-5)


def test_vae_decodes() -> None:
    net = vae()
    for _, f in vae_cases():
        frames = f["video"].shape[2]
        cells = net.temporal_decode(f["z"], frames)
        within(cells, f["spatial_latent_decoded"], 5e-5)
        within(net.spatial_decode(cells), f["decoded"], 5e-5)
        last = net.temporal_decode(f["z"], frames, [frames - 1])
        within(last[:, :, -1], f["spatial_latent_decoded"][:, :, -1], 5e-5)


def test_vae_latent_sizes() -> None:
    config, seen = vae_config(), 0
    for case in golden_json(VAE, "config.json")["cases"]:
        assert list(config.latent_size(*case["video"][2:])) == case["latent_size"]
    for name, want in golden_json(VAE, "config.json")["latent_size_table"].items():
        assert list(config.latent_size(*(int(v) for v in name.split("x")))) == want
        seen += 1
    assert seen


def test_vae_full_size_keys() -> None:
    config = golden_json(VAE, "config.json")
    with torch.device("meta"):
        net = OpenSoraVAE(vae_config(small=False))
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == golden_json(VAE, "full_size_keys.json")
    assert sum(p.numel() for p in net.temporal_vae.parameters()) == config["full_params"]["temporal"]
    assert sum(p.numel() for p in net.spatial_vae.parameters()) == config["full_params"]["spatial"]
    assert vae_config(small=False).temporal == TemporalVAEConfig()  # what the loader builds


# ------------------------------------------------------------------------------------------------------ trajectories


class Sampler:
    """One run of the reference: the network, guidance and tables of this package on its inputs.

    Videos of a batch may differ in frame rate and in the size that the noise grid follows. The size that positions
    follow is the first one's for all, as in the original network.
    """

    def __init__(self, run: dict[str, Any], inputs: dict[str, Tensor], r: dict[str, Tensor]) -> None:
        self.run, self.r, self.mask = run, r, inputs["mask"]
        self.y, self.null = (
            inputs["y"].flatten(1, 2),
            network().y_embedder.y_embedding.expand_as(inputs["y"].flatten(1, 2)),
        )
        self.size: dict[str, Any] = {name: float(inputs[name][0]) for name in ("height", "width")}
        self.size["fps"] = inputs["fps"].repeat(2)
        sizes = zip(*(inputs[name].tolist() for name in ("num_frames", "height", "width")), strict=True)
        schedules = [
            release_schedule(int(f), int(h), int(w)) if run["timestep_transform"] else FlowSchedule()
            for f, h, w in sizes
        ]
        self.tables = [schedule.table(run["steps"], "flow_ode") for schedule in schedules]

    def free(self, k: int) -> Tensor | None:
        return self.r["x_mask"][k][:, None, :, None, None] if "x_mask" in self.r else None

    def actions(self, z: Tensor, k: int, t: Tensor) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional flow at step k and t [B], as one doubled batch."""
        condition = {"text": torch.cat([self.y, self.null]), "mask": torch.cat([self.mask, self.mask])}
        if "x_mask" in self.r:
            condition["x_mask"] = self.r["x_mask"][k].repeat(2, 1)
        a_c, a_u = call_stdit3(network(), torch.cat([z, z]), torch.cat([t, t]), condition, **self.size).chunk(2)
        return a_c, a_u

    def advance(self, z: Tensor, k: int) -> Tensor:
        a_c, a_u = self.actions(z, k, torch.stack([table.timesteps[k] for table in self.tables]).float())
        a, free, at = a_u + self.run["cfg"] * (a_c - a_u), self.free(k), torch.tensor([k])
        rows = [slice(row, row + 1) for row in range(len(z))]
        masks = [None if free is None else free[row] for row in rows]
        every = zip(self.tables, rows, masks, strict=True)
        return torch.cat([step(table, z[row], a[row], at, mask) for table, row, mask in every])


def samplers() -> list[Sampler]:
    tensors = nested(golden_tensors(FLOW, "trajectories.safetensors"))
    runs = [Sampler(run, tensors["inputs"], tensors[run["run"]]) for run in golden_json(FLOW, "runs.json")["runs"]]
    assert runs
    return runs


def test_velocities_along_the_trajectories() -> None:
    """At the reference's own states and times; this package's actions point the other way."""
    for sampler in samplers():
        for k in range(sampler.run["steps"]):
            a_c, a_u = sampler.actions(sampler.r["z"][k], k, sampler.r["t"][k])
            within(a_c, -sampler.r["v_cond"][k], 2e-5)
            within(a_u, -sampler.r["v_uncond"][k], 2e-5)


def test_free_running_trajectories() -> None:
    for sampler in samplers():
        z = sampler.r["z"][0]
        for k in range(sampler.run["steps"]):
            z = sampler.advance(z, k)
        within(z, sampler.r["sample"], 1e-4)
