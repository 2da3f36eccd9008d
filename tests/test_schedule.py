"""Noise schedules and grids: closed forms, diffusers' schedulers, and clear refusals."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from torch import Tensor

from vdm_env.samplers import check_scheduler_config, refuse_sampler
from vdm_env.schedule import (
    EDMSchedule,
    FlowSchedule,
    Schedule,
    VPSchedule,
    ddim_timesteps,
    flow_sigmas,
    flow_sigmas_double_shift,
    karras_sigmas,
    latent_scale_lvdm,
    lcm_timesteps,
    linear_alphas_cumprod,
    make_table,
    opensora_shift,
    opensora_timesteps,
    rescale_zero_terminal_snr,
    scaled_linear_alphas_cumprod,
    snr_shift,
)
from vdm_env.transition import TransitionTable, predict_x0, step

ALPHAS = scaled_linear_alphas_cumprod()
ZERO_SNR = rescale_zero_terminal_snr(snr_shift(ALPHAS, 3.0))

SCHEDULES: dict[str, Schedule] = {
    "epsilon": VPSchedule(alphas_cumprod=ALPHAS),
    "v": VPSchedule(alphas_cumprod=ALPHAS, prediction="v"),
    "x0": VPSchedule(alphas_cumprod=ALPHAS, prediction="x0"),
    "lvdm": VPSchedule(alphas_cumprod=ALPHAS, latent_scale=latent_scale_lvdm(), spacing="lvdm"),
    "zero-snr": VPSchedule(
        alphas_cumprod=ZERO_SNR, prediction="v", spacing="trailing", steps_offset=0, final_alpha_cumprod=1.0
    ),
    "flow": FlowSchedule(shift=3.0),
    "edm": EDMSchedule(),
}


def close(got: Tensor, want: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean_and_noise(batch: int = 6) -> tuple[Tensor, Tensor]:
    g = generator()
    return (torch.randn(batch, 4, 3, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


# -------------------------------------------------------------------------------------------------------- alphas


def test_alphas_are_those_of_diffusers() -> None:
    scaled = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    linear = diffusers.DDIMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    close(ALPHAS, scaled.alphas_cumprod, 1e-6)
    close(linear_alphas_cumprod(), linear.alphas_cumprod, 1e-6)


@pytest.mark.parametrize("shift_scale", [1.0, 3.0])
def test_cogvideox_alphas(shift_scale: float) -> None:
    theirs = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=shift_scale, rescale_betas_zero_snr=True)
    ours = rescale_zero_terminal_snr(snr_shift(ALPHAS, shift_scale))
    close(ours, theirs.alphas_cumprod, 2e-6)
    assert float(ours[-1]) == 0.0
    assert float(ours[0]) == pytest.approx(float(snr_shift(ALPHAS, shift_scale)[0]), rel=1e-12)


def test_snr_shift_divides_the_signal_to_noise_ratio() -> None:
    shifted = snr_shift(ALPHAS, 3.0)
    close((ALPHAS / (1 - ALPHAS)) / (shifted / (1 - shifted)), torch.full_like(ALPHAS, 3.0), 1e-9)


def test_latent_scale() -> None:
    s = latent_scale_lvdm()
    assert s.shape == (1000,) and float(s[0]) == 1.0
    assert bool((s[399:] == 0.7).all()) and float(s[398]) > 0.7


# --------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [1, 4, 7, 10, 30, 50])
def test_ddim_grid_is_that_of_diffusers(spacing: str, n: int) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(n)
    assert ddim_timesteps(1000, n, spacing=spacing).tolist() == scheduler.timesteps.tolist()


def test_lvdm_grid_may_be_longer_than_asked() -> None:
    assert [len(ddim_timesteps(1000, n, spacing="lvdm")) for n in (50, 30, 6)] == [50, 31, 7]
    assert ddim_timesteps(1000, 6, spacing="lvdm").tolist() == [997, 831, 665, 499, 333, 167, 1]
    assert SCHEDULES["lvdm"].table(30, "ddim").num_steps == 31


def test_flow_grid_is_that_of_diffusers_with_explicit_sigmas() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 20, 20).tolist())
    close(flow_sigmas(20, 3.0), scheduler.sigmas, 1e-6)
    close(FlowSchedule(shift=3.0).table(20, "flow_ode").timesteps, scheduler.timesteps, 1e-3)


@pytest.mark.parametrize(("n", "shift"), [(10, 3.0), (50, 3.0), (16, 5.0)])
def test_double_shift_reproduces_the_default_of_diffusers(n: int, shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n)
    close(flow_sigmas_double_shift(n, shift), scheduler.sigmas, 1e-6)


def test_double_shift_published_numbers() -> None:
    want = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0]
    close(flow_sigmas_double_shift(10, 3.0), torch.tensor(want), 6e-7)
    assert float(1000 * flow_sigmas_double_shift(50, 3.0)[-2]) == pytest.approx(8.9, abs=0.05)
    assert float(1000 * flow_sigmas(50, 3.0)[-2]) == pytest.approx(57.7, abs=0.05)


def test_opensora_shift() -> None:
    assert opensora_shift(240, 426, 51) == pytest.approx(2.4187, abs=5e-5)
    assert opensora_shift(240, 426, 1) == pytest.approx(0.6245, abs=5e-5)
    r = opensora_shift(240, 426, 51)
    close(opensora_timesteps(30, 240, 426, 51) / 1000, flow_sigmas(30, r)[:-1], 1e-12)
    coarse = opensora_timesteps(30, 240, 426, 51, dtype=torch.bfloat16) - opensora_timesteps(30, 240, 426, 51)
    assert 0 < float(coarse.abs().max()) < 1.0
    with pytest.raises(ValueError, match="17 frames"):
        opensora_shift(240, 426, 5)


def test_karras_grid_is_that_of_diffusers() -> None:
    scheduler = svd_scheduler(25)
    close(karras_sigmas(25), scheduler.sigmas, 1e-6, 1e-5)
    table = EDMSchedule().table(25, "euler")
    close(table.timesteps, scheduler.timesteps, 1e-5)
    assert float(table.timesteps[0]) == pytest.approx(1.638, abs=1e-3)
    assert float(table.timesteps[-1]) == pytest.approx(-1.554, abs=1e-3)


def svd_scheduler(n: int) -> diffusers.EulerDiscreteScheduler:
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        interpolation_type="linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    scheduler.set_timesteps(n)
    return scheduler


def test_lcm_grid_is_that_of_t2v_turbo() -> None:
    assert lcm_timesteps(4).tolist() == [999, 759, 519, 279]
    assert lcm_timesteps(8).tolist() == [999, 879, 759, 639, 519, 399, 279, 159]
    assert lcm_timesteps(1).tolist() == [999]


@pytest.mark.parametrize("n", [0, -1, 2.5])
def test_zero_or_broken_step_counts_are_refused(n: float) -> None:
    for grid in (flow_sigmas, karras_sigmas, lcm_timesteps, lambda m: ddim_timesteps(1000, m)):
        with pytest.raises(ValueError, match="num_steps"):
            grid(n)  # type: ignore[arg-type, operator]
    for name, schedule in SCHEDULES.items():
        with pytest.raises(ValueError, match="num_steps"):
            schedule.table(n, schedule.samplers[0])  # type: ignore[arg-type]
        assert name


def test_grids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        ddim_timesteps(1000, 1000, spacing="lvdm")
    with pytest.raises(ValueError, match="at most 1000"):
        ddim_timesteps(1000, 1001)
    with pytest.raises(ValueError, match="at most 50"):
        lcm_timesteps(51)
    with pytest.raises(ValueError, match="lvdm, leading"):
        ddim_timesteps(1000, 10, spacing="even")
    with pytest.raises(ValueError, match="shift"):
        flow_sigmas(10, 0.0)
    with pytest.raises(ValueError, match="sigma_min"):
        karras_sigmas(10, sigma_min=0.0)


# ------------------------------------------------------------------------------------------- noising at any t


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_perfect_output_gives_back_the_clean_latents(name: str) -> None:
    schedule = SCHEDULES[name]
    x0, noise = clean_and_noise()
    t = schedule.sample_timesteps(6, generator())
    x_t = schedule.add_noise(x0, noise, t)
    assert x_t.dtype == torch.float64
    close(schedule.x0_from(x_t, schedule.target(x0, noise, t), t), x0, 1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_grid_and_training_speak_of_the_same_noise(name: str) -> None:
    """At the table's own timesteps, a perfect output gives the clean latents back through predict_x0 as well."""
    schedule = SCHEDULES[name]
    table = schedule.table(6, schedule.samplers[0])
    n = table.num_steps
    x0, noise = clean_and_noise(n)
    t = table.timesteps.round().long() if isinstance(schedule, VPSchedule) else table.timesteps
    x_t = schedule.add_noise(x0, noise, t)
    close(predict_x0(table, x_t, schedule.target(x0, noise, t), torch.arange(n)), x0, 1e-9)
    close(schedule.input_scale(t), table.input_scale, 1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_deterministic_steps_walk_along_the_noising(name: str) -> None:
    """With a perfect output, a noiseless step from x_t lands on the x of the next timestep."""
    schedule = SCHEDULES[name]
    table = schedule.table(6, schedule.samplers[0], 0.0)
    n = table.num_steps
    x0, noise = clean_and_noise(n)
    t = table.timesteps.round().long() if isinstance(schedule, VPSchedule) else table.timesteps
    x_t, a = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    after = step(table, x_t, a, torch.arange(n))
    close(after[:-1], schedule.add_noise(x0[:-1], noise[:-1], t[1:]), 1e-9)
    last = torch.zeros(1, dtype=torch.long)
    if not isinstance(schedule, VPSchedule) or schedule.final_alpha_cumprod == 1.0:
        close(after[-1:], x0[-1:], 1e-9)
    else:
        close(after[-1:], schedule.add_noise(x0[-1:], noise[-1:], last), 1e-9)


def test_noising_is_that_of_diffusers() -> None:
    x0, noise = clean_and_noise()
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    for prediction, theirs in (("epsilon", "epsilon"), ("v", "v_prediction")):
        scheduler = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=theirs
        )
        ours = VPSchedule(alphas_cumprod=ALPHAS, prediction=prediction)
        close(ours.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), 2e-6)
        if prediction == "v":
            close(ours.target(x0, noise, t), scheduler.get_velocity(x0, noise, t), 2e-6)


