"""Learning from pairs of videos: a table of pairs, their noised loss, and the optimiser step over them.

What every preference algorithm does once it has pairs, whoever made them. Nothing here draws from a global random
state: noise and timesteps come from the generator that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from algos import distributed
from algos.losses import dpo_loss
from algos.training import optimiser_step
from vdm_env import noise as keyed_noise
from vdm_env.host import on_host, shared, upload

Pairs = dict[str, Tensor]
"""winner and loser, clean latents [P,C,F,H,W]; prompt_id [P]; where pairs count differently also weight [P]; once they
were drawn noise_seed and t [P], see `draw_noise`. On the CPU, one row a pair. Empty dict: no pairs"""
PairLoss = Callable[[Pairs], tuple[Tensor, dict[str, Tensor]]]
"""pairs to their mean loss, with its graph, and detached metrics named PAIR_METRICS"""
Timesteps = Callable[[int, torch.Generator], Tensor]
"""number of pairs and CPU generator to timesteps t [P]"""
PAIR_METRICS = ("implicit_accuracy", "margin", "winner_error_change", "loser_error_change")
"""means over pairs, see `losses.dpo_loss`"""


def count_pairs(pairs: Mapping[str, Tensor]) -> int:
    """How many pairs a table has."""
    return len(next(iter(pairs.values()))) if pairs else 0


def join_pairs(parts: Sequence[Pairs]) -> Pairs:
    """One table of several with the same columns; empty ones are left out."""
    parts = [part for part in parts if part]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def draw_noise(
    count: int, mdp: Any, generator: torch.Generator, timesteps: Timesteps | None = None
) -> dict[str, Tensor]:
    """Noise and timesteps of one optimiser step, drawn for all its rows before they are dealt into backward passes.

    The noise is given by seeds, so that a step of any size costs no memory, and its gradient does not depend on
    `micro_batch` but for the order of sums.

    Args:
        count: rows of the step, >= 1.
        mdp: has `schedule.sample_timesteps`.
        generator: CPU generator of the seeds, and then of timesteps.
        timesteps: how they are drawn; None: `mdp.schedule.sample_timesteps`, as models of the family are trained.

    Returns:
        noise_seed int64 [count], for `noise_of`, and t [count], on the CPU.
    """
    seeds = torch.randint(2**62, (count,), generator=generator)
    return {"noise_seed": seeds, "t": (timesteps or mdp.schedule.sample_timesteps)(count, generator)}


def noise_of(noise_seed: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal training noise [B, *shape] of seeds [B], float32 on the CPU, each row of its own seed alone."""
    return keyed_noise.normal(noise_seed, 0, shape)


