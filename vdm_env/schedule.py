r"""Noise schedules: how much noise belongs to which timestep, in training (any t) and on a sampling grid (S steps).

Three families cover the field. Each is a small frozen dataclass with the same members, so that losses written for any t
(supervised, DPO, KTO, NFT, distillation) do not care which one they meet:

=====================  ============================================  =================  ===================
family                 noised latents                                network output     t
=====================  ============================================  =================  ===================
:class:`VPSchedule`    sqrt(alpha_t) s_t x0 + sqrt(1 - alpha_t) eps  epsilon, v or x0   integers 0 .. T-1
:class:`FlowSchedule`  (1 - sigma) x0 + sigma eps                    eps - x0 (flow)    T sigma, in (0, T]
:class:`EDMSchedule`   x0 + sigma eps                                v, preconditioned  ln(sigma) / 4
=====================  ============================================  =================  ===================

``schedule.table(num_steps, sampler, noise_level)`` gives the :class:`~vdm_env.transition.TransitionTable` of a sampler
on the family's usual grid; for another grid call the builders of ``vdm_env.samplers`` directly. The grids are
defined in ``vdm_env.grids`` and importable from here too.

Shapes: x0, noise, x_t, output are [B, ...]; t is [B]; results have the dtype of x0 or x_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vdm_env.grids import (
    ddim_timesteps,
    flow_sigmas,
    flow_sigmas_double_shift,
    karras_sigmas,
    latent_scale_lvdm,
    lcm_timesteps,
    linear_alphas_cumprod,
    linear_quadratic_sigmas,
    opensora_shift,
    opensora_timesteps,
    rescale_zero_terminal_snr,
    scaled_linear_alphas_cumprod,
    shift_sigmas,
    snr_shift,
    stretch_to_terminal,
)
from vdm_env.host import on_host, upload
from vdm_env.samplers import (
    NoiseLevel,
    ddim_table,
    edm_ancestral_table,
    edm_euler_table,
    flow_table,
    lcm_table,
    refuse_sampler,
)
from vdm_env.transition import TransitionTable

__all__ = [
    "EDMSchedule",
    "FlowSchedule",
    "NoiseLevel",
    "Schedule",
    "VPSchedule",
    "ddim_timesteps",
    "flow_sigmas",
    "flow_sigmas_double_shift",
    "karras_sigmas",
    "latent_scale_lvdm",
    "lcm_timesteps",
    "linear_alphas_cumprod",
    "linear_quadratic_sigmas",
    "make_table",
    "opensora_shift",
    "opensora_timesteps",
    "rescale_zero_terminal_snr",
    "scaled_linear_alphas_cumprod",
    "shift_sigmas",
    "snr_shift",
    "stretch_to_terminal",
]


class Schedule(Protocol):
    """What the three families have in common."""

    @property
    def prediction(self) -> str:
        """What the network emits: "epsilon", "v", "x0" or "flow"."""

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of training timesteps (the scale of t)."""

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names that :meth:`table` accepts, the usual one first."""

    @property
    def init_sigma(self) -> float:
        """Standard deviation of the latents that a rollout starts from."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noised latents x_t [B, ...] from clean ones, unit noise and t [B]."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network would emit for ``add_noise(x0, noise, t)``."""

    def x0_from(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The clean estimate that belongs to a network output."""

    def input_scale(self, t: Tensor) -> Tensor:
        """The network sees ``input_scale(t) * x_t``; [B]."""

    def sample_timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        """Random t [B] on the CPU as the family is trained: the unit :meth:`add_noise` and the network take."""

    def table(self, num_steps: int, sampler: str, noise_level: NoiseLevel | None = None) -> TransitionTable:
        """The table of a sampler on this family's grid of `num_steps` steps; None is the sampler's published noise."""