def test_flow_noising_and_target() -> None:
    x0, noise = clean_and_noise(2)
    t = torch.tensor([250.0, 1000.0])
    x_t = FlowSchedule().add_noise(x0, noise, t)
    close(x_t[0], 0.75 * x0[0] + 0.25 * noise[0], 1e-12)
    close(x_t[1], noise[1], 1e-12)
    close(FlowSchedule().target(x0, noise, t), noise - x0, 0)


def test_edm_noising_is_scaled_v_prediction() -> None:
    """x / sqrt(sigma^2 + 1) is the variance-preserving latent, and the output its v."""
    x0, noise = clean_and_noise(3)
    sigma = torch.tensor([0.01, 1.0, 500.0], dtype=torch.float64)
    schedule = EDMSchedule()
    t = 0.25 * sigma.log()
    close(schedule.add_noise(x0, noise, t), x0 + sigma.view(-1, 1, 1, 1, 1) * noise, 1e-9)
    alpha = (1 / (sigma.square() + 1)).view(-1, 1, 1, 1, 1)
    close(schedule.target(x0, noise, t), alpha.sqrt() * noise - (1 - alpha).sqrt() * x0, 1e-9)


def test_initial_latents_have_the_standard_deviation_of_the_first_step() -> None:
    x0, noise = clean_and_noise(1)
    for schedule in SCHEDULES.values():
        table = schedule.table(5, schedule.samplers[0])
        t = table.timesteps[:1]
        scale = float(schedule.add_noise(torch.zeros_like(x0), noise, t).std() / noise.std())
        assert scale == pytest.approx(schedule.init_sigma, rel=0.03)  # "leading" starts a little below T-1


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_timesteps_are_reproducible_and_in_range(name: str) -> None:
    schedule = SCHEDULES[name]
    t = schedule.sample_timesteps(2000, generator(3))
    assert torch.equal(t, schedule.sample_timesteps(2000, generator(3)))
    if isinstance(schedule, VPSchedule):
        assert t.dtype == torch.int64 and int(t.min()) >= 0 and int(t.max()) < 1000
        assert float(t.double().mean()) == pytest.approx(499.5, abs=20)
    elif isinstance(schedule, FlowSchedule):
        assert float(t.min()) > 0 and float(t.max()) <= 1000
        assert float(t.median()) == pytest.approx(750, abs=20)  # shift 3 sends 1/2 to 3/4
    else:
        assert float((4 * t).mean()) == pytest.approx(1.0, abs=0.12)
        assert float((4 * t).std()) == pytest.approx(1.6, abs=0.1)


