"""One builder per sampler: from a noise grid to the columns of a :class:`vdm_env.transition.TransitionTable`.

Each builder takes from its parametrisation the clean estimate x0 = p x + q a and the noise estimate eps = r x + u a, a
being what the network emits, and reads the columns A, B and sigma off the sampler's formula. Everything is float64 on
the CPU. In the formulas a prime marks the next, cleaner point of the grid. Samplers that are no such table are refused
by name (:func:`refuse_sampler`) or by option (:func:`check_scheduler_config`). Grids live in ``vdm_env.schedule``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vdm_env.transition import TransitionTable

NoiseLevel = float | Sequence[float] | Tensor
"""One noise level for all denoising steps, or one per step."""

MIN_ALPHA_EPSILON = 1e-7
"""Below this alpha_cumprod, x0 = (x - sqrt(1 - alpha) eps) / sqrt(alpha) has lost all digits of a float32 network."""


def ddim_table(
    alphas_cumprod: Tensor,
    timesteps: Tensor | Sequence[int],
    *,
    eta: NoiseLevel,
    prediction: str,
    latent_scale: Tensor | None = None,
    final_alpha_cumprod: float | None = None,
) -> TransitionTable:
    r"""DDIM with noise eta (arXiv 2010.02502, eq. 12 and 16); eta = 1 is DDPM ancestral sampling, as DDPO uses it.

        x' = sqrt(alpha') s' x0 + sqrt(1 - alpha' - sigma^2) eps + sigma z
        sigma = eta sqrt((1 - alpha') / (1 - alpha) (1 - alpha / alpha'))

    alpha' is that of the *next timestep of this grid*, so any spacing is consistent. With ``prediction`` "v" or "x0" a
    terminal alpha of exactly 0 (zero terminal SNR) is fine: no division by sqrt(alpha) occurs.

    Args:
        alphas_cumprod: [T], non-increasing in t, in [0, 1].
        timesteps: int [S], strictly decreasing, in 0 .. T-1.
        eta: noise level in [0, 1], one number or one per step.
        prediction: what the network emits: "epsilon", "v" (= sqrt(alpha) eps - sqrt(1 - alpha) s x0) or "x0".
        latent_scale: optional s_t [T] of LVDM / VideoCrafter2: x_t = sqrt(alpha) s_t x0 + sqrt(1 - alpha) eps.
        final_alpha_cumprod: alpha' of the last step; default ``alphas_cumprod[0]`` (then eta > 0 adds noise there too).
            1.0 is diffusers' ``set_alpha_to_one=True``: the last step is then deterministic.

    Raises:
        ValueError: for any argument out of its range, and for "epsilon" with a zero terminal SNR.
    """
    t, alpha, scale = _vp_rows("ddim", alphas_cumprod, timesteps, prediction, latent_scale)
    final = float(alphas_cumprod[0]) if final_alpha_cumprod is None else float(final_alpha_cumprod)
    if not float(alpha[-1]) <= final <= 1.0:
        raise ValueError(f"ddim: final_alpha_cumprod must be in [{float(alpha[-1]):.6g}, 1], got {final}")
    first_scale = 1.0 if latent_scale is None else float(latent_scale[0])
    alpha_next = torch.cat([alpha[1:], alpha.new_tensor([final])])
    scale_next = torch.cat([scale[1:], scale.new_tensor([first_scale])])
    eta_k = _noise_levels("ddim", "eta", eta, len(t), upper=1.0)
    # (1 - alpha' / 1 - alpha): a grid may visit alpha = 1 only as its last, already clean point
    variance = (1 - alpha_next) / (1 - alpha).clamp_min(1e-300) * (1 - alpha / alpha_next)
    sigma = eta_k * variance.clamp_min(0.0).sqrt()
    # exactly 0 at zero terminal SNR with eta = 1; rounding may leave -1e-17
    direction = (1 - alpha_next - sigma.square()).clamp_min(0.0).sqrt()
    x0_A, x0_B, eps_A, eps_B = _vp_estimates("ddim", alpha, scale, prediction)
    signal = alpha_next.sqrt() * scale_next
    return TransitionTable(
        A=signal * x0_A + direction * eps_A,
        B=signal * x0_B + direction * eps_B,
        sigma=sigma,
        timesteps=t.double(),
        x0_A=x0_A,
        x0_B=x0_B,
        name="ddim",
        input_scale=torch.ones_like(sigma),
    )


def flow_table(
    sigmas: Tensor | Sequence[float],
    *,
    kind: str,
    noise_level: NoiseLevel = 0.0,
    prediction: str = "flow",
    num_train_timesteps: int = 1000,
) -> TransitionTable:
    r"""Flow matching, x_t = (1 - sigma) x0 + sigma eps, action = eps - x0 always (adapters flip other conventions).

    With dt = sigma' - sigma < 0 and noise level n:

    - "ode":       x' = x + dt a
    - "flow_grpo": x' = x + dt a + s^2 dt / (2 sigma) (x + (1 - sigma) a) + s sqrt(-dt) z with
      s = n sqrt(sigma / (1 - sigma)); in the 1 - sigma the next sigma stands in where sigma = 1 (arXiv 2505.05470)
    - "dance":     the same with s = n at every step (DanceGRPO, arXiv 2505.07818)
    - "cps":       x' = (1 - sigma') x0 + sqrt(sigma'^2 - s^2) eps + s z with s = sigma' sin(n pi / 2) (released with
      Flow-GRPO); the noise in x' has exactly the level sigma' that the network expects; the last step adds none

    n = 0 is the ODE, step by step. The two SDEs keep the ODE's marginals in the limit of small steps. "cps" does not:
    its noise per step does not shrink with dt, and spread-out data come out narrower.

    Args:
        sigmas: [S+1], strictly decreasing in [0, 1], ending with 0.
        kind: one of the four above.
        noise_level: n, one number or one per step: 0 for "ode", [0, 2] for the SDEs, [0, 1] for "cps".
        prediction: only "flow".
        num_train_timesteps: the network is given t = num_train_timesteps * sigma.

    Raises:
        ValueError: for any argument out of its range.
    """
    upper = {"ode": 0.0, "flow_grpo": 2.0, "dance": 2.0, "cps": 1.0}
    if kind not in upper:
        raise ValueError(f"flow_table: unknown kind {kind!r}; choose one of {', '.join(upper)}")
    if prediction != "flow":
        raise ValueError(f"flow_table: actions are eps - x0, prediction must be 'flow', got {prediction!r}")
    grid = _sigma_grid(kind, sigmas, largest=1.0)
    now, after = grid[:-1], grid[1:]
    dt = after - now
    level = _noise_levels(kind, "noise_level", noise_level, len(dt), upper=upper[kind])
    if kind == "cps":
        sigma = after * torch.sin(level * math.pi / 2)
        keep = (after.square() - sigma.square()).clamp_min(0.0).sqrt()
        A, B = (1 - after) + keep, -(1 - after) * now + keep * (1 - now)
    else:
        s = level
        if kind == "flow_grpo":
            odds_at = torch.where(now == 1, after, now)
            s = level * (now / (1 - odds_at)).sqrt()
        drift = s.square() * dt / (2 * now)
        A, B, sigma = 1 + drift, dt + drift * (1 - now), s * (-dt).sqrt()
    ones = torch.ones_like(now)
    t = num_train_timesteps * now
    name = "flow_ode" if kind == "ode" else kind
    return TransitionTable(A=A, B=B, sigma=sigma, timesteps=t, x0_A=ones, x0_B=-now, name=name, input_scale=ones, dt=dt)


def edm_euler_table(
    sigmas: Tensor | Sequence[float], *, prediction: str = "v", timesteps: Tensor | Sequence[float] | None = None
) -> TransitionTable:
    """Euler steps of EDM probability flow without churn (arXiv 2206.00364): x' = x + (sigma' - sigma)(x - x0)/sigma.

    Here x = x0 + sigma eps (variance exploding); the network sees x / sqrt(sigma^2 + 1) and t = ln(sigma) / 4, which is
    how Stable Video Diffusion was trained.

    Args:
        sigmas: [S+1], strictly decreasing, ending with 0.
        prediction: "v" (x0 = x / (sigma^2 + 1) - sigma a / sqrt(sigma^2 + 1)), "epsilon" (x0 = x - sigma a) or "x0".
        timesteps: [S], what the network is given as t where that is not ln(sigma) / 4 (discrete-time models).

    Raises:
        ValueError: for any argument out of its range.
    """
    return _edm_table("euler", sigmas, 0.0, prediction, timesteps)


def edm_ancestral_table(
    sigmas: Tensor | Sequence[float],
    *,
    noise_level: NoiseLevel,
    prediction: str = "v",
    timesteps: Tensor | Sequence[float] | None = None,
) -> TransitionTable:
    """Euler ancestral: go down to sigma_down, then add sigma_up of noise so that sigma_down^2 + sigma_up^2 = sigma'^2.

    sigma_up = noise_level * sigma' sqrt(1 - sigma'^2 / sigma^2). Level 0 is :func:`edm_euler_table`, 1 the usual
    ancestral sampler. The last step (to sigma' = 0) is deterministic.

    Args:
        sigmas: [S+1], strictly decreasing, ending with 0.
        noise_level: in [0, 1], one number or one per step.
        prediction: as in :func:`edm_euler_table`.
        timesteps: as in :func:`edm_euler_table`.

    Raises:
        ValueError: for any argument out of its range.
    """
    return _edm_table("euler_ancestral", sigmas, noise_level, prediction, timesteps)


def lcm_table(
    alphas_cumprod: Tensor,
    timesteps: Tensor | Sequence[int],
    *,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
    prediction: str = "epsilon",
) -> TransitionTable:
    r"""Multistep consistency sampling (arXiv 2310.04378; T2V-Turbo): x' = sqrt(alpha') f + sqrt(1 - alpha') z.

    f = c_skip x + c_out x0 is the clean estimate, with c_skip = sigma_data^2 / ((c t)^2 + sigma_data^2), c_out = c t /
    sqrt((c t)^2 + sigma_data^2), c = timestep_scaling. The last step returns f itself and has no noise. The noise of
    the other steps is part of the sampler and has no level to choose.

    Args:
        alphas_cumprod: [T].
        timesteps: int [S], strictly decreasing.
        timestep_scaling: c above.
        sigma_data: standard deviation of the data as seen by the distillation.
        prediction: as in :func:`ddim_table`.

    Raises:
        ValueError: for any argument out of its range, and for "epsilon" with a zero terminal SNR.
    """
    if not (timestep_scaling > 0 and sigma_data > 0):
        raise ValueError(f"lcm: timestep_scaling and sigma_data must be > 0, got {timestep_scaling} and {sigma_data}")
    t, alpha, scale = _vp_rows("lcm", alphas_cumprod, timesteps, prediction, None)
    x0_A, x0_B, _, _ = _vp_estimates("lcm", alpha, scale, prediction)
    scaled_t = t.double() * timestep_scaling
    c_skip = sigma_data**2 / (scaled_t.square() + sigma_data**2)
    c_out = scaled_t / (scaled_t.square() + sigma_data**2).sqrt()
    f_A, f_B = c_skip + c_out * x0_A, c_out * x0_B
    alpha_next = torch.cat([alpha[1:], alpha.new_ones(1)])
    signal = alpha_next.sqrt()
    return TransitionTable(
        A=signal * f_A,
        B=signal * f_B,
        sigma=(1 - alpha_next).clamp_min(0.0).sqrt(),
        timesteps=t.double(),
        x0_A=f_A,
        x0_B=f_B,
        name="lcm",
        input_scale=torch.ones_like(alpha),
    )


# ---------------------------------------------------------------------------------------- what cannot be a table

_HIGHER_ORDER = "a higher-order solver: several network calls per step, so x' is not affine in one action"
_MULTISTEP = "a multistep solver: x' depends on earlier outputs, so it is not Markov in x and has no policy density"
_CHURN = "a sampler with churn: noise is added before the network sees x, so x and the action do not fix the mean of x'"
_REFUSED = {
    _HIGHER_ORDER: ("heun", "kdpm2", "singlestep", "restart"),
    _MULTISTEP: ("dpm", "unipc", "deis", "ipndm", "pndm", "plms", "lms", "sasolver"),
    _CHURN: ("churn",),
}


def refuse_sampler(name: str) -> None:
    """Raise if the named sampler (or diffusers scheduler class) is known not to fit an affine, Markov table.

    Args:
        name: a sampler or scheduler name, in any spelling ("DPM++ 2M", "UniPCMultistepScheduler", "heun").

    Raises:
        ValueError: with the reason and what to use instead. Returns None for any other name, known here or not.
    """
    plain = "".join(c for c in name.lower() if c.isalnum()).replace("ddpm", "")
    for reason, words in _REFUSED.items():
        if any(word in plain for word in words):
            raise ValueError(
                f"sampler {name!r} is refused: it is {reason}. Use a first-order sampler on the same noise grid: "
                "'ddim' for epsilon, v and x0 models; 'flow_ode', 'flow_grpo', 'dance' or 'cps' for flow models; "
                "'euler' or 'euler_ancestral' for EDM models"
            )


def check_scheduler_config(config: Mapping[str, Any]) -> None:
    """Refuse the options of a diffusers scheduler config that make a step non-affine in the network output.

    Args:
        config: the scheduler's config (``scheduler_config.json``); options that are absent count as off.

    Raises:
        ValueError: if ``clip_sample`` or ``thresholding`` is on, or a churn is set.
    """
    for option in ("clip_sample", "thresholding"):
        if config.get(option):
            raise ValueError(
                f"scheduler option {option}={config[option]!r} clamps the clean estimate, so x' is not affine in the "
                f"network output and has no Gaussian policy density; set {option}=False (latent models do not need it)"
            )
    if config.get("s_churn"):
        raise ValueError(f"s_churn={config['s_churn']!r}: churn is refused, set it to 0 or use 'euler_ancestral'")


# ------------------------------------------------------------------------------------------------------- helpers


def _vp_rows(
    name: str, alphas_cumprod: Tensor, timesteps: Tensor | Sequence[int], prediction: str, latent_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Validated timesteps (int64 [S]), alphas and latent scales at them (float64 [S])."""
    alphas = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
    t = torch.as_tensor(timesteps, device="cpu")
    if alphas.ndim != 1 or not bool(((alphas >= 0) & (alphas <= 1)).all()) or bool((alphas.diff() > 0).any()):
        raise ValueError(f"{name}: alphas_cumprod must be [T], in [0, 1], non-increasing; got {tuple(alphas.shape)}")
    if t.ndim != 1 or len(t) == 0:
        raise ValueError(f"{name}: at least one denoising step is needed, got timesteps of shape {tuple(t.shape)}")
    if t.is_floating_point() and bool((t != t.round()).any()):
        raise ValueError(f"{name}: timesteps index alphas_cumprod and must be whole numbers, got {t.tolist()}")
    t = t.long()
    if bool((t.diff() >= 0).any()) or int(t[0]) >= len(alphas) or int(t[-1]) < 0:
        raise ValueError(
            f"{name}: timesteps must fall strictly (noisiest first) within 0 .. {len(alphas) - 1}, got {t.tolist()}"
        )
    if latent_scale is not None and (latent_scale.shape != alphas.shape or bool((latent_scale <= 0).any())):
        raise ValueError(f"{name}: latent_scale must be > 0, {tuple(alphas.shape)}; got {tuple(latent_scale.shape)}")
    alpha = alphas[t]
    if prediction == "epsilon" and float(alpha[0]) < MIN_ALPHA_EPSILON:
        raise ValueError(
            f"{name}: alphas_cumprod is {float(alpha[0]):.3g} at t = {int(t[0])} (zero terminal SNR), where an epsilon "
            "prediction says nothing about x0; use a model with v or x0 prediction, or a grid starting at a smaller t"
        )
    scale = torch.ones_like(alpha) if latent_scale is None else latent_scale.to("cpu", torch.float64)[t]
    return t, alpha, scale


def _vp_estimates(name: str, alpha: Tensor, scale: Tensor, prediction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0_A, x0_B, eps_A, eps_B): x0 = x0_A x + x0_B a, eps = eps_A x + eps_B a, for x = sqrt(alpha) s x0 + ... eps."""
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "epsilon":
        return 1 / (signal * scale), -noise / (signal * scale), zero, one
    if prediction == "v":
        return signal / scale, -noise / scale, noise, signal
    if prediction == "x0":
        if bool((noise == 0).any()):
            raise ValueError(f"{name}: x0 prediction needs alphas_cumprod < 1 at every visited timestep")
        return zero, one, 1 / noise, -signal * scale / noise
    raise ValueError(f"{name}: prediction must be 'epsilon', 'v' or 'x0', got {prediction!r}")


def _edm_table(
    name: str,
    sigmas: Tensor | Sequence[float],
    noise_level: NoiseLevel,
    prediction: str,
    timesteps: Tensor | Sequence[float] | None,
) -> TransitionTable:
    grid = _sigma_grid(name, sigmas, largest=math.inf)
    now, after = grid[:-1], grid[1:]
    level = _noise_levels(name, "noise_level", noise_level, len(now), upper=1.0)
    up = level * after * (1 - (after / now).square()).sqrt()
    keep = (after.square() - up.square()).clamp_min(0.0).sqrt() / now  # x' = x0 + (sigma_down / sigma) (x - x0)
    c_in = 1 / (now.square() + 1).sqrt()
    ones = torch.ones_like(now)
    estimates = {"v": (c_in.square(), -now * c_in), "epsilon": (ones, -now), "x0": (torch.zeros_like(now), ones)}
    if prediction not in estimates:
        raise ValueError(f"{name}: prediction must be one of {', '.join(estimates)}, got {prediction!r}")
    x0_A, x0_B = estimates[prediction]
    t = 0.25 * now.log() if timesteps is None else torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
    return TransitionTable(
        A=keep + (1 - keep) * x0_A,
        B=(1 - keep) * x0_B,
        sigma=up,
        timesteps=t,
        x0_A=x0_A,
        x0_B=x0_B,
        name=name,
        input_scale=c_in,
    )


def _sigma_grid(name: str, sigmas: Tensor | Sequence[float], largest: float) -> Tensor:
    grid = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"{name}: sigmas must be [S+1] with at least one denoising step, got {tuple(grid.shape)}")
    if bool((grid.diff() >= 0).any()) or not bool(torch.isfinite(grid).all()) or float(grid[0]) > largest:
        raise ValueError(f"{name}: sigmas must fall strictly from at most {largest} to 0, got {grid.tolist()}")
    if float(grid[-1]) != 0.0:
        raise ValueError(f"{name}: the last sigma must be 0 (clean), got {float(grid[-1]):.6g}; append 0 to the grid")
    return grid


def _noise_levels(name: str, argument: str, level: NoiseLevel, num_steps: int, upper: float) -> Tensor:
    levels = torch.as_tensor(level, dtype=torch.float64, device="cpu")
    if levels.ndim == 0:
        levels = levels.expand(num_steps)
    if levels.shape != (num_steps,):
        got = tuple(levels.shape)
        raise ValueError(f"{name}: {argument} must be one number or one per step ({num_steps}), got shape {got}")
    if not bool(((levels >= 0) & (levels <= upper)).all()):
        allowed = "0 (this sampler has no noise)" if upper == 0 else f"in [0, {upper:g}]"
        raise ValueError(f"{name}: {argument} must be {allowed} at every step, got {levels.tolist()}")
    return levels
