"""The transition tables against the original samplers: VideoCrafter2's DDIM, Open-Sora 1.2's flow, T2V-Turbo's LCM.

Shapes, step counts, guidance and names are read from the reference files, so any other set of the same layout works.
"""

from __future__ import annotations

import re

import pytest
import torch
from golden import golden_json, golden_tensors, nested
from torch import Tensor

from vdm_env.samplers import ddim_table, flow_table, lcm_table
from vdm_env.schedule import (
    FlowSchedule,
    VPSchedule,
    ddim_timesteps,
    flow_sigmas,
    latent_scale_lvdm,
    lcm_timesteps,
    opensora_shift,
    opensora_timesteps,
    scaled_linear_alphas_cumprod,
)
from vdm_env.transition import TransitionTable, log_prob, predict_x0, step

pytestmark = pytest.mark.golden

VC2, OPENSORA, TURBO = "videocrafter2_ddim", "opensora_v12_rflow", "t2v_turbo_vc2"


def steps(k: int, like: Tensor) -> Tensor:
    return torch.full((len(like),), k)


def noisy_action(table: TransitionTable, k: int, mean: Tensor, noise: Tensor) -> Tensor:
    """The action that carries given noise of x': a_mean + (sigma / B) z."""
    return mean + float(table.sigma[k] / table.B[k]) * noise


def within(got: Tensor, want: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol)


LARGE = 200.0
"""Latents of the runs that the tolerances of DDIM were stated for; rounding of float32 grows with larger ones."""


def growing(atol: float, *values: Tensor) -> float:
    return atol * max(1.0, *(float(value.abs().max()) / LARGE for value in values))


ROUNDING = 2.0**-23
"""of float32, relative: the original keeps the buffers of its schedule in it"""


def rounding(*values: Tensor) -> float:
    """What buffers of this size may differ by that were rounded to float32 once; at least that of numbers up to 1/2."""
    return ROUNDING * max(0.5, *(float(value.abs().max()) for value in values))


# ----------------------------------------------------------------------------------------- VideoCrafter2, DDIM


def vc2_schedule(use_scale: bool) -> VPSchedule:
    p = golden_json(VC2, "runs.json")["params"]
    scale = latent_scale_lvdm(p["timesteps"], p["scale_b"], p["mid_step"]) if use_scale else None
    return VPSchedule(
        alphas_cumprod=scaled_linear_alphas_cumprod(p["timesteps"], p["linear_start"], p["linear_end"]),
        latent_scale=scale,
        spacing="lvdm",
    )


def vc2_table(run: dict) -> TransitionTable:
    return vc2_schedule(run["use_scale"]).table(run["S"], "ddim", run["eta"])


def vc2_runs() -> list[tuple[dict, dict[str, Tensor]]]:
    tensors = nested(golden_tensors(VC2, "trajectories.safetensors"))
    runs = [(run, tensors[run["run"]]) for run in golden_json(VC2, "runs.json")["runs"]]
    assert runs
    return runs


def vc2_eps(run: dict, r: dict[str, Tensor], k: int) -> Tensor:
    if run["cfg"] == 1:
        return r["eps_cond"][k]
    return r["eps_uncond"][k] + run["cfg"] * (r["eps_cond"][k] - r["eps_uncond"][k])


def test_videocrafter2_schedule() -> None:
    want = golden_tensors(VC2, "schedule.safetensors")
    schedule = vc2_schedule(use_scale=True)
    within(schedule.alphas_cumprod, want["alphas_cumprod"], rounding(want["alphas_cumprod"]))
    scales = [tensor for name, tensor in want.items() if name.startswith("scale_arr")]
    assert scales and schedule.latent_scale is not None
    for scale in scales:
        within(schedule.latent_scale, scale[: schedule.num_train_timesteps], rounding(scale))
    grids = [match for name in want if (match := re.fullmatch(r"S(\d+)\.timesteps", name))]
    sigmas = [match for name in want if (match := re.fullmatch(r"S(\d+)\.sigmas_eta([\d.p]+)", name))]
    assert grids and sigmas
    for match in grids:
        t = ddim_timesteps(schedule.num_train_timesteps, int(match[1]), spacing="lvdm")
        assert t.flip(0).tolist() == want[match[0]].tolist()
    for match in sigmas:
        eta = float(match[2].replace("p", "."))
        within(schedule.table(int(match[1]), "ddim", eta).sigma.flip(0), want[match[0]], 1e-6)


