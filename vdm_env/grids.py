r"""Noise schedules and sampling grids as plain float64 tensors on the CPU.

First the signal power alpha_t ("alphas_cumprod") of discrete diffusion, then the grids that samplers walk along:
integer timesteps for DDIM and LCM, noise levels sigma with a final 0 for flow matching and EDM. All grids run from
noise to clean.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPACINGS = ("lvdm", "leading", "trailing", "linspace")

# ------------------------------------------------------------------------------------------------- alphas_cumprod


def scaled_linear_alphas_cumprod(
    num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Tensor:
    """alpha_t [T] of Stable Diffusion, VideoCrafter2 and ModelScope: betas linear in their square root."""
    _check_betas(num_train_timesteps, beta_start, beta_end)
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64).square()
    return (1 - betas).cumprod(0)


def linear_alphas_cumprod(
    num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02
) -> Tensor:
    """alpha_t [T] of DDPM (arXiv 2006.11239) and AnimateDiff: betas linear."""
    _check_betas(num_train_timesteps, beta_start, beta_end)
    return (1 - torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)).cumprod(0)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and stretch sqrt(alpha) so that alpha_{T-1} is exactly 0 and alpha_0 stays (arXiv 2305.08891, alg. 1)."""
    root = alphas_cumprod.double().sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


def snr_shift(alphas_cumprod: Tensor, shift_scale: float) -> Tensor:
    """Divide the signal-to-noise ratio by `shift_scale` > 0: CogVideoX uses 3 (2b) and 1 (5b), before the rescale."""
    if not shift_scale > 0:
        raise ValueError(f"shift_scale must be > 0, got {shift_scale}")
    alphas = alphas_cumprod.double()
    return alphas / (shift_scale + (1 - shift_scale) * alphas)


def latent_scale_lvdm(num_train_timesteps: int = 1000, final_scale: float = 0.7, ramp_steps: int = 400) -> Tensor:
    """s_t [T] of LVDM (VideoCrafter2 ``use_scale``): linear from 1 to `final_scale`, then constant."""
    if not 1 <= ramp_steps <= num_train_timesteps or not final_scale > 0:
        raise ValueError(
            f"expected 1 <= ramp_steps <= {num_train_timesteps} and final_scale > 0, got {ramp_steps}, {final_scale}"
        )
    scale = torch.full((num_train_timesteps,), final_scale, dtype=torch.float64)
    scale[:ramp_steps] = torch.linspace(1.0, final_scale, ramp_steps, dtype=torch.float64)
    return scale


# -------------------------------------------------------------------------------------------------- integer grids


def ddim_timesteps(num_train_timesteps: int, num_steps: int, spacing: str = "leading", steps_offset: int = 1) -> Tensor:
    """Timesteps int64 [S], decreasing.

    Args:
        num_train_timesteps: T.
        num_steps: steps asked for. "lvdm" gives more where it does not divide T (30 of 1000 gives 31), as the original.
        spacing: "lvdm" (every T // n-th, plus 1; VideoCrafter), "leading" (n times T // n, plus `steps_offset`;
            Stable Diffusion), "trailing" (ends at T-1; CogVideoX, zero terminal SNR) or "linspace" (0 .. T-1).
        steps_offset: for "leading" only.

    Raises:
        ValueError: for unknown spacings and for grids that leave 0 .. T-1.
    """
    _check_steps(num_steps, num_train_timesteps)
    stride = num_train_timesteps // num_steps
    if spacing == "lvdm":
        grid = torch.arange(0, num_train_timesteps, stride) + 1
    elif spacing == "leading":
        grid = torch.arange(num_steps) * stride + steps_offset
    elif spacing == "trailing":
        # i T / n written as one division, so that whole numbers come out whole
        share = torch.arange(1, num_steps + 1, dtype=torch.float64) * num_train_timesteps / num_steps
        grid = share.round().long() - 1
    elif spacing == "linspace":
        grid = torch.linspace(0, num_train_timesteps - 1, num_steps, dtype=torch.float64).round().long()
    else:
        raise ValueError(f"unknown spacing {spacing!r}; choose one of {', '.join(SPACINGS)}")
    if int(grid[-1]) >= num_train_timesteps or int(grid[0]) < 0:
        raise ValueError(
            f"the {spacing!r} grid of {num_steps} steps runs from {int(grid[0])} to {int(grid[-1])}, outside "
            f"0 .. {num_train_timesteps - 1}; use fewer steps, another spacing or another steps_offset"
        )
    return grid.flip(0)


