"""The denoising step as a Gaussian policy: closed forms, published numbers, diffusers' samplers, refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import diffusers
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from vdm_env.samplers import ddim_table, edm_ancestral_table, edm_euler_table, flow_table, lcm_table
from vdm_env.schedule import (
    ddim_timesteps,
    flow_sigmas,
    flow_sigmas_double_shift,
    karras_sigmas,
    latent_scale_lvdm,
    lcm_timesteps,
    rescale_zero_terminal_snr,
    scaled_linear_alphas_cumprod,
    shift_sigmas,
    snr_shift,
)
from vdm_env.transition import TransitionTable, cps_score, flow_grpo_kl, kl, log_prob, predict_x0, step

ALPHAS = scaled_linear_alphas_cumprod()
ZERO_SNR = rescale_zero_terminal_snr(snr_shift(ALPHAS, 3.0))
ALPHAS_FLOAT32 = diffusers.DDIMScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
).alphas_cumprod
F64 = torch.float64


def ddim(n: int = 10, prediction: str = "epsilon", eta: float = 1.0, **kwargs: object) -> TransitionTable:
    return ddim_table(ALPHAS, ddim_timesteps(1000, n), eta=eta, prediction=prediction, **kwargs)  # type: ignore[arg-type]


TABLES: dict[str, Callable[[], TransitionTable]] = {
    "ddim-epsilon": ddim,
    "ddim-v": lambda: ddim(prediction="v"),
    "ddim-x0": lambda: ddim(prediction="x0"),
    "ddim-eta": lambda: ddim(eta=0.2),
    "ddim-last-clean": lambda: ddim(final_alpha_cumprod=1.0),
    "ddim-latent-scale": lambda: ddim(latent_scale=latent_scale_lvdm()),
    "ddim-zero-snr-v": lambda: ddim_table(ZERO_SNR, ddim_timesteps(1000, 10, "trailing"), eta=1.0, prediction="v"),
    "flow-grpo": lambda: flow_table(flow_sigmas(10, 3.0), kind="flow_grpo", noise_level=0.7),
    "dance": lambda: flow_table(flow_sigmas(10, 3.0), kind="dance", noise_level=0.25),
    "cps": lambda: flow_table(flow_sigmas(10, 3.0), kind="cps", noise_level=0.7),
    "flow-ode": lambda: flow_table(flow_sigmas(10, 3.0), kind="ode"),
    "edm-ancestral": lambda: edm_ancestral_table(karras_sigmas(10), noise_level=1.0),
    "edm-euler": lambda: edm_euler_table(karras_sigmas(10)),
    "lcm": lambda: lcm_table(ALPHAS, lcm_timesteps(8)),
}


def close(got: Tensor, want: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol)


def det(shape: tuple[int, ...], a: float, b: float) -> Tensor:
    """The deterministic latents that the published numbers are for."""
    return torch.sin(torch.arange(math.prod(shape), dtype=F64) * a + b).reshape(shape).float()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def at(k: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), k)


def each_step(n: int, *shape: int, count: int = 3, dtype: torch.dtype = F64) -> list[Tensor]:
    """`count` random [n, *shape] tensors: one sample per denoising step."""
    return [randn(n, *shape, seed=i, dtype=dtype) for i in range(count)]


def sampled(table: TransitionTable, x: Tensor, mean: Tensor, k: Tensor, seed: int = 9) -> tuple[Tensor, Tensor]:
    """(action, x') of the Gaussian policy."""
    std = table.action_std[k].view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    a = mean + std * randn(*x.shape, seed=seed, dtype=x.dtype)
    return a, step(table, x, a, k)


# ------------------------------------------------------------------------------------------------ the main idea


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_float64_rows(name: str) -> None:
    table = TABLES[name]()
    for column in ("A", "B", "sigma", "timesteps", "x0_A", "x0_B", "input_scale", "action_std"):
        values = getattr(table, column)
        assert values.shape == (table.num_steps,) and values.dtype == F64 and bool(torch.isfinite(values).all())
    assert table.stochastic.dtype == torch.bool
    close(table.action_std * table.B.abs(), table.sigma, 1e-12)
    assert torch.equal(table.stochastic, table.sigma > 0)
    assert bool((table.timesteps.diff() < 0).all())


@pytest.mark.parametrize("name", TABLES)
def test_action_noise_is_the_samplers_noise(name: str) -> None:
    """Noise z in x' is the same as noise sigma / B z in the action."""
    table = TABLES[name]()
    k = torch.arange(table.num_steps)
    x, mean, z = each_step(table.num_steps, 4, 3, 2, 2)
    column = (-1, 1, 1, 1, 1)
    shift = torch.where(table.stochastic, table.sigma / table.B, 0.0).view(column)
    close(step(table, x, mean + shift * z, k), step(table, x, mean, k) + table.sigma.view(column) * z, 1e-9)


@pytest.mark.parametrize("name", TABLES)
def test_log_prob_is_that_of_torch(name: str) -> None:
    table = TABLES[name]()
    k = torch.arange(table.num_steps)
    x, mean, _ = each_step(table.num_steps, 4, 3, 2, 2)
    _, after = sampled(table, x, mean, k)
    column = (-1, 1, 1, 1, 1)
    noisy = table.stochastic
    reference = Normal(
        table.A.view(column) * x + table.B.view(column) * mean, torch.where(noisy, table.sigma, 1.0).view(column)
    ).log_prob(after)
    close(log_prob(table, x, mean, after, k, reduction="sum"), reference.flatten(1).sum(1) * noisy, 1e-8, 1e-10)
    close(log_prob(table, x, mean, after, k), reference.flatten(1).mean(1) * noisy, 1e-9, 1e-10)
    single = [t.float() for t in (x, mean, after)]
    got = log_prob(table, *single, k)
    assert got.dtype == torch.float32 and got.shape == (table.num_steps,)
    assert log_prob(table, *single, k, reduction="sum").dtype == F64
    close(got, reference.flatten(1).mean(1) * noisy, 2e-4, 1e-5)


@pytest.mark.parametrize("name", TABLES)
def test_action_density_differs_by_log_B_and_ratios_agree(name: str) -> None:
    table = TABLES[name]()
    k = torch.arange(table.num_steps)[table.stochastic]
    if len(k) == 0:
        assert name in ("flow-ode", "edm-euler")
        return
    x, mean, direction = each_step(len(k), 4, 3, 2, 2)
    a, after = sampled(table, x, mean, k)
    std = table.action_std[k].view(-1, 1, 1, 1, 1)
    new_mean = mean + 0.02 * std * direction
    state = [log_prob(table, x, m, after, k, reduction="sum") for m in (mean, new_mean)]
    action = [Normal(m, std).log_prob(a).flatten(1).sum(1) for m in (mean, new_mean)]
    close(action[0] - state[0], x[0].numel() * table.B[k].abs().log(), 1e-7, 1e-9)
    close((state[1] - state[0]).exp(), (action[1] - action[0]).exp(), 1e-8)


@pytest.mark.parametrize("name", ["ddim-epsilon", "ddim-v", "ddim-x0", "flow-grpo", "dance", "cps", "edm-ancestral"])
def test_importance_ratios_average_to_one(name: str) -> None:
    """E_old[p_new / p_old] = 1, for two small latents of one video, over 20000 draws."""
    table, n = TABLES[name](), 20_000
    for step_index in (0, table.num_steps // 2):
        k = torch.full((n,), step_index)
        std = float(table.action_std[step_index])
        x, mean = torch.ones(n, 2, 1, 1, 1, dtype=F64), torch.zeros(n, 2, 1, 1, 1, dtype=F64)
        _, after = sampled(table, x, mean, k)
        new_mean = mean + 0.3 * std
        ratio = (
            log_prob(table, x, new_mean, after, k, reduction="sum")
            - log_prob(table, x, mean, after, k, reduction="sum")
        ).exp()
        # Var[ratio] = exp(sum delta^2) - 1 = exp(0.18) - 1
        assert float(ratio.mean()) == pytest.approx(1.0, abs=5 * math.sqrt(math.expm1(0.18) / n))
        assert float(ratio.std()) > 0.3


@pytest.mark.parametrize("name", TABLES)
def test_kl_is_that_of_torch(name: str) -> None:
    table = TABLES[name]()
    k = torch.arange(table.num_steps)
    mean, reference, _ = each_step(table.num_steps, 4, 3, 2, 2)
    std = torch.where(table.stochastic, table.action_std, 1.0).view(-1, 1, 1, 1, 1)
    want = kl_divergence(Normal(mean, std), Normal(reference, std)).flatten(1) * table.stochastic[:, None]
    close(kl(table, mean, reference, k), want.sum(1), 1e-9, 1e-9)
    close(kl(table, mean, reference, k, reduction="mean"), want.mean(1), 1e-9, 1e-9)
    assert kl(table, mean.float(), reference.float(), k).dtype == F64


@pytest.mark.parametrize("name", ["ddim-epsilon", "flow-grpo", "edm-ancestral"])
def test_kl_is_the_expected_log_ratio(name: str) -> None:
    """Monte Carlo: KL = E_p[log p(x') - log q(x')]."""
    table, n = TABLES[name](), 20_000
    k = torch.full((n,), 4)
    x, mean = torch.ones(n, 3, 1, 1, 1, dtype=F64), torch.zeros(n, 3, 1, 1, 1, dtype=F64)
    reference = mean + 0.5 * float(table.action_std[4])
    _, after = sampled(table, x, mean, k)
    log_ratio = log_prob(table, x, mean, after, k, reduction="sum") - log_prob(
        table, x, reference, after, k, reduction="sum"
    )
    want = float(kl(table, mean[:1], reference[:1], k[:1]))
    assert want == pytest.approx(3 * 0.125, rel=1e-9)
    assert float(log_ratio.mean()) == pytest.approx(want, abs=5 * math.sqrt(2 * want / n))


@pytest.mark.parametrize("name", ["ddim-last-clean", "flow-ode", "cps", "edm-euler", "edm-ancestral", "lcm"])
def test_noiseless_steps_have_no_density(name: str) -> None:
    table = TABLES[name]()
    assert not table.stochastic[-1] and table.action_std[-1] == 0 and table.sigma[-1] == 0
    x, mean, after = (randn(2, 4, 3, 2, 2, seed=i).requires_grad_() for i in range(3))
    last = at(table.num_steps - 1, x)
    for reduction in ("mean", "sum"):
        lp = log_prob(table, x, mean, after, last, reduction=reduction)  # type: ignore[arg-type]
        divergence = kl(table, mean, after, last, reduction=reduction)  # type: ignore[arg-type]
        assert torch.equal(lp, torch.zeros_like(lp)) and torch.equal(divergence, torch.zeros_like(divergence))
        grads = torch.autograd.grad((lp + divergence).sum(), (mean, after))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("name", TABLES)
def test_gradient_reaches_action_and_state(name: str) -> None:
    """Reward back-propagation: d x'/d a = B and d x'/d x = A, also for what was cached in inference mode."""
    table = TABLES[name]()
    k = torch.arange(table.num_steps)
    x, a, _ = each_step(table.num_steps, 4, 3, 2, 2, dtype=torch.float32)
    with torch.inference_mode():
        step(table, x, a, k)
        predict_x0(table, x, a, k)
        log_prob(table, x, a, x, k)
    x.requires_grad_()
    a.requires_grad_()
    dx, da = torch.autograd.grad(step(table, x, a, k).sum(), (x, a))
    close(dx[:, 0, 0, 0, 0], table.A, 1e-5, 1e-6)
    close(da[:, 0, 0, 0, 0], table.B, 1e-5, 1e-6)
    (dlog,) = torch.autograd.grad(log_prob(table, x, a, (x * 0.9).detach(), k).sum(), a)
    assert bool((dlog.flatten(1).abs().sum(1) > 0).eq(table.stochastic).all())


def test_every_sample_at_its_own_step_and_any_rank() -> None:
    table = ddim()
    x, a = randn(4, 2, 3, 2, 2), randn(4, 2, 3, 2, 2, seed=1)
    k = torch.tensor([7, 0, 9, 3])
    together = step(table, x, a, k)
    for i in range(4):
        close(together[i : i + 1], step(table, x[i : i + 1], a[i : i + 1], k[i : i + 1]), 0)
        close(together[i : i + 1], step(table, x[i : i + 1], a[i : i + 1], int(k[i])), 0)
    close(step(table, x.flatten(1), a.flatten(1), k), together.flatten(1), 0)
    close(
        log_prob(table, x, a, together + 0.1, k),
        log_prob(table, x.flatten(1), a.flatten(1), together.flatten(1) + 0.1, k),
        1e-12,
    )


def test_low_precision_inputs_are_applied_in_float32() -> None:
    table = ddim()
    x, a = randn(2, 2, 3, 2, 2).bfloat16(), randn(2, 2, 3, 2, 2, seed=1).bfloat16()
    got = step(table, x, a, at(5, x))
    assert got.dtype == torch.float32
    close(got, step(table, x.float(), a.float(), at(5, x)), 0)
    assert step(table, x.double(), a, at(5, x)).dtype == F64


def test_mask_holds_frames_and_leaves_them_out_of_every_reduction() -> None:
    table = flow_table(flow_sigmas(10, 3.0), kind="flow_grpo", noise_level=0.7)
    x, mean, other = (randn(2, 4, 3, 2, 2, seed=i) for i in range(3))
    mask = torch.ones(2, 1, 3, 1, 1)
    mask[0, :, 0] = 0
    mask[1, :, 1:] = 0
    k = torch.tensor([2, 6])
    free = [[1, 2], [0]]
    a, _ = sampled(table, x, mean, k)
    after = step(table, x, a, k, mask)
    for i in range(2):
        held = [f for f in range(3) if f not in free[i]]
        assert torch.equal(after[i][:, held], x[i][:, held])
        xs, ms, os, afters = (t[i : i + 1][:, :, free[i]] for t in (x, mean, other, after))
        ki = k[i : i + 1]
        close(afters, step(table, xs, a[i : i + 1][:, :, free[i]], ki), 0)
        for reduction in ("mean", "sum"):
            got = log_prob(table, x, mean, after, k, mask, reduction)[i : i + 1]  # type: ignore[arg-type]
            close(got, log_prob(table, xs, ms, afters, ki, reduction=reduction), 1e-9)  # type: ignore[arg-type]
            got = kl(table, mean, other, k, mask, reduction)[i : i + 1]  # type: ignore[arg-type]
            close(got, kl(table, ms, os, ki, reduction=reduction), 1e-9)  # type: ignore[arg-type]
        close(cps_score(table, x, mean, after, k, mask)[i : i + 1], cps_score(table, xs, ms, afters, ki), 1e-12)
        close(flow_grpo_kl(table, mean, other, k, mask)[i : i + 1], flow_grpo_kl(table, ms, os, ki), 1e-12)
    close(log_prob(table, x, mean, after, k, mask.bool()), log_prob(table, x, mean, after, k, mask), 0)


def test_tables_can_be_copied_and_moved() -> None:
    table = flow_table(flow_sigmas(10, 3.0), kind="flow_grpo", noise_level=0.7)
    x, a = randn(2, 2, 3, 2, 2), randn(2, 2, 3, 2, 2, seed=1)
    want = log_prob(table, x, a, x, at(3, x))
    for other in (copy.deepcopy(table), table.to("cpu")):
        close(log_prob(other, x, a, x, at(3, x)), want, 0)
        close(flow_grpo_kl(other, x, a, at(3, x)), flow_grpo_kl(table, x, a, at(3, x)), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TABLES)
def test_same_numbers_on_a_gpu(name: str) -> None:
    table = TABLES[name]()
    k = torch.arange(table.num_steps)
    x, a, after = each_step(table.num_steps, 4, 3, 2, 2)
    there = [t.cuda() for t in (x, a, after)]
    for on in (table, table.to("cuda")):
        close(step(on, there[0], there[1], k.cuda()).cpu(), step(table, x, a, k), 1e-9, 1e-9)
        close(
            log_prob(on, *there, k.cuda(), reduction="sum").cpu(),
            log_prob(table, x, a, after, k, None, "sum"),
            1e-6,
            1e-9,
        )
        close(kl(on, there[1], there[2], k.cuda()).cpu(), kl(table, a, after, k), 1e-6, 1e-9)


# ------------------------------------------------------------------------------------------- published numbers

DDIM_PUBLISHED = [
    # step, t, std, log-probabilities for [2, 4, 8, 8] and [2, 4, 3, 8, 8] (ddpo-pytorch and TRL)
    (0, 981, 0.454463302, (-0.2715976, -0.2642067), (-0.2699015, -0.2659835)),
    (24, 501, 0.294784691, (0.1718815, 0.1783328), (0.1734622, 0.1766094)),
    (49, 1, 0.0206483543, (-9.153784, -8.958424), (-9.104795, -9.019664)),
]


@pytest.mark.parametrize(("k", "t", "std", "images", "videos"), DDIM_PUBLISHED)
def test_ddpo_published_log_probs(k: int, t: int, std: float, images: tuple, videos: tuple) -> None:
    # published from a float32 schedule; with it the standard deviation agrees in every digit
    table = ddim_table(ALPHAS_FLOAT32.double(), ddim_timesteps(1000, 50), eta=1.0, prediction="epsilon")
    assert int(table.timesteps[k]) == t
    assert float(table.sigma[k]) == pytest.approx(std, rel=2e-9)
    assert float(ddim(50).sigma[k]) == pytest.approx(std, rel=2e-6)
    for shape, want in (((2, 4, 8, 8), images), ((2, 4, 3, 8, 8), videos)):
        x, eps = det(shape, 0.37, 0.1), det(shape, 0.53, 0.7)
        after = 0.9 * det(shape, 0.37, 0.1) + 0.1 * det(shape, 0.91, 0.2)
        # the published code's float32 variance is 1.3e-5 off at sigma = 0.02
        close(log_prob(table, x, eps, after, at(k, x)), torch.tensor(want), 2e-6, 2e-5)


FLOW_PUBLISHED = {
    # kind -> step -> (log-probabilities, s or std, sum of the mean)
    "flow_grpo": {
        0: ((-0.5789308, -0.5788577), 3.505671, 3.757539),
        4: ((-0.01567085, -0.01559462), 1.359203, 4.443792),
        9: ((-120.6771, -120.6721), 0.06644106, 5.003006),
    },
    "cps": {
        0: ((-0.09588318, -0.09556209), 0.8554815, 2.354633),
        4: ((-0.05961142, -0.05924515), 0.6301898, 2.937387),
        9: ((-0.01003718, -0.01003604), 0.0, 5.016048),
    },
    "dance": {
        0: ((-0.06027382, -0.0615783), 0.04991911, 4.982163),
        4: ((0.4438766, 0.4424581), 0.07206324, 4.932721),
        9: ((-4.476387, -4.47989), 0.02362278, 4.831397),
    },
}


def flow_inputs() -> tuple[Tensor, Tensor, Tensor]:
    shape = (2, 16, 8, 8)
    x, v = det(shape, 0.37, 0.1), det(shape, 0.53, 0.7)
    return x, v, 0.9 * x + 0.1 * det(shape, 0.91, 0.2)


@pytest.mark.parametrize("kind", FLOW_PUBLISHED)
@pytest.mark.parametrize("k", [0, 4, 9])
def test_flow_published_log_probs(kind: str, k: int) -> None:
    sigmas = flow_sigmas_double_shift(10, 3.0)
    table = flow_table(sigmas, kind=kind, noise_level=0.25 if kind == "dance" else 0.7)
    x, v, after = flow_inputs()
    want, std, total = FLOW_PUBLISHED[kind][k]
    got_std = float(table.sigma[k])
    if kind == "flow_grpo":
        got_std /= math.sqrt(float(sigmas[k] - sigmas[k + 1]))
    assert got_std == pytest.approx(std, rel=2e-6, abs=1e-12)
    assert float(step(table, x, v, at(k, x)).double().sum()) == pytest.approx(total, rel=1e-5, abs=2e-5)
    score = cps_score if kind == "cps" else log_prob
    close(score(table, x, v, after, at(k, x)), torch.tensor(want), 2e-6, 1e-5)


@pytest.mark.parametrize(
    ("k", "sigma", "want"),
    [
        (1, 0.986842, (-2.922726, -2.92294)),
        (8, 0.833333, (-0.1291348, -0.1304223)),
        (14, 0.416667, (0.2147256, 0.2138307)),
    ],
)
def test_dance_published_log_probs(k: int, sigma: float, want: tuple) -> None:
    sigmas = shift_sigmas(torch.linspace(1, 0, 17, dtype=F64), 5.0)
    table = flow_table(sigmas, kind="dance", noise_level=0.25)
    assert float(table.timesteps[k]) == pytest.approx(1000 * sigma, abs=1e-3)
    x, v, after = flow_inputs()
    close(log_prob(table, x, v, after, at(k, x)), torch.tensor(want), 2e-6, 1e-5)


def test_flow_grpo_kl_is_minus_dt_times_the_kl_per_element() -> None:
    sigmas = flow_sigmas_double_shift(10, 3.0)
    table = flow_table(sigmas, kind="flow_grpo", noise_level=0.7)
    x, v, _ = flow_inputs()
    reference = v + 0.1 * x
    for k, ratio in ((0, 0.040), (4, 0.083), (8, 0.269), (9, 0.0089)):
        published = flow_grpo_kl(table, v, reference, at(k, x))
        close(published / kl(table, v, reference, at(k, x), reduction="mean"), torch.full((2,), ratio), 5e-4)
        # and directly: mean (mu - mu_ref)^2 / (2 s^2)
        s = float(table.sigma[k]) / math.sqrt(float(sigmas[k] - sigmas[k + 1]))
        mu, mu_ref = (step(table, x, m, at(k, x)).double() for m in (v, reference))
        close(published, (mu - mu_ref).square().flatten(1).mean(1) / (2 * s**2), 1e-9, 2e-4)
    with pytest.raises(ValueError, match="flow tables only"):
        flow_grpo_kl(ddim(), v, reference, at(0, x))


# ----------------------------------------------------------------------- the published formulas, written out again


def ddpo_formula(
    alpha: Tensor, alpha_next: Tensor, eta: float, prediction: str, x: Tensor, out: Tensor, x_next: Tensor
) -> Tensor:
    """DDPO's log-probability (arXiv 2305.13301) through x0 and eps, no table, in float64: mean over elements."""
    x, out, x_next = x.double(), out.double(), x_next.double()
    if prediction == "epsilon":
        x0, eps = (x - (1 - alpha).sqrt() * out) / alpha.sqrt(), out
    elif prediction == "v":
        x0, eps = alpha.sqrt() * x - (1 - alpha).sqrt() * out, alpha.sqrt() * out + (1 - alpha).sqrt() * x
    else:
        x0, eps = out, (x - alpha.sqrt() * out) / (1 - alpha).sqrt()
    sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()
    mean = alpha_next.sqrt() * x0 + (1 - alpha_next - sigma**2).sqrt() * eps
    return Normal(mean, sigma.expand_as(mean)).log_prob(x_next).flatten(1).mean(1)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("n", [10, 50])
@pytest.mark.parametrize(("dtype", "atol"), [(F64, 1e-6), (torch.float32, 1e-5)])
def test_ddpo_ratios(prediction: str, n: int, dtype: torch.dtype, atol: float) -> None:
    """Ratios of the published sampler equal those of the Gaussian policy over actions (mean over elements)."""
    table = ddim(n, prediction)
    k = torch.arange(table.num_steps)
    t = table.timesteps.long()
    column = (-1, 1, 1, 1, 1)
    alpha = ALPHAS[t].view(column)
    alpha_next = ALPHAS[torch.cat([t[1:], torch.zeros(1, dtype=torch.long)])].view(column)
    x, old, direction = each_step(n, 4, 4, 4, 4, dtype=dtype)
    new = old + 0.02 * direction
    a, after = sampled(table, x, old, k)
    # the formula in float64 on the same latents: in float32 its own 1 - alpha is off by 3e-5 at the last step
    published = [ddpo_formula(alpha, alpha_next, 1.0, prediction, x, out, after) for out in (old, new)]
    want = (published[1] - published[0]).exp()
    ours = [log_prob(table, x, out, after, k) for out in (old, new)]
    close((ours[1].double() - ours[0].double()).exp(), want, atol)
    std = table.action_std.view(column).to(dtype)
    action = [Normal(m, std).log_prob(a).flatten(1).mean(1) for m in (old, new)]
    close((action[1].double() - action[0].double()).exp(), want, atol)
    assert float((want - 1).abs().max()) > 1e-4


@pytest.mark.parametrize(("n", "shift"), [(10, 3.0), (40, 3.0), (10, 1.0)])
@pytest.mark.parametrize(("dtype", "atol"), [(F64, 1e-6), (torch.float32, 1e-5)])
def test_flow_grpo_ratios(n: int, shift: float, dtype: torch.dtype, atol: float) -> None:
    sigmas = flow_sigmas(n, shift)
    table = flow_table(sigmas, kind="flow_grpo", noise_level=0.7)
    k = torch.arange(n)
    x, old, direction = each_step(n, 4, 4, 4, 4, dtype=dtype)
    new = old + 0.02 * direction
    a, after = sampled(table, x, old, k)
    column = (-1, 1, 1, 1, 1)
    now, then = sigmas[:-1].view(column), sigmas[1:].view(column)
    dt = then - now
    s = 0.7 * (now / (1 - torch.where(now == 1, then, now))).sqrt()

    def published(v: Tensor) -> Tensor:
        mean = x * (1 + s**2 * dt / (2 * now)) + v * (1 + s**2 * (1 - now) / (2 * now)) * dt
        return Normal(mean, s * (-dt).sqrt() * torch.ones_like(mean)).log_prob(after).flatten(1).mean(1)

    want = (published(new) - published(old)).exp()
    ours = (log_prob(table, x, new, after, k).double() - log_prob(table, x, old, after, k).double()).exp()
    close(ours, want, atol)
    std = table.action_std.view(column).to(dtype)
    action = [Normal(m, std).log_prob(a).flatten(1).mean(1).double() for m in (old, new)]
    close((action[1] - action[0]).exp(), want, atol)
    assert float((want - 1).abs().max()) > 1e-4


def test_ratio_is_exactly_one_before_the_first_update() -> None:
    for name, build in TABLES.items():
        table = build()
        k = torch.arange(table.num_steps)
        x, mean, _ = each_step(table.num_steps, 4, 3, 2, 2, dtype=torch.float32)
        _, after = sampled(table, x, mean, k)
        old, new = (log_prob(table, x, mean, after, k) for _ in range(2))
        assert torch.equal((new - old).exp(), torch.ones_like(old)), name


def test_dance_has_flow_grpos_mean_where_the_noise_agrees() -> None:
    sigmas = flow_sigmas(10, 3.0)
    grpo = flow_table(sigmas, kind="flow_grpo", noise_level=0.3)
    dance = flow_table(sigmas, kind="dance", noise_level=grpo.sigma / (sigmas[:-1] - sigmas[1:]).sqrt())
    for column in ("A", "B", "sigma"):
        close(getattr(dance, column), getattr(grpo, column), 1e-12)


# ------------------------------------------------------------------------------- marginals of Gaussian data

DATA_MEAN, DATA_STD = 0.5, 0.4


def moments(
    table: TransitionTable, output: Callable[[float, float, int], tuple[float, float]], start: tuple[float, float]
):
    """Mean and variance of x after all steps, for a linear network a = p x + q; exact, no sampling."""
    mean, var = start
    for k in range(table.num_steps):
        p, q = output(mean, var, k)
        gain = float(table.A[k] + table.B[k] * p)
        mean = gain * mean + float(table.B[k]) * q
        var = gain**2 * var + float(table.sigma[k]) ** 2
    return mean, var


def flow_network(table: TransitionTable) -> Callable[[float, float, int], tuple[float, float]]:
    """E[eps - x0 | x] for Gaussian data, linear in x."""

    def output(_mean: float, _var: float, k: int) -> tuple[float, float]:
        sigma = float(table.timesteps[k]) / 1000
        total = (1 - sigma) ** 2 * DATA_STD**2 + sigma**2
        p = (sigma - (1 - sigma) * DATA_STD**2) / total
        return p, -DATA_MEAN - p * (1 - sigma) * DATA_MEAN

    return output


@pytest.mark.parametrize(("kind", "level"), [("flow_grpo", 0.7), ("dance", 0.3), ("ode", 0.0)])
def test_flow_sdes_have_the_marginals_of_the_ode(kind: str, level: float) -> None:
    """All end in the data distribution, with an error that shrinks as the steps get finer."""
    errors = []
    for n in (50, 400):
        table = flow_table(flow_sigmas(n), kind=kind, noise_level=level)
        # Flow-GRPO's own s diverges at sigma = 1, which is what its substitution avoids; start it as published
        mean, var = moments(table, flow_network(table), (0.0, 1.0))
        errors.append(max(abs(mean - DATA_MEAN), abs(math.sqrt(var) - DATA_STD)))
    assert errors[1] < 0.02 and errors[1] < 0.5 * errors[0], errors


def test_cps_keeps_the_noise_level_given_the_clean_latents() -> None:
    """Around a known x0 the law of x' is N((1 - sigma') x0, sigma'^2) at any noise level, in one step of any length.

    Over spread data it is not the law of the ODE, however fine the grid: its noise per step does not shrink with dt.
    """
    sigmas = flow_sigmas(10, 3.0)
    for level in (0.0, 0.3, 0.7, 1.0):
        table = flow_table(sigmas, kind="cps", noise_level=level)
        k = torch.arange(table.num_steps)
        x0, eps, _ = each_step(table.num_steps, 4, 3, 2, 2)
        now, after = (s.view(-1, 1, 1, 1, 1) for s in (sigmas[:-1], sigmas[1:]))
        mean = step(table, (1 - now) * x0 + now * eps, eps - x0, k)
        kept = (mean - (1 - after) * x0) / eps  # how much of the old noise stays
        close(kept.square() + table.sigma.view(-1, 1, 1, 1, 1).square(), after.square().expand_as(kept), 1e-9)
    errors = []
    for n in (50, 400):
        table = flow_table(flow_sigmas(n), kind="cps", noise_level=0.7)
        _, var = moments(table, flow_network(table), (0.0, 1.0))
        errors.append(abs(math.sqrt(var) - DATA_STD))
    assert min(errors) > 0.05, errors


def test_ddim_has_the_same_marginals_at_every_eta() -> None:
    """For Gaussian data and any eta the chain ends near the data law, nearer with more steps."""
    for eta in (0.0, 0.5, 1.0):
        errors = []
        for n in (25, 200):
            table = ddim(n, eta=eta)

            def output(_m: float, _v: float, k: int, table: TransitionTable = table) -> tuple[float, float]:
                alpha = float(ALPHAS[int(table.timesteps[k])])
                total = alpha * DATA_STD**2 + 1 - alpha
                p = math.sqrt(1 - alpha) / total
                return p, -p * math.sqrt(alpha) * DATA_MEAN

            alpha = float(ALPHAS[int(table.timesteps[0])])
            start = (math.sqrt(alpha) * DATA_MEAN, alpha * DATA_STD**2 + 1 - alpha)
            mean, var = moments(table, output, start)
            errors.append(max(abs(mean - DATA_MEAN), abs(math.sqrt(var) - DATA_STD)))
        assert errors[1] < 0.02 and errors[1] < 0.5 * errors[0], (eta, errors)


def test_edm_ancestral_has_the_marginals_of_euler() -> None:
    for level in (0.0, 0.5, 1.0):
        errors = []
        for n in (25, 200):
            table = edm_ancestral_table(karras_sigmas(n, sigma_max=80.0), noise_level=level, prediction="x0")

            def output(_m: float, _v: float, k: int, table: TransitionTable = table) -> tuple[float, float]:
                sigma = math.exp(4 * float(table.timesteps[k]))
                p = DATA_STD**2 / (DATA_STD**2 + sigma**2)
                return p, (1 - p) * DATA_MEAN

            mean, var = moments(table, output, (DATA_MEAN, DATA_STD**2 + 80.0**2))
            errors.append(max(abs(mean - DATA_MEAN), abs(math.sqrt(var) - DATA_STD)))
        assert errors[1] < 0.03 and errors[1] < 0.5 * errors[0], (level, errors)


def test_sampled_chain_has_the_exact_moments() -> None:
    """The linear-Gaussian recursion above is what step() and a Gaussian policy really do (20000 chains)."""
    table, n = flow_table(flow_sigmas(10, 3.0), kind="flow_grpo", noise_level=0.7), 20_000
    network = flow_network(table)
    want_mean, want_var = moments(table, network, (0.0, 1.0))
    x = randn(n, 1, 1, 1, 1)
    for k in range(table.num_steps):
        p, q = network(0.0, 0.0, k)
        _, x = sampled(table, x, p * x + q, at(k, x), seed=100 + k)
    assert float(x.mean()) == pytest.approx(want_mean, abs=5 * math.sqrt(want_var / n))
    assert float(x.var()) == pytest.approx(want_var, rel=5 * math.sqrt(2 / n))


# --------------------------------------------------------------------------------------- diffusers' own samplers


@pytest.mark.parametrize(("prediction", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_ddim_is_that_of_diffusers(prediction: str, theirs: str, eta: float, dtype: torch.dtype) -> None:
    rtol = 2e-5  # diffusers takes its coefficients in float32 even where the latents are float64
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=theirs,
    )
    scheduler.set_timesteps(10)
    # diffusers holds its schedule in float32; give both the same one, so that only the step is compared
    table = ddim_table(scheduler.alphas_cumprod.double(), ddim_timesteps(1000, 10), eta=eta, prediction=prediction)
    x = randn(2, 4, 3, 2, 2, dtype=dtype)
    for k, t in enumerate(scheduler.timesteps):
        out, z = randn(*x.shape, seed=2 * k + 1, dtype=dtype), randn(*x.shape, seed=2 * k + 2, dtype=dtype)
        theirs_out = scheduler.step(out, t, x, eta=eta, variance_noise=z if eta > 0 else None)
        a = out + (float(table.sigma[k] / table.B[k]) * z if eta > 0 else 0.0)
        after = step(table, x, a, at(k, x))
        scale = float(theirs_out.prev_sample.abs().max())
        close(after, theirs_out.prev_sample, rtol * max(1.0, scale))
        close(predict_x0(table, x, out, at(k, x)), theirs_out.pred_original_sample, rtol * max(1.0, 10 * scale))
        x = after


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_zero_terminal_snr_first_step_is_finite(eta: float) -> None:
    """CogVideoX: alpha = 0 at t = 999. x0 = -v there, and with eta = 1 only x0 and fresh noise remain."""
    table = ddim_table(ZERO_SNR, ddim_timesteps(1000, 10, "trailing"), eta=eta, prediction="v", final_alpha_cumprod=1.0)
    x, v = randn(2, 4, 3, 2, 2, dtype=torch.float32), randn(2, 4, 3, 2, 2, seed=1, dtype=torch.float32)
    first = at(0, x)
    after = step(table, x, v, first)
    alpha_next = float(ZERO_SNR[899])
    assert bool(torch.isfinite(after).all())
    close(predict_x0(table, x, v, first), -v, 1e-7)
    keep = math.sqrt(1 - alpha_next) if eta == 0 else 0.0
    close(after, -math.sqrt(alpha_next) * v + keep * x, 1e-6)
    assert float(table.sigma[0]) ** 2 == pytest.approx(eta * (1 - alpha_next), abs=1e-12)
    assert bool(table.stochastic[0]) == (eta > 0) and not table.stochastic[-1]
    if eta > 0:
        lp = log_prob(table, x, v, after + float(table.sigma[0]), first)
        close(lp, torch.full((2,), -0.5 - math.log(float(table.sigma[0])) - 0.5 * math.log(2 * math.pi)), 1e-5)
    x0 = ddim_table(ZERO_SNR, ddim_timesteps(1000, 10, "trailing"), eta=eta, prediction="x0")
    close(step(x0, x, -v, first), after, 1e-6)


def test_cogvideox_ddim_is_that_of_diffusers() -> None:
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod.double()
    table = ddim_table(alphas, ddim_timesteps(1000, 10, "trailing"), eta=0.0, prediction="v", final_alpha_cumprod=1.0)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    x = randn(2, 4, 3, 2, 2)
    for k, t in enumerate(scheduler.timesteps):
        v = randn(*x.shape, seed=k + 1)
        theirs = scheduler.step(v, t, x).prev_sample
        x = step(table, x, v, at(k, x))
        close(x, theirs, 2e-5 * max(1.0, float(theirs.abs().max())))


def test_flow_ode_is_that_of_diffusers() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
    table = flow_table(flow_sigmas(10, 3.0), kind="ode")
    x = randn(2, 4, 3, 2, 2, dtype=torch.float32)
    for k, t in enumerate(scheduler.timesteps):
        v = randn(*x.shape, seed=k + 1, dtype=torch.float32)
        theirs = scheduler.step(v, t, x).prev_sample
        x = step(table, x, v, at(k, x))
        close(x, theirs, 2e-6 * max(1.0, float(theirs.abs().max())))


def test_svd_euler_is_that_of_diffusers() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
    )
    scheduler.set_timesteps(12)
    table = edm_euler_table(karras_sigmas(12))
    x = 700 * randn(2, 4, 3, 2, 2, dtype=torch.float32)
    for k, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        close(float(table.input_scale[k]) * x, seen, 1e-5)
        v = randn(*x.shape, seed=k + 1, dtype=torch.float32)
        out = scheduler.step(v, t, x)
        close(predict_x0(table, x, v, at(k, x)), out.pred_original_sample, 1e-5 * max(1.0, float(x.abs().max())))
        x = step(table, x, v, at(k, x))
        close(x, out.prev_sample, 1e-5 * max(1.0, float(x.abs().max())))


@pytest.mark.parametrize(("prediction", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_euler_ancestral_is_that_of_diffusers(prediction: str, theirs: str) -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=theirs
    )
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double()
    table = edm_ancestral_table(sigmas, noise_level=1.0, prediction=prediction, timesteps=scheduler.timesteps)
    assert table.stochastic.tolist() == [True] * 9 + [False]
    x = float(sigmas[0]) * randn(2, 4, 3, 2, 2, dtype=torch.float32)
    for k, t in enumerate(scheduler.timesteps):
        out = randn(*x.shape, seed=k + 1, dtype=torch.float32)
        seen = scheduler.scale_model_input(x, t)
        close(float(table.input_scale[k]) * x, seen, 1e-5)
        theirs_x = scheduler.step(out, t, x, generator=torch.Generator().manual_seed(k)).prev_sample
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
        a = out + (float(table.sigma[k] / table.B[k]) * z if table.stochastic[k] else 0.0)
        x = step(table, x, a, at(k, x))
        close(x, theirs_x, 1e-5 * max(1.0, float(theirs_x.abs().max())))


def test_ancestral_level_zero_is_euler_and_the_levels_add_up() -> None:
    sigmas = karras_sigmas(10)
    plain, euler = edm_ancestral_table(sigmas, noise_level=0.0), edm_euler_table(sigmas)
    for column in ("A", "B", "sigma"):
        close(getattr(plain, column), getattr(euler, column), 1e-12)
    # with a network that knows x0 exactly, x' = x0 + sigma_down eps + sigma_up z has the variance sigma'^2
    table = edm_ancestral_table(sigmas, noise_level=0.8, prediction="x0")
    close((table.A * sigmas[:-1]).square() + table.sigma.square(), sigmas[1:].square(), 1e-9, 1e-9)


def test_lcm_is_that_of_diffusers() -> None:
    scheduler = diffusers.LCMScheduler(clip_sample=False, set_alpha_to_one=True)
    t = lcm_timesteps(4)
    scheduler.set_timesteps(timesteps=t.tolist())
    table = lcm_table(scheduler.alphas_cumprod.double(), t)
    x = randn(2, 4, 3, 2, 2, dtype=torch.float32)
    for k in range(4):
        out = randn(*x.shape, seed=k + 1, dtype=torch.float32)
        theirs = scheduler.step(out, int(t[k]), x, generator=torch.Generator().manual_seed(k))
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
        close(predict_x0(table, x, out, at(k, x)), theirs.denoised, 2e-5 * float(theirs.denoised.abs().max()))
        a = out + (float(table.sigma[k] / table.B[k]) * z if table.stochastic[k] else 0.0)
        x = step(table, x, a, at(k, x))
        close(x, theirs.prev_sample, 2e-5 * max(1.0, float(x.abs().max())))
    assert table.stochastic.tolist() == [True, True, True, False]


# ------------------------------------------------------------------------------------------------- noise levels


@pytest.mark.parametrize("kind", ["flow_grpo", "dance", "cps"])
def test_flow_noise_per_step_and_zero_is_the_ode(kind: str) -> None:
    sigmas = flow_sigmas(6, 3.0)
    ode, window = flow_table(sigmas, kind="ode"), flow_table(sigmas, kind=kind, noise_level=[0, 0.7, 0.7, 0, 0, 0])
    full = flow_table(sigmas, kind=kind, noise_level=0.7)
    assert window.stochastic.tolist() == [False, True, True, False, False, False]
    for column in ("A", "B", "sigma"):
        for k in range(6):
            want = full if k in (1, 2) else ode
            assert float(getattr(window, column)[k]) == pytest.approx(float(getattr(want, column)[k]), abs=1e-12)


def test_ddim_and_ancestral_noise_per_step() -> None:
    levels = [1.0, 0.0, 0.5, 0.0, 1.0]
    for many, one in (
        (ddim(5, eta=levels), lambda level: ddim(5, eta=level)),  # type: ignore[arg-type]
        (
            edm_ancestral_table(karras_sigmas(5), noise_level=torch.tensor(levels)),
            lambda level: edm_ancestral_table(karras_sigmas(5), noise_level=level),
        ),
    ):
        for k, level in enumerate(levels):
            for column in ("A", "B", "sigma"):
                assert float(getattr(many, column)[k]) == pytest.approx(
                    float(getattr(one(level), column)[k]), abs=1e-12
                )


def test_eta_zero_and_set_alpha_to_one_publish_noiseless_steps() -> None:
    assert not ddim(eta=0.0).stochastic.any()
    last_clean = ddim(final_alpha_cumprod=1.0)
    assert last_clean.stochastic.tolist() == [True] * 9 + [False]
    # steps_offset = 0 and a final alpha of alphas_cumprod[0]: the last step does nothing at all, without any NaN
    idle = ddim_table(ALPHAS, ddim_timesteps(1000, 10, steps_offset=0), eta=1.0, prediction="epsilon")
    assert (float(idle.A[-1]), float(idle.B[-1]), float(idle.sigma[-1])) == (1.0, 0.0, 0.0)
    assert not idle.stochastic[-1] and float(idle.action_std[-1]) == 0.0


def test_published_action_stds() -> None:
    """The spread the policy needs in action space: about 1 for epsilon, up to 80 for the flow SDE (never clip it)."""
    epsilon = ddim(10).action_std
    want = [0.7737, 0.8600, 0.9400, 1.0030, 1.0360, 1.0237, 0.9453, 0.7560, 0.1202, 0.9968]
    close(epsilon, torch.tensor(want), 1e-4)
    for n, first in ((10, 17.557), (40, 80.746)):
        flow = flow_table(flow_sigmas_double_shift(n, 3.0), kind="flow_grpo", noise_level=0.7)
        assert bool((flow.action_std.diff() < 0).all())
        assert float(flow.action_std[0]) == pytest.approx(first, abs=1e-3)
        assert float(flow.action_std[-1]) == pytest.approx(0.5648, abs=1e-4)
        assert float(flow.sigma[-1]) == pytest.approx(0.0063, abs=5e-5)
    zero_snr = ddim_table(
        rescale_zero_terminal_snr(ALPHAS), ddim_timesteps(1000, 10, "trailing"), eta=1.0, prediction="v"
    )
    assert float(zero_snr.action_std[0]) == pytest.approx(18.13, abs=5e-3)


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (1.1, "in \\[0, 1\\]"),
        (-0.1, "in \\[0, 1\\]"),
        (math.nan, "in \\[0, 1\\]"),
        ([1.0] * 9, "one per step \\(10\\)"),
        ([1.0] * 11, "one per step \\(10\\)"),
        ([1.0] * 9 + [2.0], "in \\[0, 1\\]"),
    ],
)
def test_noise_levels_out_of_range_or_count_are_refused(level: object, message: str) -> None:
    builds = (
        lambda: ddim(eta=level),  # type: ignore[arg-type]
        lambda: flow_table(flow_sigmas(10), kind="cps", noise_level=level),  # type: ignore[arg-type]
        lambda: edm_ancestral_table(karras_sigmas(10), noise_level=level),  # type: ignore[arg-type]
    )
    for build in builds:
        with pytest.raises(ValueError, match=message):
            build()


def test_flow_noise_levels_out_of_range_are_refused() -> None:
    for kind in ("flow_grpo", "dance"):
        for level in (-0.1, 2.5, math.inf):
            with pytest.raises(ValueError, match="in \\[0, 2\\]"):
                flow_table(flow_sigmas(10), kind=kind, noise_level=level)
    with pytest.raises(ValueError, match="no noise"):
        flow_table(flow_sigmas(10), kind="ode", noise_level=0.1)


def test_bad_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one denoising step"):
        ddim_table(ALPHAS, [], eta=1.0, prediction="epsilon")
    with pytest.raises(ValueError, match="at least one denoising step"):
        flow_table([0.0], kind="ode")
    with pytest.raises(ValueError, match="append 0"):
        flow_table(flow_sigmas(10)[:-1], kind="ode")
    with pytest.raises(ValueError, match="at most 1.0"):
        flow_table([1.5, 0.5, 0.0], kind="ode")
    with pytest.raises(ValueError, match="strictly"):
        edm_euler_table([1.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="noisiest first"):
        ddim_table(ALPHAS, [1, 501], eta=1.0, prediction="epsilon")
    with pytest.raises(ValueError, match="0 .. 999"):
        ddim_table(ALPHAS, [1000, 1], eta=1.0, prediction="epsilon")
    with pytest.raises(ValueError, match="whole numbers"):
        ddim_table(ALPHAS, [500.5, 1.0], eta=1.0, prediction="epsilon")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="final_alpha_cumprod"):
        ddim(final_alpha_cumprod=1.5)


@pytest.mark.parametrize("build", [ddim_table, lcm_table])
def test_epsilon_with_zero_terminal_snr_is_refused(build: Callable) -> None:
    extra = {"eta": 1.0} if build is ddim_table else {}
    with pytest.raises(ValueError, match="zero terminal SNR.*v or x0"):
        build(ZERO_SNR, [999, 499], prediction="epsilon", **extra)
    assert build(ZERO_SNR, [949, 499], prediction="epsilon", **extra).num_steps == 2


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="ode, flow_grpo, dance, cps"):
        flow_table(flow_sigmas(10), kind="sde")
    with pytest.raises(ValueError, match="'flow'"):
        flow_table(flow_sigmas(10), kind="ode", prediction="epsilon")
    with pytest.raises(ValueError, match="'epsilon', 'v' or 'x0'"):
        ddim(prediction="flow")
    with pytest.raises(ValueError, match="v, epsilon, x0"):
        edm_euler_table(karras_sigmas(5), prediction="flow")