def paired_loss(
    mdp: Any,
    policy: Any,
    pairs: Pairs,
    beta: float,
    generator: torch.Generator,
    timesteps: Timesteps | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Diffusion-DPO's loss of P pairs at their timesteps and noise, see `losses.dpo_loss`.

    Winner and loser of a pair are noised with ONE draw of noise at ONE timestep: their errors then differ by the
    videos alone. The network runs without guidance, on [2P] videos with the winners first; the reference on the same.

    Source: Wallace et al. 2023 (arXiv:2311.12908) and its released code.

    Args:
        mdp: has `schedule.sample_timesteps`, `add_noise`, `target`, `device`.
        policy: has `predict(x_t, t, prompt_ids)`, and `reference()`, under which it is the model to stay close to.
        pairs: P >= 1 pairs; where they have no noise_seed and t of `draw_noise`, these are drawn now.
        beta: > 0, see `losses.dpo_loss`.
        generator: see `draw_noise`.
        timesteps: see `draw_noise`.

    Returns:
        The loss (a scalar) and detached metrics, PAIR_METRICS.
    """
    device = mdp.device
    drawn = pairs if "t" in pairs else draw_noise(count_pairs(pairs), mdp, generator, timesteps)
    clean = upload(torch.cat([pairs["winner"], pairs["loser"]]), device)
    prompts = torch.cat([pairs["prompt_id"]] * 2)
    noise = upload(noise_of(drawn["noise_seed"], pairs["winner"].shape[1:]), device, clean.dtype).repeat(2, 1, 1, 1, 1)
    t = shared(on_host(drawn["t"]).repeat(2), device)
    noised, target = mdp.add_noise(clean, noise, t), mdp.target(clean, noise, t)
    with torch.no_grad(), policy.reference():
        reference = policy.predict(noised, t, prompts)
    prediction = policy.predict(noised, t, prompts)
    weight = pairs["weight"].to(prediction) if "weight" in pairs else None
    return dpo_loss(prediction, reference, target, beta, weight)


def pair_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    pairs: Pairs,
    loss: PairLoss,
    *,
    micro_batch: int,
    learning_rate: float,
    max_grad_norm: float,
) -> dict[str, float]:
    """One optimiser step on the mean loss of some pairs, `micro_batch` of them in each backward pass.

    Where there are several processes all have the same pairs, and each makes the gradient of some of them.

    Args:
        optimizer: over `parameters`.
        parameters: that are trained.
        pairs: one or more.
        loss: of a part of the pairs.
        micro_batch: >= 1, the knob for memory; with noise drawn before (`draw_noise`) it changes no result but by
            rounding.
        learning_rate: of this step.
        max_grad_norm: bound on the gradient's L2 norm.

    Returns:
        loss and PAIR_METRICS as means over the pairs, grad_norm before clipping.

    Raises:
        FloatingPointError: the gradient is not finite; the parameters are left as they were.
    """
    count, totals = count_pairs(pairs), {name: 0.0 for name in ("loss", *PAIR_METRICS)}
    optimizer.zero_grad(set_to_none=True)  # of a step that failed half-way, out of memory for instance
    ranks = distributed.current()
    mine = ranks.rows(count)
    seen: list[tuple[float, dict[str, Tensor]]] = []
    for start in range(mine.start, mine.stop, micro_batch):
        part = {name: value[start : min(start + micro_batch, mine.stop)] for name, value in pairs.items()}
        share = count_pairs(part) / count
        value, metrics = loss(part)
        (value * share).backward()
        seen.append((share, {"loss": value.detach(), **metrics}))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    norm = optimiser_step(optimizer, parameters, max_grad_norm)
    for share, numbers in seen:  # not before: each look at a number makes an accelerator wait
        for name, number in numbers.items():
            totals[name] += share * float(number)
    return {**ranks.totals(totals), "grad_norm": float(norm)}


def mean_rows(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of `pair_step`'s numbers over optimiser steps; all 0 where there was none."""
    totals = {name: 0.0 for name in ("loss", *PAIR_METRICS, "grad_norm")}
    for row in rows:
        totals = {name: total + row[name] / len(rows) for name, total in totals.items()}
    return totals


def warmed_up(learning_rate: float, step: int, warmup_steps: int) -> float:
    """The learning rate of optimiser step 0, 1, ..., which grows linearly over the first `warmup_steps` (0: none)."""
    return learning_rate * (min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0)


def epoch_rows(count: int, start: int, number: int, seed: int) -> Tensor:
    """Rows start, ..., start + number - 1 of an endless series of passes over `count` rows.

    Every pass has an order of its own and holds each row once; where the series stands is `start` alone, so that it
    needs no other state to be continued.

    Args:
        count: >= 1, rows of the table.
        start: >= 0, how many were drawn before.
        number: >= 1, how many to draw; they may reach into the next pass.
        seed: of the orders.

    Returns:
        int64 [number], in 0 .. count - 1.

    Raises:
        ValueError: a number out of range.
    """
    if count < 1 or start < 0 or number < 1:
        raise ValueError(f"count={count}, start={start}, number={number}: expected count, number >= 1 and start >= 0")
    passes = range(start // count, (start + number - 1) // count + 1)
    orders = torch.cat([torch.randperm(count, generator=keyed_noise.generator_for(seed, 5, epoch)) for epoch in passes])
    return orders[start % count : start % count + number]