def test_videocrafter2_alphas_and_scales_of_each_grid() -> None:
    """Before and after every step; after the last one the first training alpha, and no scale."""
    want, seen = golden_tensors(VC2, "schedule.safetensors"), 0
    schedule = vc2_schedule(use_scale=True)
    assert schedule.latent_scale is not None
    for name, values in want.items():
        if not (match := re.fullmatch(r"S(\d+)\.(alphas|scale)(_prev)?", name)):
            continue
        t = want[f"S{match[1]}.timesteps"]
        ours = {"alphas": schedule.alphas_cumprod, "scale": schedule.latent_scale}[match[2]]
        at = ours[t] if match[3] is None else torch.cat([ours[:1], ours[t[:-1]]])
        within(at, values, rounding(values))
        seen += 1
    assert seen


def test_videocrafter2_steps_and_clean_estimates() -> None:
    for run, r in vc2_runs():
        table = vc2_table(run)
        assert table.timesteps.tolist() == r["t"].tolist() == run["timesteps"]
        within(table.sigma, r["sigma"], rounding(r["sigma"]))
        assert bool(table.stochastic.all()) == (run["eta"] > 0)
        for k in range(run["n_steps"]):
            x, eps = r["x_t"][k], vc2_eps(run, r, k)
            atol = growing(2e-4, x, eps)
            within(step(table, x, eps, steps(k, x)), r["mean"][k], atol)
            within(predict_x0(table, x, eps, steps(k, x)), r["pred_x0"][k], atol, 1e-5)
            within(step(table, x, noisy_action(table, k, eps, r["noise"][k]), steps(k, x)), r["x_prev"][k], atol)


def test_videocrafter2_log_prob_in_nats() -> None:
    checked = 0
    for run, r in vc2_runs():
        if "logprob_sum" not in r:
            continue
        table = vc2_table(run)
        for k in range(run["n_steps"]):
            x, eps = r["x_t"][k], vc2_eps(run, r, k)
            got = log_prob(table, x, eps, r["x_prev"][k], steps(k, x), reduction="sum")
            assert got.dtype == torch.float64
            within(got, r["logprob_sum"][k], 0, 1e-5)
            per_element = log_prob(table, x, eps, r["x_prev"][k], steps(k, x))
            within(per_element, r["logprob_sum"][k] / x[0].numel(), 1e-6, 1e-5)
            checked += 1
    assert checked


def test_videocrafter2_whole_chain() -> None:
    x_start = golden_tensors(VC2, "trajectories.safetensors")["inputs.x_T"]
    for run, r in vc2_runs():
        table, x = vc2_table(run), x_start
        for k in range(run["n_steps"]):
            eps = vc2_eps(run, r, k)
            x = step(table, x, noisy_action(table, k, eps, r["noise"][k]), steps(k, x))
        within(x, r["sample"], growing(2e-2, r["x_t"]))


def test_videocrafter2_samples_may_be_at_different_steps() -> None:
    run, r = vc2_runs()[-1]
    table = vc2_table(run)
    k = torch.arange(run["n_steps"])
    eps = torch.stack([vc2_eps(run, r, int(i))[0] for i in k])
    within(step(table, r["x_t"][:, 0], eps, k), r["mean"][:, 0], growing(2e-4, r["x_t"], eps))


def test_videocrafter2_latent_scale_matters() -> None:
    """Without s_t the same steps are wrong by the order of the signal, below the ramp's end only."""
    ramp_end = golden_json(VC2, "runs.json")["params"]["mid_step"]
    for run, r in vc2_runs():
        if not run["use_scale"]:
            continue
        plain = vc2_schedule(use_scale=False).table(run["S"], "ddim", run["eta"])
        on_ramp = [i for i, t in enumerate(run["timesteps"]) if t < ramp_end and i + 1 < run["n_steps"]]
        wrong = [
            (step(plain, r["x_t"][k], vc2_eps(run, r, k), steps(k, r["x_t"][k])) - r["mean"][k]).abs().max()
            / r["mean"][k].std()
            for k in on_ramp
        ]
        assert not wrong or max(wrong) > 0.01