def columns(**changes: Tensor) -> dict[str, Tensor]:
    base = {name: torch.ones(3, dtype=F64) for name in ("A", "B", "sigma", "timesteps", "x0_A", "x0_B", "input_scale")}
    return base | changes


def test_noise_that_no_action_can_carry_is_refused() -> None:
    B = torch.tensor([1.0, 1e-9, 1.0], dtype=F64)
    with pytest.raises(ValueError, match="steps \\[1\\].*B ~ 0"):
        TransitionTable(**columns(B=B), name="own")  # type: ignore[arg-type]
    quiet = TransitionTable(**columns(B=B, sigma=torch.tensor([1.0, 0.0, 1.0], dtype=F64)), name="own")  # type: ignore[arg-type]
    assert quiet.stochastic.tolist() == [True, False, True]


def test_broken_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="sigma is negative at steps \\[0, 1, 2\\]"):
        TransitionTable(**columns(sigma=-torch.ones(3, dtype=F64)), name="own")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="A is not finite"):
        TransitionTable(**columns(A=torch.full((3,), math.inf, dtype=F64)), name="own")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float32"):
        TransitionTable(**columns(B=torch.ones(3)), name="own")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="\\(2,\\)"):
        TransitionTable(**columns(B=torch.ones(2, dtype=F64)), name="own")  # type: ignore[arg-type]