def test_bad_timesteps_are_refused() -> None:
    x0, noise = clean_and_noise(2)
    with pytest.raises(ValueError, match="0 .. 999"):
        SCHEDULES["v"].add_noise(x0, noise, torch.tensor([5, 1000]))
    with pytest.raises(ValueError, match="whole numbers"):
        SCHEDULES["v"].add_noise(x0, noise, torch.tensor([5.5, 6.0]))
    with pytest.raises(ValueError, match="1000"):
        FlowSchedule().add_noise(x0, noise, torch.tensor([5.0, 1001.0]))
    with pytest.raises(ValueError, match="one per sample"):
        SCHEDULES["v"].add_noise(x0, noise, torch.tensor([5]))


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="zero terminal SNR"):
        VPSchedule(alphas_cumprod=ZERO_SNR)
    with pytest.raises(ValueError, match="epsilon.*v.*x0"):
        VPSchedule(alphas_cumprod=ALPHAS, prediction="flow")
    with pytest.raises(ValueError, match="latent_scale"):
        VPSchedule(alphas_cumprod=ALPHAS, latent_scale=torch.ones(999))
    with pytest.raises(ValueError, match="non-increasing"):
        VPSchedule(alphas_cumprod=ALPHAS.flip(0))
    with pytest.raises(ValueError, match="shift"):
        FlowSchedule(shift=0.0)
    with pytest.raises(ValueError, match="sigma_min"):
        EDMSchedule(sigma_min=1.0, sigma_max=0.5)