def lcm_timesteps(num_steps: int, origin_steps: int = 50, num_train_timesteps: int = 1000) -> Tensor:
    """Timesteps int64 [S] of T2V-Turbo: every (origin // n)-th point of the teacher grid, from T-1 down.

    diffusers' LCM grid differs from it (4 steps: 999, 759, 499, 259 against 999, 759, 519, 279 here).
    """
    _check_steps(origin_steps, num_train_timesteps)
    _check_steps(num_steps, origin_steps)
    teacher = torch.arange(1, origin_steps + 1) * (num_train_timesteps // origin_steps) - 1
    return teacher.flip(0)[:: origin_steps // num_steps][:num_steps]


# ----------------------------------------------------------------------------------------------------- sigma grids


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """The timestep shift, sigma -> r sigma / (1 + (r - 1) sigma) with r = shift > 0; 0 and 1 stay."""
    if not shift > 0:
        raise ValueError(f"shift must be > 0, got {shift}")
    return shift * sigmas / ((1 - sigmas) + shift * sigmas)  # in this form sigma = 1 stays exactly 1


def flow_sigmas(num_steps: int, shift: float = 1.0) -> Tensor:
    """Flow-matching grid [S+1]: 1, (n-1)/n, .., 1/n, each shifted, then 0 (Wan, HunyuanVideo, Open-Sora)."""
    _check_steps(num_steps)
    return shift_sigmas(torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps, shift)


def flow_sigmas_double_shift(num_steps: int, shift: float, num_train_timesteps: int = 1000) -> Tensor:
    """The grid [S+1] that diffusers' FlowMatchEulerDiscreteScheduler makes when it is given no sigmas.

    Its smallest sigma is shifted twice, so the last step starts far too clean (shift 3, 50 steps: t = 8.9 in place of
    57.7). Flow-GRPO's SD3 scripts sample on it; here only for reproductions.
    """
    _check_steps(num_steps)
    end = shift_sigmas(torch.tensor(1.0 / num_train_timesteps, dtype=torch.float64), shift)
    inner = shift_sigmas(torch.linspace(1.0, float(end), num_steps, dtype=torch.float64), shift)
    return torch.cat([inner, inner.new_zeros(1)])


def stretch_to_terminal(sigmas: Tensor, terminal: float) -> Tensor:
    """Stretch a flow grid [S+1] linearly from 1 so that its last sigma before the final 0 is `terminal` (LTX-Video)."""
    if not 0 < terminal < 1:
        raise ValueError(f"terminal must be in (0, 1), got {terminal}")
    inner = 1 - sigmas[:-1]
    if not float(inner[-1]) > 0:
        raise ValueError("a grid of one step starts at 1 and cannot end elsewhere; ask for at least 2 steps")
    return torch.cat([1 - inner * ((1 - terminal) / inner[-1]), sigmas[-1:]])


def linear_quadratic_sigmas(num_steps: int, threshold: float = 0.025) -> Tensor:
    """Mochi's grid [S+1]: 1 - sigma rises linearly to `threshold` in the first half of the steps, then quadratically.

    With L = S // 2, 1 - sigma_i = threshold i / L, plus (i - L)^2 (1 - threshold S / L) / (S - L)^2 for i > L: value
    and slope are continuous, and the end is exactly 0 (github.com/genmoai/models, commit 075b6e3).
    """
    _check_steps(num_steps)
    half = num_steps // 2
    if half < 1 or not 0 < threshold * num_steps < half:
        raise ValueError(
            f"a linear-quadratic grid needs at least 2 steps and 0 < threshold < 0.5 or so, got {num_steps} steps and "
            f"threshold {threshold}"
        )
    i = torch.arange(num_steps + 1, dtype=torch.float64)
    bend = (1 - threshold * num_steps / half) / (num_steps - half) ** 2
    clean = threshold * i / half + (i - half).clamp_min(0).square() * bend
    clean[-1] = 1.0
    return 1 - clean


def opensora_shift(height: float, width: float, num_frames: float, dtype: torch.dtype = torch.float64) -> float:
    """Open-Sora 1.2's shift r = sqrt(H W / 512^2) sqrt(frames // 17 * 5), the time factor being 1 for a single frame.

    Args:
        height: of the video, in pixels.
        width: of the video, in pixels.
        num_frames: of the video.
        dtype: the released script computes in bfloat16, which moves timesteps by up to 0.5 of 1000.
    """
    h, w, frames = (torch.tensor(float(v), dtype=dtype) for v in (height, width, num_frames))
    space = (h * w / 512**2).sqrt()
    time = torch.ones_like(frames) if num_frames == 1 else (frames // 17 * 5).sqrt()
    if not float(space * time) > 0:
        raise ValueError(f"expected a positive size and 1 or at least 17 frames, got {height} x {width}, {num_frames}")
    return float(space * time)


def opensora_timesteps(
    num_steps: int,
    height: float,
    width: float,
    num_frames: float,
    num_train_timesteps: int = 1000,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Timesteps [S] in (0, T] of Open-Sora 1.2: T times :func:`flow_sigmas` at its own shift, without the final 0."""
    return num_train_timesteps * flow_sigmas(num_steps, opensora_shift(height, width, num_frames, dtype))[:-1]


def karras_sigmas(num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0) -> Tensor:
    """EDM grid [S+1] (arXiv 2206.00364, eq. 5): even in sigma^(1/rho), then 0. Defaults: Stable Video Diffusion."""
    _check_steps(num_steps)
    if not (0 < sigma_min < sigma_max and rho > 0):
        raise ValueError(f"expected 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max}, {rho}")
    grid = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps, dtype=torch.float64) ** rho
    return torch.cat([grid, grid.new_zeros(1)])


def _check_steps(num_steps: int, most: int | None = None) -> None:
    if isinstance(num_steps, bool) or num_steps != int(num_steps) or num_steps < 1:
        raise ValueError(f"num_steps must be a whole number of at least 1, got {num_steps!r}")
    if most is not None and num_steps > most:
        raise ValueError(f"{num_steps} steps do not fit on {most} timesteps; ask for at most {most}")


def _check_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> None:
    if num_train_timesteps < 1 or not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"expected T >= 1 and 0 < beta_start <= beta_end < 1, got {num_train_timesteps}, {beta_start}, {beta_end}"
        )