# ------------------------------------------------------------------------------------------- Open-Sora, flow


def opensora_runs() -> list[tuple[dict, dict[str, Tensor]]]:
    tensors = nested(golden_tensors(OPENSORA, "trajectories.safetensors"))
    runs = [(run, tensors[run["run"]]) for run in golden_json(OPENSORA, "runs.json")["runs"]]
    assert runs
    return runs


def opensora_tables(run: dict) -> list[TransitionTable]:
    """One table per sample: their sizes, hence their shifts, may differ."""
    inputs = nested(golden_tensors(OPENSORA, "trajectories.safetensors"))["inputs"]
    sizes = torch.stack([inputs[name].double() for name in ("height", "width", "num_frames")], 1).tolist()
    shifts = [opensora_shift(*size) if run["timestep_transform"] else 1.0 for size in sizes]
    return [FlowSchedule(shift=shift).table(run["steps"], "flow_ode") for shift in shifts]


def opensora_step(tables: list[TransitionTable], z: Tensor, a: Tensor, k: int, mask: Tensor | None) -> Tensor:
    rows = [slice(i, i + 1) for i in range(len(z))]
    return torch.cat(
        [step(t, z[i], a[i], k, None if mask is None else mask[i]) for t, i in zip(tables, rows, strict=True)]
    )


def opensora_action(run: dict, r: dict[str, Tensor], k: int) -> Tensor:
    """Open-Sora's velocity is data - noise, ours noise - data."""
    return -(r["v_uncond"][k] + run["cfg"] * (r["v_cond"][k] - r["v_uncond"][k]))


def holds_frames(r: dict[str, Tensor]) -> bool:
    """Whether a run keeps some frames as they are given."""
    return "x_mask" in r and not bool(r["x_mask"].all())


def opensora_mask(r: dict[str, Tensor], k: int) -> Tensor | None:
    return r["x_mask"][k][:, None, :, None, None] if "x_mask" in r else None


def test_opensora_timesteps() -> None:
    for run, r in opensora_runs():
        within(torch.stack([table.timesteps for table in opensora_tables(run)], 1), r["t"], 2e-3)
    schedules = golden_tensors(OPENSORA, "schedules.safetensors")
    assert schedules
    for name, want in schedules.items():
        match = re.fullmatch(r"h(\d+)_w(\d+)_f(\d+)_s(\d+)_(fp32|bf16)", name)
        assert match, name
        height, width, frames, n = (int(v) for v in match.groups()[:4])
        if match[5] == "fp32":
            within(opensora_timesteps(n, height, width, frames), want, 2e-3)
        else:
            within(opensora_timesteps(n, height, width, frames, dtype=torch.bfloat16), want, 2e-3)


def test_opensora_steps() -> None:
    masked, some = 0, False
    for run, r in opensora_runs():
        tables = opensora_tables(run)
        assert not any(table.stochastic.any() for table in tables)
        some = some or holds_frames(r)
        for k in range(run["steps"]):
            z, mask = r["z"][k], opensora_mask(r, k)
            after = r["z"][k + 1] if k + 1 < run["steps"] else r["sample"]
            got = opensora_step(tables, z, opensora_action(run, r, k), k, mask)
            within(got, after, 1e-5)
            if mask is not None and not mask.all():
                held = ~mask.expand_as(z)
                assert torch.equal(got[held], z[held])
                masked += 1
    assert masked or not some


def test_opensora_whole_chain() -> None:
    for run, r in opensora_runs():
        tables, x = opensora_tables(run), r["z"][0]
        for k in range(run["steps"]):
            x = opensora_step(tables, x, opensora_action(run, r, k), k, opensora_mask(r, k))
        within(x, r["sample"], 1e-4)


def test_opensora_add_noise() -> None:
    f = golden_tensors(OPENSORA, "add_noise.safetensors")
    within(FlowSchedule().add_noise(f["x0"], f["noise"], f["t"]), f["noised"], 1e-6)