@dataclass(frozen=True, eq=False, kw_only=True)
class VPSchedule:
    """Variance-preserving discrete diffusion: VideoCrafter2, ModelScope, T2V-Turbo, AnimateDiff, CogVideoX.

    Raises:
        ValueError: if alphas_cumprod is no non-increasing [T] in [0, 1], if latent_scale does not fit it, or if an
            epsilon-predicting network is combined with a zero terminal SNR.
    """

    alphas_cumprod: Tensor
    """[T], signal power at every training timestep."""
    prediction: str = "epsilon"
    """"epsilon", "v" or "x0"."""
    latent_scale: Tensor | None = None
    """s_t [T] of LVDM / VideoCrafter2; None for all others."""
    spacing: str = "leading"
    """Grid of :func:`vdm_env.grids.ddim_timesteps`."""
    steps_offset: int = 1
    """Added to a "leading" grid."""
    final_alpha_cumprod: float | None = None
    """alpha after the last step; None is ``alphas_cumprod[0]``, 1.0 diffusers' set_alpha_to_one."""
    lcm_origin_steps: int = 50
    """Teacher grid of a consistency-distilled network."""

    def __post_init__(self) -> None:
        # one table proves everything: ranges, shapes, prediction, epsilon against zero terminal SNR
        last = len(self.alphas_cumprod) - 1 if self.alphas_cumprod.ndim == 1 else 0
        ddim_table(self.alphas_cumprod, [last], eta=0.0, prediction=self.prediction, latent_scale=self.latent_scale)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("ddim", "lcm") if self.latent_scale is None else ("ddim",)

    @property
    def init_sigma(self) -> float:
        return 1.0

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, sigma, scale = self._rows(t, x0)
        return signal * scale * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        signal, sigma, scale = self._rows(t, x0)
        return signal * noise - sigma * scale * x0

    def x0_from(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "x0":
            return output
        signal, sigma, scale = self._rows(t, x_t)
        if self.prediction == "v":
            return (signal * x_t - sigma * output) / scale
        return (x_t - sigma * output) / (signal * scale)

    def input_scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float32)

    def sample_timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.num_train_timesteps, (batch,), generator=generator, device=generator.device).cpu()

    def table(self, num_steps: int, sampler: str, noise_level: NoiseLevel | None = None) -> TransitionTable:
        _check_sampler(sampler, self.samplers, type(self).__name__)
        if sampler == "lcm":
            _refuse_level(sampler, noise_level, fixed=1.0)
            t = lcm_timesteps(num_steps, self.lcm_origin_steps, num_train_timesteps=self.num_train_timesteps)
            return lcm_table(self.alphas_cumprod, t, prediction=self.prediction)
        t = ddim_timesteps(self.num_train_timesteps, num_steps, spacing=self.spacing, steps_offset=self.steps_offset)
        return ddim_table(
            self.alphas_cumprod,
            t,
            eta=1.0 if noise_level is None else noise_level,
            prediction=self.prediction,
            latent_scale=self.latent_scale,
            final_alpha_cumprod=self.final_alpha_cumprod,
        )

    def _rows(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sqrt(alpha), sqrt(1 - alpha) and s at t, as [B, 1, ...]; roots are taken in float64."""
        if t.is_floating_point() and t.device.type == "cpu" and bool((t != t.round()).any()):
            raise ValueError(f"this schedule is discrete: t must be whole numbers in 0 .. T-1, got {t.tolist()}")
        index = on_host(t).long()
        if bool(((index < 0) | (index >= self.num_train_timesteps)).any()):
            raise ValueError(f"t must be in 0 .. {self.num_train_timesteps - 1}, got {index.tolist()}")
        alpha = self.alphas_cumprod.to("cpu", torch.float64)[index]
        scale = torch.ones_like(alpha)
        if self.latent_scale is not None:
            scale = self.latent_scale.to("cpu", torch.float64)[index]
        return _like(alpha.sqrt(), like), _like((1 - alpha).sqrt(), like), _like(scale, like)


@dataclass(frozen=True, eq=False, kw_only=True)
class FlowSchedule:
    """Rectified flow: Wan, HunyuanVideo, LTX-Video, Mochi, Open-Sora. Outputs are eps - x0; adapters flip the sign.

    Raises:
        ValueError: if shift or num_train_timesteps is not positive, terminal is outside (0, 1), or the spacing unknown.
    """

    shift: float = 1.0
    """Timestep shift r: sigma -> r sigma / (1 + (r - 1) sigma); more than 1 spends more steps at high noise."""
    num_train_timesteps: int = 1000
    """The network is given t = num_train_timesteps * sigma."""
    spacing: str = "uniform"
    """Grid before the shift: "uniform", or Mochi's "linear_quadratic"."""
    terminal: float | None = None
    """Smallest sigma of the grid before the final 0, to which LTX-Video stretches it; None leaves it."""

    def __post_init__(self) -> None:
        if self.spacing not in ("uniform", "linear_quadratic") or not (self.terminal is None or 0 < self.terminal < 1):
            raise ValueError(
                "expected spacing 'uniform' or 'linear_quadratic' and terminal None or in (0, 1), got "
                f"{self.spacing!r} and {self.terminal}"
            )
        if not self.shift > 0 or self.num_train_timesteps < 1:
            raise ValueError(f"shift and num_train_timesteps must be > 0, got {self.shift}, {self.num_train_timesteps}")

    @property
    def prediction(self) -> str:
        return "flow"

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("flow_ode", "flow_grpo", "dance", "cps")

    @property
    def init_sigma(self) -> float:
        return 1.0

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = self._sigma(t, x0)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0

    def x0_from(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return x_t - self._sigma(t, x_t) * output

    def input_scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float32)

    def sample_timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        """Uniform sigma, then shifted."""
        u = 1 - torch.rand(batch, generator=generator, device=generator.device).cpu()  # (0, 1]: sigma 0 has no noise
        return self.num_train_timesteps * self.shift * u / (1 + (self.shift - 1) * u)

    def table(self, num_steps: int, sampler: str, noise_level: NoiseLevel | None = None) -> TransitionTable:
        _check_sampler(sampler, self.samplers, type(self).__name__)
        kind = "ode" if sampler == "flow_ode" else sampler
        published = {"ode": 0.0, "flow_grpo": 0.7, "dance": 0.25, "cps": 0.7}[kind]
        return flow_table(
            self.sigmas(num_steps),
            kind=kind,
            noise_level=published if noise_level is None else noise_level,
            num_train_timesteps=self.num_train_timesteps,
        )

    def sigmas(self, num_steps: int) -> Tensor:
        """The grid [S+1], float64, from 1 to 0."""
        if self.spacing == "linear_quadratic":
            grid = shift_sigmas(linear_quadratic_sigmas(num_steps), self.shift)
        else:
            grid = flow_sigmas(num_steps, self.shift)
        return grid if self.terminal is None else stretch_to_terminal(grid, self.terminal)

    def _sigma(self, t: Tensor, like: Tensor) -> Tensor:
        if t.device.type == "cpu" and bool(((t < 0) | (t > self.num_train_timesteps)).any()):
            raise ValueError(f"t must be in [0, {self.num_train_timesteps}], got {t.tolist()}")
        return _like(t.double() / self.num_train_timesteps, like)


@dataclass(frozen=True, eq=False, kw_only=True)
class EDMSchedule:
    """EDM (arXiv 2206.00364) with sigma_data = 1, i.e. v-prediction on x / sqrt(sigma^2 + 1): Stable Video Diffusion.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max, rho > 0 and p_std > 0.
    """

    sigma_min: float = 0.002
    """Smallest noise level of the grid before the final 0."""
    sigma_max: float = 700.0
    """Largest noise level, the standard deviation of the initial latents."""
    rho: float = 7.0
    """Karras exponent."""
    p_mean: float = 1.0
    """Mean of ln(sigma) in training."""
    p_std: float = 1.6
    """Standard deviation of ln(sigma) in training."""

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max and self.rho > 0 and self.p_std > 0):
            raise ValueError(f"expected 0 < sigma_min < sigma_max, rho > 0 and p_std > 0, got {self}")

    @property
    def prediction(self) -> str:
        return "v"

    @property
    def num_train_timesteps(self) -> int:
        """Nominal: training noise is continuous here; draw t with :meth:`sample_timesteps`."""
        return 1000

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("euler", "euler_ancestral")

    @property
    def init_sigma(self) -> float:
        return self.sigma_max

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return x0 + _like(_edm_sigma(t), x0) * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = _edm_sigma(t)
        c_in = 1 / (sigma.square() + 1).sqrt()
        return _like(c_in, x0) * noise - _like(sigma * c_in, x0) * x0

    def x0_from(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        sigma = _edm_sigma(t)
        c_in = 1 / (sigma.square() + 1).sqrt()
        return _like(c_in.square(), x_t) * x_t - _like(sigma * c_in, x_t) * output

    def input_scale(self, t: Tensor) -> Tensor:
        return (1 / (_edm_sigma(t).square() + 1).sqrt()).float()

    def sample_timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        """ln(sigma) ~ N(p_mean, p_std^2)."""
        z = torch.randn(batch, generator=generator, device=generator.device).cpu()
        return 0.25 * (self.p_mean + self.p_std * z)

    def table(self, num_steps: int, sampler: str, noise_level: NoiseLevel | None = None) -> TransitionTable:
        _check_sampler(sampler, self.samplers, type(self).__name__)
        sigmas = karras_sigmas(num_steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)
        if sampler == "euler":
            _refuse_level(sampler, noise_level, fixed=0.0)
            return edm_euler_table(sigmas)
        return edm_ancestral_table(sigmas, noise_level=1.0 if noise_level is None else noise_level)


def make_table(
    schedule: Schedule, num_steps: int, sampler: str, noise_level: NoiseLevel | None = None
) -> TransitionTable:
    """The same as ``schedule.table(num_steps, sampler, noise_level)``, as a function."""
    return schedule.table(num_steps, sampler, noise_level)


def _edm_sigma(t: Tensor) -> Tensor:
    return (4 * t.double()).exp()


def _like(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, 1, ...] in the device and dtype of `like`."""
    if values.shape != like.shape[:1]:
        raise ValueError(f"t must be [B] with B = {len(like)}, one per sample; got {tuple(values.shape)}")
    return upload(values, like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def _check_sampler(sampler: str, fitting: tuple[str, ...], family: str) -> None:
    refuse_sampler(sampler)
    if sampler not in fitting:
        raise ValueError(f"sampler {sampler!r} does not fit a {family}; choose one of {', '.join(fitting)}")


def _refuse_level(sampler: str, noise_level: NoiseLevel | None, fixed: float) -> None:
    if noise_level is not None and not bool((torch.as_tensor(noise_level) == fixed).all()):
        raise ValueError(
            f"the noise of sampler {sampler!r} is fixed; noise_level must be None or {fixed:g}, got {noise_level}"
        )