def test_wrong_shapes_and_steps_are_refused() -> None:
    table = ddim()
    x = randn(2, 4, 3, 2, 2)
    with pytest.raises(ValueError, match="one shape"):
        step(table, x, x[:1], at(0, x))
    with pytest.raises(ValueError, match="steps 0 .. 9.*reset"):
        step(table, x, x, at(10, x))
    with pytest.raises(ValueError, match="steps 0 .. 9"):
        predict_x0(table, x, x, -1)
    with pytest.raises(ValueError, match="int64 \\[2\\]"):
        step(table, x, x, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="int64"):
        step(table, x, x, torch.zeros(2))
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        log_prob(table, x, x, x, at(0, x), reduction="none")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- other packages


@pytest.mark.external
def test_against_trl() -> None:
    """TRL up to 0.23.1 ships DDPO's step; its log-probabilities are the same (pip install trl==0.23.1)."""
    try:
        from trl.models.modeling_sd_base import scheduler_step
    except Exception as error:  # newer releases have dropped the module, some fail on newer dependencies
        pytest.skip(f"trl.models.modeling_sd_base is not importable: {error}")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(50)
    table = ddim(50)
    for shape in ((2, 4, 8, 8), (2, 4, 3, 8, 8)):
        x, eps = det(shape, 0.37, 0.1), det(shape, 0.53, 0.7)
        after = 0.9 * x + 0.1 * det(shape, 0.91, 0.2)
        for k, t in enumerate(scheduler.timesteps):
            theirs = scheduler_step(scheduler, eps, t, x, eta=1.0, prev_sample=after)
            close(log_prob(table, x, eps, after, at(k, x)), theirs.log_probs, 1e-5, 2e-5)