def test_opensora_log_prob_is_that_of_the_free_frames() -> None:
    """Image-to-video with exploration: held frames stay and do not count."""
    for run, r in opensora_runs():
        if not holds_frames(r):
            continue
        sigmas = torch.cat([opensora_tables(run)[0].timesteps / 1000, torch.zeros(1, dtype=torch.float64)])
        table = flow_table(sigmas, kind="dance", noise_level=0.3)
        z, a, mask = r["z"][0][:1], opensora_action(run, r, 0)[:1], opensora_mask(r, 0)
        assert mask is not None
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        after = step(table, z, noisy_action(table, 0, a, noise), steps(0, z), mask[:1])
        free = mask[0, 0, :, 0, 0]
        got = log_prob(table, z, a, after, steps(0, z), mask[:1], "sum")
        want = log_prob(table, z[:, :, free], a[:, :, free], after[:, :, free], steps(0, z), reduction="sum")
        within(got, want, 0, 1e-6)


# ------------------------------------------------------------------------------------------- T2V-Turbo, LCM


def turbo_runs() -> list[dict[str, Tensor]]:
    tensors = nested(golden_tensors(TURBO, "cases.safetensors"))
    runs = [tensors[run["run"]] for run in golden_json(TURBO, "config.json")["runs"]]
    assert runs
    return runs


def test_turbo_grids() -> None:
    want = golden_tensors(TURBO, "schedules.safetensors")
    grids = [match for name in want if (match := re.fullmatch(r"n(\d+)_origin(\d+)", name))]
    assert grids
    for match in grids:
        got = lcm_timesteps(int(match[1]), int(match[2]), len(want["alphas_cumprod"]))
        assert got.tolist() == want[match[0]].tolist()


def test_turbo_boundary_coefficients() -> None:
    """The clean estimate c_skip x + c_out x0 at every training timestep."""
    want = golden_tensors(TURBO, "schedules.safetensors")
    alpha, (c_skip, c_out) = want["alphas_cumprod"].flip(0), want["c_skip_c_out"].flip(0).unbind(1)
    table = lcm_table(want["alphas_cumprod"], torch.arange(len(alpha)).flip(0))
    within(table.x0_A, c_skip + c_out / alpha.sqrt(), 1e-9, 1e-6)
    within(table.x0_B, -c_out * ((1 - alpha) / alpha).sqrt(), 1e-9, 1e-6)


def test_turbo_steps() -> None:
    alphas = golden_tensors(TURBO, "schedules.safetensors")["alphas_cumprod"]
    for r in turbo_runs():
        table, n = lcm_table(alphas, r["t"]), len(r["t"])
        assert table.stochastic.tolist() == [True] * (n - 1) + [False]
        atol = 1e-5 * max(1.0, float(r["x_t"].abs().max()), float(r["denoised"].abs().max()))
        for k in range(n):
            x, eps = r["x_t"][k], r["eps"][k]
            within(predict_x0(table, x, eps, steps(k, x)), r["denoised"][k], atol)
            if k + 1 < n:
                a = noisy_action(table, k, eps, r["noise"][k])
                within(step(table, x, a, steps(k, x)), r["x_prev"][k], atol)
            else:
                within(step(table, x, eps, steps(k, x)), r["final_denoised"], atol)


def test_flow_grid_is_the_uniform_one_shifted() -> None:
    """The grid of the runs without a shift is (n - k) / n; used above through FlowSchedule."""
    for run, r in opensora_runs():
        if not run["timestep_transform"]:
            within(1000 * flow_sigmas(run["steps"])[:-1, None].expand_as(r["t"]), r["t"], 1e-3)


def test_ddim_of_the_reference_alphas_is_the_same_table() -> None:
    """Tables from the stored alphas and from our own schedule agree, so neither hides behind the other."""
    want = golden_tensors(VC2, "schedule.safetensors")
    for run, r in vc2_runs():
        if run["use_scale"]:
            continue
        stored = ddim_table(want["alphas_cumprod"], r["t"], eta=run["eta"], prediction="epsilon")
        ours = vc2_table(run)
        for column in ("A", "B", "sigma", "x0_A", "x0_B"):
            within(getattr(ours, column), getattr(stored, column), 1e-6)
