"""Gaussian data with the exact denoiser: a test bed in which what an algorithm should find is known in closed form.

Each prompt p has a mean m_p per latent channel, and clean latents are x0 ~ N(m_p, s^2 I). The network emits the exact
posterior mean in the schedule's own terms, which is affine:

    a(x_t, t, p) = p_t x_t + q_t m_p

Every sampler of the package is affine too (`vdm_env.transition`), so the sampled x_S is Gaussian with mean gain * m_p
and a known standard deviation (`final_law`). The means are the network's only weights: training moves them, and where
they should end up is a division (`optimal_means`).

Legend: B videos, P prompts, C latent channels (always 3: red, green, blue), F H W frames, rows, columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vdm_env.models.base import Condition, ModelSpec, latent_shape
from vdm_env.schedule import FlowSchedule, VPSchedule, scaled_linear_alphas_cumprod
from vdm_env.transition import TransitionTable

PIXEL_RANGE = 8.0
"""Latents in [-8, 8] map to pixels in [0, 1]: wide enough that the clamp never acts on data of unit scale."""

VP_SCHEDULE = VPSchedule(alphas_cumprod=scaled_linear_alphas_cumprod(1000, 0.00085, 0.012), prediction="epsilon")
FLOW_SCHEDULE = FlowSchedule(shift=3.0)


class GaussianDenoiser(nn.Module):
    """The posterior mean of N(m_p, s^2 I) data as epsilon, v, x0 or flow.

    Args:
        means: [P, C], the initial m_p; they become the weight of the only layer, `mean`, which LoRA can take too.
        std: s > 0 of the data.
        schedule: says how x_t is made and what the network emits.
    """

    def __init__(self, means: Tensor, std: float, schedule: VPSchedule | FlowSchedule) -> None:
        super().__init__()
        self.std, self.schedule = std, schedule
        prompts, channels = means.shape
        # skip_init: nn.Linear would draw initial weights from the global random state
        self.mean = nn.utils.skip_init(nn.Linear, prompts, channels, bias=False, device=means.device, dtype=means.dtype)
        with torch.no_grad():
            self.mean.weight.copy_(means.T)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """p_t and q_t, float64 [B] on the CPU, at timesteps t [B]."""
        t = t.detach().to("cpu", torch.float64)
        if isinstance(self.schedule, FlowSchedule):
            level = t / self.schedule.num_train_timesteps
            signal, noise = 1 - level, level
        else:
            alpha = self.schedule.alphas_cumprod.double().cpu()[t.round().long()]
            signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        variance = (signal * self.std) ** 2 + noise**2  # of x_t
        clean = self.std**2 * signal / variance, noise**2 / variance
        eps = noise / variance, -noise * signal / variance
        if self.schedule.prediction == "epsilon":
            return eps
        if self.schedule.prediction == "x0":
            return clean
        if self.schedule.prediction == "v":
            return signal * eps[0] - noise * clean[0], signal * eps[1] - noise * clean[1]
        return eps[0] - clean[0], eps[1] - clean[1]

    def forward(self, x_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """Network output [B,C,F,H,W] at latents x_t [B,C,F,H,W], timesteps t [B] and one-hot prompts [B,P]."""
        p, q = (c.to(x_t.device, x_t.dtype).view(-1, 1, 1, 1, 1) for c in self.coefficients(t))
        mean = self.mean(prompt.to(self.mean.weight.dtype)).to(x_t.dtype)
        return p * x_t + q * mean[:, :, None, None, None]


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianModel:
    """A `VideoModel` over `GaussianDenoiser`; its codec is a change of units, so latents are videos."""

    spec: ModelSpec
    denoiser: nn.Module
    schedule: VPSchedule | FlowSchedule
    prompts: tuple[str, ...]
    std: float

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(x_t, t, condition["prompt"])

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """One-hot rows {"prompt": [B,P]}; "" is all zeros, so unconditional data have mean 0.

        Raises:
            ValueError: a text that is not one of the world's.
        """
        unknown = [text for text in prompts if text and text not in self.prompts]
        if unknown:
            raise ValueError(f"prompt {unknown[0]!r} is not one of this world's {list(self.prompts)}; use these")
        rows = [[float(text == name) for name in self.prompts] for text in prompts]
        weight = next(self.denoiser.parameters())
        return {"prompt": torch.tensor(rows, dtype=weight.dtype, device=weight.device)}

    def encode(self, video: Tensor) -> Tensor:
        """[B,F,3,H,W] in [0,1] to latents [B,3,F,H,W]."""
        return to_latents(video).transpose(1, 2)

    def decode(self, latents: Tensor, frames: Tensor | None = None) -> Tensor:
        """Latents [B,3,F,H,W] to video [B,n,3,H,W]; latents beyond +-8 are clamped, and get no gradient."""
        z = latents.transpose(1, 2)
        if frames is not None:
            z = z[torch.arange(len(z), device=z.device)[:, None], frames.to(z.device)]
        return (0.5 + z / (2 * PIXEL_RANGE)).clamp(0, 1)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return latent_shape(self.spec, num_frames, height, width)


class TargetReward:
    """R = -mean (x0 - target)^2 in latent units: 0 is perfect, and the best means are `optimal_means`.

    Args:
        target: one value for all channels, or three.
    """

    name = "Target"
    differentiable = True
    frames = "all"
    range = (-math.inf, 0.0)

    def __init__(self, target: float | Sequence[float]) -> None:
        self.target = torch.as_tensor(target, dtype=torch.float64).expand(3)

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        error = to_latents(video) - self.target.to(video)[:, None, None]
        return -error.square().mean((1, 2, 3, 4))


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalLaw:
    """Law of each element of x_S: N(gain * m_p, std^2), independent of the others."""

    gain: float
    std: float


def to_latents(video: Tensor) -> Tensor:
    """Pixels in [0, 1] to latent units, shape kept."""
    return (video - 0.5) * (2 * PIXEL_RANGE)


def gaussian_model(
    means: Tensor,
    *,
    std: float = 0.5,
    prompts: Sequence[str] | None = None,
    schedule: VPSchedule | FlowSchedule = FLOW_SCHEDULE,
    num_steps: int = 5,
    size: tuple[int, int, int] = (2, 2, 2),
) -> GaussianModel:
    """A world of Gaussian data.

    Args:
        means: [P, 3], m_p in latent units; its dtype (float32 or float64) is the network's.
        std: s > 0.
        prompts: P texts; "prompt 0", "prompt 1", ... if None.
        schedule: `FLOW_SCHEDULE`, `VP_SCHEDULE` or any other without a latent scale.
        num_steps: default number of denoising steps.
        size: default (num_frames, height, width) of the videos.

    Raises:
        ValueError: means that are not [P, 3], std <= 0, another number of prompts, or a schedule with a latent scale.
    """
    if means.ndim != 2 or means.shape[1] != 3 or not len(means):
        raise ValueError(
            f"means has shape {tuple(means.shape)}, expected [P, 3]: one row per prompt, one column per colour"
        )
    if not std > 0:
        raise ValueError(f"std is {std}, expected a number > 0: the exact denoiser divides by the variance")
    texts = tuple(prompts) if prompts is not None else tuple(f"prompt {i}" for i in range(len(means)))
    if len(texts) != len(means):
        raise ValueError(f"{len(texts)} prompts for {len(means)} rows of means, expected one prompt per row")
    if getattr(schedule, "latent_scale", None) is not None:
        raise ValueError("the schedule has a latent scale s_t, which the closed form leaves out; give one without")
    flow = isinstance(schedule, FlowSchedule)
    spec = ModelSpec(
        name="Gaussian",
        num_frames=size[0],
        height=size[1],
        width=size[2],
        spatial_stride=1,
        latent_channels=3,
        num_steps=num_steps,
        sampler="flow_grpo" if flow else "ddim",
        noise_level=0.7 if flow else 1.0,
        lora_targets=("mean",),
    )
    denoiser = GaussianDenoiser(means, std, schedule).eval().requires_grad_(False)
    return GaussianModel(spec=spec, denoiser=denoiser, schedule=schedule, prompts=texts, std=std)


def final_law(model: GaussianModel, table: TransitionTable, *, init_sigma: float = 1.0) -> FinalLaw:
    """Law of the last latents, by carrying mean and variance through x' = A x + B (p x + q m) + sigma z.

    Args:
        model: the world; its means do not matter.
        table: the sampler.
        init_sigma: standard deviation of x at step 0 (whose mean is 0).
    """
    p, q = model.denoiser.coefficients(table.timesteps)  # type: ignore[operator]
    gain, variance = 0.0, init_sigma**2
    for k in range(table.num_steps):
        keep = float(table.A[k] + table.B[k] * p[k])
        gain = keep * gain + float(table.B[k] * q[k])
        variance = keep**2 * variance + float(table.sigma[k]) ** 2
    return FinalLaw(gain=gain, std=math.sqrt(variance))


def optimal_means(law: FinalLaw, target: float | Sequence[float]) -> Tensor:
    """The m_p [3], float64, the same for every prompt, that maximise E[TargetReward(target)]: target / gain."""
    return torch.as_tensor(target, dtype=torch.float64).expand(3) / law.gain