# ------------------------------------------------------------------------------------------------ choosing a sampler


def test_every_family_gives_a_table_for_each_of_its_samplers() -> None:
    for schedule in SCHEDULES.values():
        for sampler in schedule.samplers:
            table = make_table(schedule, 5, sampler)
            assert isinstance(table, TransitionTable) and table.num_steps >= 5
            assert bool((table.action_std[table.stochastic] > 0).all())
            assert math.isfinite(float(table.A.abs().sum()))


@pytest.mark.parametrize("name", ["epsilon", "flow", "edm"])
def test_unfitting_samplers_name_the_fitting_ones(name: str) -> None:
    schedule = SCHEDULES[name]
    for sampler in {"ddim", "flow_grpo", "euler", "nonsense"} - set(schedule.samplers):
        with pytest.raises(ValueError, match=", ".join(schedule.samplers)):
            schedule.table(5, sampler)


@pytest.mark.parametrize(
    "sampler",
    [
        "dpm++",
        "DPM++ 2M Karras",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "CogVideoXDPMScheduler",
        "unipc",
        "UniPCMultistepScheduler",
        "heun",
        "FlowMatchHeunDiscreteScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "DEISMultistepScheduler",
        "KDPM2DiscreteScheduler",
        "euler_churn",
    ],
)
def test_multistep_and_higher_order_samplers_are_refused(sampler: str) -> None:
    with pytest.raises(ValueError, match="refused.*first-order"):
        refuse_sampler(sampler)
    for schedule in (SCHEDULES["epsilon"], SCHEDULES["flow"], SCHEDULES["edm"]):
        with pytest.raises(ValueError, match="refused"):
            schedule.table(5, sampler)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "DDPMScheduler", "lcm", "flow_ode", "cps", "dance", "euler"])
def test_first_order_samplers_are_not_refused(sampler: str) -> None:
    refuse_sampler(sampler)


def test_non_affine_scheduler_options_are_refused() -> None:
    for option in ("clip_sample", "thresholding"):
        with pytest.raises(ValueError, match=f"{option}=True.*not affine"):
            check_scheduler_config({option: True})
        check_scheduler_config({option: False})
    with pytest.raises(ValueError, match="churn"):
        check_scheduler_config({"s_churn": 0.5})
    check_scheduler_config(dict(diffusers.DDIMScheduler(clip_sample=False).config))


def test_samplers_without_a_noise_level_refuse_one() -> None:
    with pytest.raises(ValueError, match="no noise"):
        SCHEDULES["flow"].table(5, "flow_ode", 0.5)
    with pytest.raises(ValueError, match="fixed"):
        SCHEDULES["edm"].table(5, "euler", 0.5)
    with pytest.raises(ValueError, match="fixed"):
        SCHEDULES["epsilon"].table(5, "lcm", 0.5)
    assert SCHEDULES["epsilon"].table(5, "lcm", 1.0).num_steps == 5
