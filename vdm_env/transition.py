r"""One denoising step as a Gaussian policy acting on a deterministic world. Start reading here.

Every first-order sampler of the field is **affine in what the network emits**. At denoising step k

    x' = A_k x + B_k a          (a: noise prediction, v, clean estimate or flow, whatever the model was trained to emit)

and a stochastic sampler adds sigma_k z, z ~ N(0, I). Since the added noise can be carried through B_k,

    x' = A_k x + B_k a_mean + sigma_k z   =   A_k x + B_k a ,     a = a_mean + (sigma_k / B_k) z ,

the *world* needs no randomness at all: it is the deterministic, differentiable map :func:`step`. The exploration
lives in the *policy*, which draws its action a ~ N(a_mean, (sigma_k / |B_k|)^2 I). One MDP then serves every family of
methods: policy gradients use :func:`log_prob` (DDPO, GRPO), reward back-propagation differentiates :func:`step`
(VADER, DRaFT), preference learning needs neither, and sigma_k = 0 is the ordinary deterministic sampler.

So a sampler is nothing but six columns of numbers, one row per denoising step: a :class:`TransitionTable`. This file is

1. the table                     :class:`TransitionTable`
2. what one does with it         :func:`step`, :func:`predict_x0`, :func:`log_prob`, :func:`kl`
3. scores published otherwise    :func:`cps_score`, :func:`flow_grpo_kl` (for reproduction; not densities, not nats)

Where the numbers come from: ``vdm_env.samplers`` has one builder per sampler (DDIM, flow ODE and SDEs, EDM, LCM) and
refuses those that are no table; ``vdm_env.schedule`` has the noise grids and the noising used in training.

Shapes: x, a, x' are [B, ...] (latents: [B, C, F, H, W]); k is int64 [B], so every sample may be at another step; a mask
is broadcastable to x (usually [B, 1, F, 1, 1]), 1 where the sampler is free and 0 where the latents are given and held.
Tables are float64 on the CPU; they are applied in float32 (float64 if x is float64).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from vdm_env.host import upload

Reduction = Literal["mean", "sum"]

MIN_ABS_B = 1e-8
"""Below this |B| the action no longer moves x', so no policy can carry the step's noise."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TransitionTable:
    """The numbers of one sampler on one grid. Every tensor is float64 [S], one row per denoising step k = 0 .. S-1.

    Raises:
        ValueError: if there is no step, if lengths differ, if a number is not finite, if sigma is negative, or if a
            step has noise that no action could carry (B ~ 0 with sigma > 0).
    """

    A: Tensor
    """Coefficient of x in the mean of x'."""
    B: Tensor
    """Coefficient of the action in the mean of x'. Often negative: that flips the sign of the noise, not its law."""
    sigma: Tensor
    """Standard deviation of x'; 0 where the step is deterministic."""
    timesteps: Tensor
    """What the network is given as t, in the network's own units (not necessarily whole numbers)."""
    x0_A: Tensor
    """Coefficient of x in the clean estimate."""
    x0_B: Tensor
    """Coefficient of the action in the clean estimate."""
    name: str
    """Sampler name, for messages."""
    input_scale: Tensor
    """The network sees input_scale * x (c_in of EDM; ones elsewhere)."""
    dt: Tensor | None = None
    """Flow tables only: sigma_{k+1} - sigma_k < 0, which :func:`flow_grpo_kl` needs."""
    _cache: dict[tuple[str, torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.A.ndim != 1 or len(self.A) == 0:
            raise ValueError(f"{self.name}: a table needs at least one denoising step, got shape {tuple(self.A.shape)}")
        for key, column in self._columns().items():
            if column.shape != self.A.shape or column.dtype != torch.float64:
                raise ValueError(
                    f"{self.name}: column {key} is {column.dtype} {tuple(column.shape)}, expected float64 "
                    f"{tuple(self.A.shape)}; build tables with the *_table functions of vdm_env.samplers"
                )
            if not bool(torch.isfinite(column).all()):
                raise ValueError(f"{self.name}: column {key} is not finite at steps {_where(~torch.isfinite(column))}")
        if bool((self.sigma < 0).any()):
            raise ValueError(f"{self.name}: sigma is negative at steps {_where(self.sigma < 0)}")
        lost = (self.sigma > 0) & (self.B.abs() <= MIN_ABS_B)
        if bool(lost.any()):
            raise ValueError(
                f"{self.name}: at steps {_where(lost)} there is noise but the network output has no influence (B ~ 0), "
                "so the noise cannot be a policy's; set the noise level to 0 at these steps or choose another grid"
            )

    @property
    def num_steps(self) -> int:
        """Number of denoising steps S."""
        return len(self.A)

    @cached_property
    def stochastic(self) -> Tensor:
        """True where the step has noise that the policy carries, bool [S]."""
        return (self.sigma > 0) & (self.B.abs() > MIN_ABS_B)

    @cached_property
    def action_std(self) -> Tensor:
        """Standard deviation of the policy per element, sigma / |B|, float64 [S]; 0 where the step has no noise."""
        return torch.where(self.stochastic, self.sigma / self.B.abs().clamp_min(MIN_ABS_B), 0.0)

    def to(self, device: torch.device | str) -> TransitionTable:
        """The same table (still float64) on another device."""
        moved: dict[str, Any] = {n: v.to(device) for n, v in self._columns().items()}
        return replace(self, **moved)

    def _columns(self) -> dict[str, Tensor]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}


# ---------------------------------------------------------------------------------------------- using a table


def step(table: TransitionTable, x: Tensor, a: Tensor, k: Tensor | int, mask: Tensor | None = None) -> Tensor:
    """Apply one denoising step: x' = m (A_k x + B_k a) + (1 - m) x. Deterministic and differentiable in x and a.

    Args:
        table: the sampler.
        x: latents [B, ...].
        a: the action, same shape; its mean gives the mean of x'.
        k: denoising step of every sample, int64 [B] in 0 .. S-1 (or one int for all).
        mask: optional, broadcastable to x; 1 = free, 0 = held.

    Returns:
        x' [B, ...], float32 (float64 if x is).

    Raises:
        ValueError: if shapes disagree or a step is outside the table (the range is checked for k on the CPU only, a
            check on a GPU would stall it).
    """
    x, a = _working(x, a)
    x_next = _coefficient(table, "A", k, x) * x + _coefficient(table, "B", k, x) * a
    if mask is None:
        return x_next
    mask = mask.to(x.device, x.dtype)
    return mask * x_next + (1 - mask) * x


def predict_x0(table: TransitionTable, x: Tensor, a: Tensor, k: Tensor | int) -> Tensor:
    """The clean estimate x0 = x0_A_k x + x0_B_k a, in the units the decoder expects. Arguments as in :func:`step`."""
    x, a = _working(x, a)
    return _coefficient(table, "x0_A", k, x) * x + _coefficient(table, "x0_B", k, x) * a


def log_prob(
    table: TransitionTable,
    x: Tensor,
    a_mean: Tensor,
    x_next: Tensor,
    k: Tensor | int,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Log density of x' under N(A_k x + B_k a_mean, sigma_k^2 I), the policy's mean action being a_mean.

    The density of the *action* is this plus log|B_k| per element: a constant, so probability ratios are the same.

    Args:
        table: the sampler.
        x: latents before the step [B, ...].
        a_mean: the policy's mean action, same shape.
        x_next: latents after the step, same shape.
        k: denoising step, int64 [B].
        mask: optional; elements with 0 are left out of the reduction.
        reduction: "sum" = nats, in float64. "mean" = nats per element, which is what DDPO and the GRPO family call the
            log-probability and what gives a clip range of 1e-4 its meaning. Both reduce over **all** non-batch dims.

    Returns:
        [B]; exactly 0 where the step has no noise.
    """
    x, a_mean, x_next = _working(x, a_mean, x_next)
    mu = _coefficient(table, "A", k, x) * x + _coefficient(table, "B", k, x) * a_mean
    noisy = _coefficient(table, "stochastic", k, x) > 0
    sigma = torch.where(noisy, _coefficient(table, "sigma", k, x), 1.0)
    per_element = -0.5 * ((x_next - mu) / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)
    return _reduce(torch.where(noisy, per_element, 0.0), mask, reduction)


def kl(
    table: TransitionTable,
    a_mean: Tensor,
    a_mean_ref: Tensor,
    k: Tensor | int,
    mask: Tensor | None = None,
    reduction: Reduction = "sum",
) -> Tensor:
    """KL(policy || reference) of one step: (B_k (a_mean - a_mean_ref))^2 / (2 sigma_k^2), in nats.

    The same number in action space and in the space of x'. Arguments as in :func:`log_prob`; "sum" is nats (float64),
    "mean" nats per element.

    Returns:
        [B]; exactly 0 where the step has no noise (there the true divergence is 0 or infinite).
    """
    a_mean, a_mean_ref = _working(a_mean, a_mean_ref)
    weight = _coefficient(table, "kl_weight", k, a_mean)
    return _reduce(weight * (a_mean - a_mean_ref).square(), mask, reduction)


# ------------------------------------------------------------------------- scores that papers publish instead


def cps_score(
    table: TransitionTable, x: Tensor, a_mean: Tensor, x_next: Tensor, k: Tensor | int, mask: Tensor | None = None
) -> Tensor:
    """Flow-CPS's published score, -mean (x' - mu)^2 [B]: no variance, no constants, defined on noiseless steps too.

    Not a log density: its ratio is the true one only where 2 sigma^2 = 1. Kept apart for reproductions.
    """
    x, a_mean, x_next = _working(x, a_mean, x_next)
    mu = _coefficient(table, "A", k, x) * x + _coefficient(table, "B", k, x) * a_mean
    return _reduce(-(x_next - mu).square(), mask, "mean")


def flow_grpo_kl(
    table: TransitionTable, a_mean: Tensor, a_mean_ref: Tensor, k: Tensor | int, mask: Tensor | None = None
) -> Tensor:
    """Flow-GRPO's published KL term, mean (mu - mu_ref)^2 / (2 s^2) [B], where sigma = s sqrt(-dt).

    It leaves out the time step: it is -dt times the KL per element, hence neither nats nor comparable between steps.

    Raises:
        ValueError: if the table is not one of :func:`flow_table`.
    """
    if table.dt is None:
        raise ValueError(f"flow_grpo_kl is defined for flow tables only, got {table.name!r}; use transition.kl")
    a_mean, a_mean_ref = _working(a_mean, a_mean_ref)
    weight = _coefficient(table, "kl_weight", k, a_mean) * -_coefficient(table, "dt", k, a_mean)
    return _reduce(weight * (a_mean - a_mean_ref).square(), mask, "mean")


# ------------------------------------------------------------------------------------------------------- helpers


def _working(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Bring all to float32 (float64 if x is) and insist on equal shapes: silent broadcasting here trains nonsense."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for other in others:
        if other.shape != x.shape:
            raise ValueError(f"latents and actions must have one shape, got {tuple(x.shape)} and {tuple(other.shape)}")
    return (x.to(dtype), *(other.to(dtype) for other in others))


def _coefficient(table: TransitionTable, column: str, k: Tensor | int, like: Tensor) -> Tensor:
    """Rows k of one column as [B, 1, 1, ...], in the device and dtype of `like`."""
    if isinstance(k, int):
        k = torch.full((len(like),), k)
    if k.shape != like.shape[:1] or k.dtype != torch.int64:
        raise ValueError(f"k must be int64 [{len(like)}], one step per sample; got {k.dtype} {tuple(k.shape)}")
    if k.device.type == "cpu" and bool(((k < 0) | (k >= table.num_steps)).any()):
        last = table.num_steps - 1
        raise ValueError(f"{table.name} has steps 0 .. {last}, got k = {k.tolist()}; a finished env needs a reset")
    key = (column, like.device, like.dtype)
    if key not in table._cache:
        with torch.inference_mode(False):  # what is cached during a rollout must be usable in a later backward pass
            if column == "kl_weight":
                values = torch.where(table.stochastic, 0.5 / table.action_std.square(), 0.0)
            else:
                values = getattr(table, column)
            table._cache[key] = values.to(like.device, like.dtype, copy=True)
    return table._cache[key][upload(k, like.device)].view(-1, *[1] * (like.ndim - 1))


def _reduce(per_element: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Sum (float64) or mean (the input's dtype) over all dims but the first, over free elements only."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if per_element.ndim < 2:
        raise ValueError(f"expected [B, ...] with at least one dimension per sample, got {tuple(per_element.shape)}")
    dims = tuple(range(1, per_element.ndim))
    count: Tensor | int = per_element[0].numel()
    if mask is not None:
        mask = mask.to(per_element.device, per_element.dtype).expand_as(per_element)
        per_element = torch.where(mask > 0, per_element, 0.0)
        count = mask.sum(dims, dtype=torch.float64).clamp_min(1.0)
    # float64 accumulators: a video latent has ~1e6 elements, and a mean must resolve a clip range of 1e-4
    total = per_element.sum(dims, dtype=torch.float64)
    return total if reduction == "sum" else (total / count).to(per_element.dtype)


def _where(flags: Tensor) -> list[int]:
    return [int(i) for i in flags.nonzero().flatten()]
