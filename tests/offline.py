"""What offline preference learning must find on Gaussian data, worked out without the algorithms.

With the exact denoiser a = p x_t + q m, and with noise and timestep shared by a pair, everything but the difference of
the two videos cancels in Diffusion-DPO's margin, and what is left is linear in the change d of the prompt's mean:

    h = -beta q_t g_t mean_c( d_c u_c ),   u = mean over F, H, W of (winner - loser),

where g_t u is by how much the residuals of winner and loser differ. The expected loss is a logistic regression on u.
"""

from __future__ import annotations

import torch
from gaussian import START

from vdm_env.schedule import FlowSchedule


def slopes(model, count=400):
    """q_t g_t at timesteps that stand for the schedule's training law, float64 [count]."""
    schedule = model.schedule
    if isinstance(schedule, FlowSchedule):
        u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        level = schedule.shift * u / (1 + (schedule.shift - 1) * u)
        p, q = model.denoiser.coefficients(level * schedule.num_train_timesteps)
        return q * (p * (1 - level) + 1)  # the target noise - x0 differs by -(winner - loser) as well
    t = ((torch.arange(count) + 0.5) * schedule.num_train_timesteps / count).long()
    p, q = model.denoiser.coefficients(t)
    return q * p * schedule.alphas_cumprod[t].double().sqrt()


def expected_loss(model, beta, pairs, means, weight=None):
    """The mean loss of all pairs, over the law of timesteps, where the policy has these means [3, prompts]; float64."""
    u = (pairs["winner"] - pairs["loser"]).double().mean((2, 3, 4))
    weight = torch.ones(len(u), dtype=torch.float64) if weight is None else weight.double()
    change = (means - START.T.double())[:, pairs["prompt_id"]]
    h = -beta * slopes(model)[:, None] * (u.T * change).mean(0)
    return (weight * torch.nn.functional.softplus(-h).mean(0)).mean()


def best_means(model, beta, pairs, weight=None):
    """Means [3, prompts] that minimise `expected_loss`, by Newton's method."""
    found = START.T.double().flatten()

    def loss(flat):
        return expected_loss(model, beta, pairs, flat.view(3, -1), weight)

    for _ in range(30):
        found = found - torch.linalg.solve(torch.func.hessian(loss)(found), torch.func.grad(loss)(found))
    assert torch.func.grad(loss)(found).abs().max() < 1e-9
    return found.view(3, -1)


def left_to_gain(model, beta, pairs, means, weight=None):
    """How much of the untrained model's excess loss is left: 1 where training began, 0 at the best means."""
    best = best_means(model, beta, pairs, weight)
    start, now, least = (expected_loss(model, beta, pairs, m, weight) for m in (START.T.double(), means.double(), best))
    return float((now - least) / (start - least))
