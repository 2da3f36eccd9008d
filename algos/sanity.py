"""The checks that everybody is told to make by hand before believing a learning curve, as functions.

    for result in check_algorithm(algorithm): ...      # the ones that apply, with a table on standard output

| check                       | what it finds                                                                     |
|-----------------------------|-----------------------------------------------------------------------------------|
| `ratio_before_update`       | dropout, another guidance, another network or another noise in update than rollout |
| `log_prob_parity`           | the same under reduced precision: rollout and update in float32 or bfloat16       |
| `log_prob_other_batch`      | videos that influence each other; how far another batch size rounds differently   |
| `ratio_of_algorithm`        | an algorithm's own first ratio, where it reports one                              |
| `gradients_where_they_belong` | training of the reference, decoder, text encoder or reward model                |
| `reference_unchanged`       | a reference that moves with the policy                                            |
| `sde_marginals`             | a sampler whose noise is not the one that the network was told about              |

Each returns a `CheckResult` and raises only where it cannot be made at all. Checks that need an update make one of the
algorithm's and put everything back (`algos.trial`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from algos.rollout import Rollout, collect
from algos.trial import Trial, costing_nothing, try_update
from vdm_env.worlds.gaussian import GaussianModel

BATCH_ROUNDINGS = 16.0
"""How many roundings of the network's output another batch size may cost: its layers' errors add up."""
_KEEP_MARGINALS = ("ddim", "flow_grpo", "dance", "euler_ancestral")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """One check."""

    name: str
    """of the function, with the type in brackets where there are several"""
    ok: bool
    """measured <= bound"""
    measured: float
    """what was found, in the units of the message"""
    bound: float
    """the largest value that passes"""
    message: str
    """what was measured, and what to look at if it fails"""


# ------------------------------------------------------------------------------------------- log-probabilities


def ratio_before_update(env: Any, policy: Any, *, rollout: Rollout | None = None, bound: float = 0.0) -> CheckResult:
    """Before the first optimiser step every ratio pi_new / pi_old must be 1, to the last bit.

    The policy acts as in a rollout (without gradients) and is then asked as in an update (with gradients, the same
    videos at the same step in the same batch).

    Args:
        env: vector env with noise.
        policy: has `dist(obs)`.
        rollout: a rollout of this policy as it is now; None samples one.
        bound: on max |r - 1|; only devices whose kernels do not repeat bit for bit need more than 0.

    Raises:
        ValueError: an env without noise.
    """
    old, new = _log_probs(env, policy, rollout or collect(env, policy))
    measured = float((new - old).exp().sub(1).abs().max())
    return _result("ratio_before_update", measured, bound, "max |ratio - 1| over videos and noisy steps", _REPEAT)


def log_prob_parity(env: Any, policy: Any, dtype: torch.dtype = torch.float32, *, bound: float = 0.0) -> CheckResult:
    """Rollout and update must give the same log-probability, both in one precision and in the same batch.

    Args:
        env: vector env with noise.
        policy: has `dist(obs)`.
        dtype: torch.bfloat16 or float16: both run under `torch.autocast`; float32 or float64: as the network is, whose
            own weights may be of any type.
        bound: on max |log p_update - log p_rollout|, means over elements.

    Raises:
        ValueError: an env without noise.
    """
    with _precision(env, dtype):
        old, new = _log_probs(env, policy, collect(env, policy))
    name = f"log_prob_parity({_short(dtype)})"
    return _result(name, float((new - old).abs().max()), bound, "max |log p in update - in rollout|", _REPEAT)


def log_prob_other_batch(
    env: Any, policy: Any, dtype: torch.dtype = torch.float32, *, roundings: float = BATCH_ROUNDINGS
) -> CheckResult:
    """A video alone must have the log-probability it had in its batch, up to rounding.

    If the network's output a is off by rounding errors of up to `roundings` units u of the coarsest type in use,
    relative to its size, then for actions a + std z

        |log p - log p'| <= rms(z) e + e^2 / 2,   e = roundings u rms(a) / std

    (means over a video's elements; Cauchy-Schwarz). The largest such bound over the steps is the check's. Compare
    `measured` with your clip range: where it is not much smaller, keep the batches of the rollout in the update.

    Args:
        env: vector env with noise and at least two videos.
        policy: has `dist(obs)`.
        dtype: as in `log_prob_parity`.
        roundings: see above.

    Raises:
        ValueError: an env without noise or of one video.
    """
    if env.num_envs < 2:
        raise ValueError("num_envs is 1: a video alone is its whole batch; make the env with 2 videos or more")
    types = {dtype, env.mdp.dtype, *(p.dtype for p in env.model.denoiser.parameters() if p.is_floating_point())}
    unit = max(torch.finfo(kind).eps for kind in types)
    measured, bound = 0.0, 0.0
    with _precision(env, dtype), torch.no_grad():
        rollout = collect(env, policy)
        for k in _noisy(env):
            obs, action = rollout.observations[k], rollout.actions[k]
            mean = policy.mean(obs).double().flatten(1)
            std = obs["action_std"].double()
            z = (action.double().flatten(1) - mean) / std[:, None]
            e = roundings * unit * _rms(mean) / std
            bound = max(bound, float((_rms(z) * e + e.square() / 2).max()))
            for i in range(env.num_envs):
                alone = {name: value[i : i + 1] for name, value in obs.items()}
                found = policy.dist(alone).log_prob(action[i : i + 1])
                measured = max(measured, float((found - rollout.log_probs[k][i : i + 1]).abs().max()))
    return _result(
        f"log_prob_other_batch({_short(dtype)})",
        measured,
        bound,
        "max |log p alone - in its batch|",
        "a layer mixes the videos of a batch (batch statistics, dropout), or its rounding is coarser than assumed",
    )


# ---------------------------------------------------------------------------------------------- one update


def ratio_of_algorithm(algorithm: Any, *, trial: Trial | None = None, bound: float = 0.0) -> CheckResult:
    """The algorithm's own first ratio, its metric `ratio_first_error` = max |r - 1|, must be 1.

    Args:
        algorithm: see `try_update`.
        trial: of this algorithm; None makes one.
        bound: on the metric; batches other than the rollout's need more than 0.

    Raises:
        ValueError: the algorithm's update does not return this metric.
    """
    trial = trial or try_update(algorithm)
    if "ratio_first_error" not in trial.metrics:
        raise ValueError(
            f"{type(algorithm).__name__}.update() returns no 'ratio_first_error'; return max |r - 1| of the first "
            f"batch under this name, or use ratio_before_update(env, policy)"
        )
    measured = float(trial.metrics["ratio_first_error"])
    return _result("ratio_of_algorithm", measured, bound, "max |ratio - 1| of the first batch", _REPEAT)


def gradients_where_they_belong(algorithm: Any, *, trial: Trial | None = None) -> CheckResult:
    """An update may reach the policy's trainable parameters and nothing else.

    Measured is the number of other parameters of the networks (denoiser, decoder, text encoder, reward models) that got
    a gradient or changed; it is infinite where no gradient reached the policy.

    Args:
        algorithm: see `try_update`.
        trial: of this algorithm; None makes one.
    """
    trial = trial or try_update(algorithm)
    measured = float(len(trial.strays)) if trial.reached else math.inf
    what = f"parameters touched besides the {trial.reached} of {trial.trainable} trainable ones that a gradient reached"
    names = ", ".join(trial.strays[:4]) or "none; no gradient reached the policy, is the loss detached from it?"
    return _result("gradients_where_they_belong", measured, 0.0, what, names)


def reference_unchanged(algorithm: Any, *, trial: Trial | None = None) -> CheckResult:
    """The policy under `policy.reference()` must be the untrained model before and after an update, bit for bit.

    Args:
        algorithm: see `try_update`.
        trial: of this algorithm; None makes one.
    """
    trial = trial or try_update(algorithm)
    what = "max |change| of the reference's output by one update"
    hint = "the update trains the base weights, or the reference is not the untrained model"
    return _result("reference_unchanged", trial.reference_shift, 0.0, what, hint)


# --------------------------------------------------------------------------------------------- the sampler


@torch.no_grad()
def sde_marginals(
    env: Any,
    policy: Any,
    *,
    num_steps: int = 100,
    videos: int = 512,
    batch: int | None = None,
    z_max: float = 4.5,
    tolerance: float = 0.1,
    prompt_id: int | None = None,
    seed: int = 0,
) -> CheckResult:
    """Clean latents of the env's SDE and of its ODE must have the same mean and variance.

    Both samplers share their marginals in the limit of small steps, so they are compared on a fine grid. Each video
    gives one number per channel for the mean, and one for the variance about the pooled mean; z is Welch's for the
    difference between the two samplers, after `tolerance` is taken off: for the grid that is not fine enough yet, and
    for schedules that end before all signal is gone, whose first noise is not quite the data's. Of C channels, 2 C
    numbers. "cps" does not keep the marginals (`vdm_env.samplers.flow_table`) and fails.

    Args:
        env: vector env whose sampler has an ODE (noise_level=0).
        policy: samples on both; guidance bends the two chains differently, so it should have none.
        num_steps: of the fine grid.
        videos: of each sampler, rounded up to whole batches.
        batch: videos at a time; None: env.num_envs.
        z_max: bound on the largest |z|.
        tolerance: in standard deviations of the latents (mean) and relative to their variance.
        prompt_id: of all videos; None takes the first of the env's split.
        seed: of the videos' noise.

    Raises:
        ValueError: the sampler has no ODE, fewer than 8 videos, or no noise in the env.
    """
    _noisy(env)
    if videos < 8:
        raise ValueError(f"videos is {videos}: a z-test needs a spread, give 8 or more")
    prompt = env.prompt_ids()[0] if prompt_id is None else prompt_id
    fine = {"num_envs": batch or env.num_envs, "group_size": 1, "num_steps": num_steps}
    sde = _clean(env.derive(**fine, seed=seed), policy, videos, prompt)
    ode = _clean(env.derive(**fine, seed=seed + 1, noise_level=0.0), policy, videos, prompt)
    pooled = torch.cat([sde, ode])
    centre = pooled.mean((0, 2))[:, None]
    variance = (pooled - centre).square().mean((0, 2))
    z_mean = _welch(sde.mean(2), ode.mean(2), tolerance * variance.sqrt())
    z_variance = _welch((sde - centre).square().mean(2), (ode - centre).square().mean(2), tolerance * variance)
    what = f"largest |z| of mean and variance per channel, {len(sde)} videos of each sampler in {num_steps} steps"
    hint = "the policy's noise is not the sampler's, or the sampler does not keep the ODE's marginals"
    return _result("sde_marginals", float(torch.cat([z_mean, z_variance]).max()), z_max, what, hint)


# ------------------------------------------------------------------------------------------------ all of them


def check_algorithm(algorithm: Any, *, show: bool = True) -> list[CheckResult]:
    """Makes the checks that apply to an algorithm and leaves it as it was.

    Log-probabilities are checked where the env has noise, in float32 and bfloat16; the algorithm's own ratio where it
    reports one; marginals on the closed-form world, where they cost nothing.

    Args:
        algorithm: has `env`, `policy`, `update`, `state_dict` and `load_state_dict`. One update is made.
        show: print a table.

    Returns:
        The results; all are ok for an algorithm without these mistakes.
    """
    env, policy = algorithm.env, algorithm.policy
    results = []
    if bool(env.mdp.base_table.stochastic.any()):
        with costing_nothing(env):
            results.append(ratio_before_update(env, policy))
            for dtype in (env.mdp.dtype, torch.bfloat16):
                results.append(log_prob_parity(env, policy, dtype))
                if env.num_envs > 1:
                    results.append(log_prob_other_batch(env, policy, dtype))
            levels_fit = env.config.noise_level is None or isinstance(env.config.noise_level, int | float)
            if isinstance(env.model, GaussianModel) and levels_fit and env.mdp.base_table.name in _KEEP_MARGINALS:
                results.append(sde_marginals(env, policy, batch=512))
    trial = try_update(algorithm)
    if "ratio_first_error" in trial.metrics:
        results.append(ratio_of_algorithm(algorithm, trial=trial))
    results += [gradients_where_they_belong(algorithm, trial=trial), reference_unchanged(algorithm, trial=trial)]
    if show:
        print(table(results))
    return results


def table(results: Sequence[CheckResult]) -> str:
    """One line a check: ok or FAILED, name, measured and bound, what it means."""
    width = max(len(result.name) for result in results)
    return "\n".join(
        f"{'ok    ' if r.ok else 'FAILED'}  {r.name:<{width}}  {r.measured:>9.3g} <= {r.bound:<9.3g} {r.message}"
        for r in results
    )


# ---------------------------------------------------------------------------------------------------- helpers

_REPEAT = "the update does not see what the rollout saw (dropout, guidance, weights, noise level)"


def _result(name: str, measured: float, bound: float, what: str, hint: str) -> CheckResult:
    ok = measured <= bound  # False for NaN
    message = what if ok else f"{what}; look for: {hint}"
    return CheckResult(name=name, ok=ok, measured=measured, bound=bound, message=message)


def _noisy(env: Any, rollout: Rollout | None = None) -> list[int]:
    """The steps with noise: the env's own, or those of a rollout, which may have had other noise levels."""
    steps = env.mdp.base_table.stochastic.nonzero().flatten().tolist()
    if rollout is not None:
        steps = [k for k, obs in enumerate(rollout.observations) if bool(obs["stochastic"].all())]
    if not steps:
        raise ValueError(
            f"{env.mdp.base_table.name!r} has no noise here, and so no log-probability; make the env with "
            f"noise_level > 0"
        )
    return steps


def _log_probs(env: Any, policy: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probabilities when acting and when learning, over all noisy steps and videos."""
    steps = _noisy(env, rollout)
    with torch.enable_grad():
        new = [policy.dist(rollout.observations[k]).log_prob(rollout.actions[k]).detach() for k in steps]
    return torch.cat([rollout.log_probs[k] for k in steps]), torch.cat(new)


def _precision(env: Any, dtype: torch.dtype) -> Any:
    low = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(env.device.type, dtype=dtype if low else None, enabled=low)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()


def _clean(env: Any, policy: Any, videos: int, prompt: int) -> Tensor:
    """Clean latents [n, C, F * H * W] in float64 of one prompt."""
    found = []
    for _ in range(-(-videos // env.num_envs)):
        obs, _ = env.reset(options={"prompt_ids": [prompt] * env.num_envs})
        for _ in range(env.num_steps):
            obs, *_ = env.step(policy(obs))
        found.append(obs["latents"].double().flatten(2))
    return torch.cat(found)


def _welch(a: Tensor, b: Tensor, tolerance: Tensor) -> Tensor:
    """|z| [C] of the difference of the means over rows of a, b [n, C], less a tolerance [C]."""
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    return ((a.mean(0) - b.mean(0)).abs() - tolerance).clamp_min(0) / error
