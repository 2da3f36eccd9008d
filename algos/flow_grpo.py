"""Flow-GRPO (Liu et al. 2025, arXiv:2505.05470), with DanceGRPO's (arXiv:2505.07818) and MixGRPO's settings.

    L = mean over videos and trained steps k of max(-A r_k, -A clip(r_k, 1 - c, 1 + c)) + beta KL_k(theta || reference)
    A_i = (R_i - mean_group R) / (std R + eps),   r_k = pi_theta(a_k | x_k) / pi_old(a_k | x_k)

Log-probabilities are means over latent elements. Videos of one prompt are compared, so no value function is needed. Any
sampler with noise serves: the flow SDEs ("flow_grpo", "dance", "cps") and DDIM with eta > 0 are the env's choice.

With a window (MixGRPO, Flow-GRPO-Fast; see `algos.sde_window`) only `window_size` neighbouring denoising steps get
noise and are trained; the others follow the ODE. It is set anew for each update by the env's own noise levels.

Deviations: no EMA of the weights, a random subset of timesteps is drawn for each optimiser step instead of each video,
and "cps" is scored by its true density. On flow samplers the KL is by default the published one, which is -dt times the
true one per element (`kl="exact"`); other samplers have no published form and get the true one. Before the first
update r = 1 exactly; where only part of a batch is trained (best_of_n, groups of equal rewards, micro_batch), the
network sees another batch size and r = 1 up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from algos import distributed, sde_window
from algos.advantages import clip_advantages, group_advantages
from algos.flow_grpo_config import FlowGRPOConfig
from algos.losses import clipped_surrogate, kl_penalty
from algos.rollout import Rollout, collect, gathered
from algos.training import (
    adamw,
    check_groups,
    free_elements,
    noisy_steps,
    num_batches,
    optimiser_step,
    reward_metrics,
    start_stream,
)
from vdm_env import transition
from vdm_env.host import take, upload

__all__ = ["FlowGRPO", "FlowGRPOConfig", "best_and_worst"]

Entry = tuple[Rollout, Tensor, Tensor, int]
"""A rollout, its advantages [B], the videos trained on (int64) and one denoising step: one unit of work."""


def best_and_worst(reward: Tensor, group_size: int, count: int | None) -> Tensor:
    """Places of each group's count/2 best and count/2 worst videos.

    Args:
        reward: [B], groups of neighbours.
        group_size: divides B.
        count: even, 2..group_size; None for all.

    Returns:
        int64 [B / group_size * count], ascending; of equal rewards the earlier video counts as the worse.
    """
    if count is None:
        return torch.arange(reward.numel(), device=reward.device)
    order = reward.detach().reshape(-1, group_size).argsort(dim=1, stable=True)
    ends = torch.cat([order[:, : count // 2], order[:, group_size - count // 2 :]], dim=1)
    first = torch.arange(len(order), device=reward.device)[:, None] * group_size
    return (ends + first).flatten().sort().values


def _column(seen: Sequence[tuple[Tensor, ...]], i: int) -> Tensor:
    """The i-th entry of all micro-batches of all processes, of which some may have none."""
    ranks = distributed.current()
    if ranks.world == 1:
        return torch.cat([row[i] for row in seen])
    return ranks.gather(torch.cat([torch.empty(0, dtype=torch.float64), *(row[i].double().cpu() for row in seen)]))


def _check_weights(config: FlowGRPOConfig, names: list[str]) -> None:
    """Raises ValueError for weights that are not one for each part; without names nothing is known yet."""
    weights = config.part_weights
    if names and weights is not None and set(weights) != set(names):
        raise ValueError(
            f"part_weights are for {sorted(weights)}, the parts of the env's reward are {sorted(names)}; "
            f"give one weight for each part (0 leaves it out)"
        )


class FlowGRPO:
    """Group-relative policy gradient over an env's noisy denoising steps.

    Args:
        env: vector env with noise and groups of at least 2.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `FlowGRPOConfig`.

    Raises:
        ValueError: an env without noise or groups, a window outside its noisy steps, best_of_n beyond the group,
            advantage="parts" for a reward that has none, part_weights for other parts, a published KL without a flow
            model, or a rollout that the env's batch does not divide as asked.
    """

    def __init__(self, env: Any, policy: Any, config: FlowGRPOConfig) -> None:
        self.noisy = noisy_steps(env, "Flow-GRPO")
        check_groups(env, "Flow-GRPO", "use DDPO with advantage='per_prompt' or 'batch'")
        if config.best_of_n is not None and config.best_of_n > env.group_size:
            raise ValueError(
                f"best_of_n is {config.best_of_n}, but a group has {env.group_size} videos; set best_of_n=None, or "
                f"make the env with group_size >= {config.best_of_n}"
            )
        if config.advantage == "parts" and not hasattr(env.mdp.reward, "score_parts"):
            raise ValueError(
                f"advantage='parts' normalises each part of a reward, and {env.mdp.reward.name!r} has only one; make "
                f"the env with reward=WeightedSum([...]), or set advantage='reward'"
            )
        if config.advantage == "parts":
            # a `WeightedSum` says what its parts are; of another reward the first rollout does
            _check_weights(config, [part.reward.name for part in getattr(env.mdp.reward, "terms", ())])
        table = env.mdp.base_table
        if config.kl == "published" and config.kl_coefficient and table.dt is None:
            raise ValueError(f"kl='published' is defined for flow samplers, the env has {table.name!r}; use kl='exact'")
        self.env, self.policy, self.config = env, policy, config
        if config.drop_last_step and config.window_size is None:
            self.noisy = [k for k in self.noisy if k < env.num_steps - 1]
            if not self.noisy:
                raise ValueError("drop_last_step leaves no step with noise; set it to False, or sample with more steps")
        self.batches = num_batches(config.videos_per_rollout, env, "videos_per_rollout")
        if self.batches % config.updates_per_rollout:
            raise ValueError(
                f"updates_per_rollout is {config.updates_per_rollout}, expected a divisor of {self.batches} batches "
                f"(videos_per_rollout={config.videos_per_rollout} / num_envs={env.num_envs}); set it to 1"
            )
        self.generator = torch.Generator().manual_seed(config.seed)
        self._window = self._make_window()
        self._place = sde_window.first_place(self._window, self.generator) if self._window else None
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm
        self._table = table

    def _make_window(self) -> sde_window.SDEWindow | None:
        """The configured window, for this env."""
        c, mdp, steps = self.config, self.env.mdp, self.env.num_steps
        if c.window_size is None:
            return None
        name = mdp.base_table.name
        places = sde_window.window_places(c.window_size, c.window_start, c.window_end, self.noisy, steps, name)
        # refuses noise that cannot be switched off outside the window, before any video is sampled
        inside = sde_window.levels_inside(self._levels(), range(places[0], places[0] + c.window_size))
        mdp.make_table(self.env.config.num_steps, self.env.config.sampler, inside)
        return sde_window.SDEWindow(
            size=c.window_size,
            places=places,
            strategy=c.window_strategy,
            shift=c.window_shift,
            iterations=c.window_iterations,
            min_iterations=c.window_min_iterations,
            decay_after=c.window_decay_after,
            decay_rate=c.window_decay_rate,
        )

    def _levels(self) -> list[float]:
        """The env's noise level at each step."""
        level, steps = self.env.config.noise_level, self.env.num_steps
        if level is None:
            raise ValueError(
                f"a window needs the noise level as a number, and this env was made without; make it with "
                f"noise_level=..., the one that {self.env.mdp.base_table.name!r} should have inside the window"
            )
        return [float(level)] * steps if isinstance(level, int | float) else [float(v) for v in level]

    def window(self) -> list[int] | None:
        """The denoising steps with noise in the next update; None without a window."""
        if self._window is None or self._place is None:
            return None
        return sde_window.window_steps(self._window, self._place)

    def update(self) -> dict[str, float]:
        """Samples a rollout, learns from it and counts the window on.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction; over all (video, step) pairs trained on,
            before each pair's optimiser step: loss, kl_reference (as configured, before beta; 0 if off), ratio_mean,
            ratio_std, clip_fraction_low, clip_fraction_high, kl_old_nats (second-order estimate from the log-ratios,
            summed over trained steps); ratio_first_error = max |r - 1| of the first micro-batch; grad_norm (mean over
            optimiser steps, before clipping), learning_rate, optimiser_steps, videos_trained, steps_trained,
            window_start (first step of this update's window; 0 without one).
            Where all groups are left out there is no optimiser step, and the ratios are those of no change.

        Raises:
            FloatingPointError: the gradient is not finite; this optimiser step was not taken.
            ValueError: part_weights that are not for the parts of the env's reward, where only its scores tell them;
                nothing was learned.
        """
        c, window, ranks = self.config, self.window(), distributed.current()
        levels = None if window is None else sde_window.levels_inside(self._levels(), window)
        shared = c.shared_initial_noise
        rollouts = [
            collect(self.env, self.policy, noise_levels=levels, shared_noise=shared) for _ in range(self.batches)
        ]
        self._table = self.env.mdp.table
        reward, _ = gathered(rollouts)
        total, differ = self._advantages(rollouts)
        advantages = [ranks.own(a) for a in clip_advantages(total, c.adv_clip_max).chunk(self.batches)]
        # best and worst are what is learned from says, which the weights of the env's reward need not agree with
        ranking = (reward if c.advantage == "reward" else total).chunk(self.batches)
        batches = zip(ranking, differ.chunk(self.batches), strict=True)
        chosen = [self._chosen(ranks.own(r), ranks.own(d)) for r, d in batches]
        seen: list[tuple[Tensor, ...]] = []
        norms = []
        for _ in range(c.num_inner_epochs):
            order = torch.randperm(self.batches, generator=self.generator).chunk(c.updates_per_rollout)
            for part in order:
                steps = self._deal_steps(window)
                entries = [(rollouts[i], advantages[i], chosen[i], k) for i in part.tolist() for k in steps]
                videos = int(ranks.total(sum(len(entry[2]) for entry in entries)))
                if videos:
                    ranks.check_even(sum(len(entry[2].split(c.micro_batch or self.env.num_envs)) for entry in entries))
                    seen += self._accumulate([entry for entry in entries if len(entry[2])], videos)
                    norms.append(optimiser_step(self.optimizer, self.parameters, c.max_grad_norm))
        metrics = {
            **reward_metrics(reward, self.env.group_size),
            **self._ratio_metrics(seen, len(steps)),
            "grad_norm": float(torch.stack(norms).mean()) if norms else 0.0,
            "learning_rate": c.learning_rate,
            "optimiser_steps": float(len(norms)),
            "videos_trained": ranks.total(float(sum(len(rows) for rows in chosen))),
            "steps_trained": float(len(steps)),
            "window_start": float(window[0] if window else 0),
        }
        if self._window and self._place:
            self._place = sde_window.next_place(self._window, self._place, self.generator)
        return metrics

    def _normalised(self, rollouts: list[Rollout]) -> list[tuple[float, Tensor]]:
        """What is normalised in its groups, as (weight, values [N]): the reward, or each of its parts."""
        c = self.config
        if c.advantage == "reward":
            return [(1.0, gathered(rollouts)[0])]
        names = list(rollouts[0].parts)
        weights = dict.fromkeys(names, 1.0) if c.part_weights is None else c.part_weights
        _check_weights(c, names)
        gather = distributed.current().gather
        return [(weights[name], torch.cat([gather(rollout.parts[name]) for rollout in rollouts])) for name in names]

    def _advantages(self, rollouts: list[Rollout]) -> tuple[Tensor, Tensor]:
        """Advantages [N], not clipped, and whether anything differs within the video's group, bool [N]."""
        c, size = self.config, self.env.group_size
        terms = self._normalised(rollouts)
        total = torch.zeros_like(terms[0][1])
        differs = torch.zeros_like(total, dtype=torch.bool)
        for weight, values in terms:
            if not weight:
                continue
            advantage = group_advantages(values, size, std=c.std, global_std=c.global_std, eps=c.std_eps)
            groups = values.reshape(-1, size)
            differ = (groups.amax(1) > groups.amin(1)).repeat_interleave(size)
            total = total + weight * advantage
            differs = differs | differ
        return total, differs

    def _chosen(self, ranking: Tensor, differ: Tensor) -> Tensor:
        """Places of a batch's videos that are trained on, on the CPU, ascending; the higher in `ranking` the better."""
        rows = best_and_worst(ranking, self.env.group_size, self.config.best_of_n)
        return (rows[differ[rows]] if self.config.filter_equal_groups else rows).cpu()

    def _deal_steps(self, window: list[int] | None) -> list[int]:
        """The denoising steps of one optimiser step."""
        if window is not None:
            return window
        count = max(1, int(self.config.timestep_fraction * len(self.noisy)))
        if self.config.timestep_choice == "first":
            return self.noisy[:count]
        order = torch.randperm(len(self.noisy), generator=self.generator)[:count]
        return [self.noisy[i] for i in order.tolist()]

    def _accumulate(self, entries: list[Entry], total: int) -> list[tuple[Tensor, ...]]:
        """Adds the gradient of the entries' videos' share of the mean loss; one graph is alive at a time.

        Args:
            entries: of this process.
            total: videos in the entries of all processes.

        Returns:
            Per micro-batch: log_prob, log_prob_old, advantage, KL [b] and the loss times b, detached.
        """
        c = self.config
        seen: list[tuple[Tensor, ...]] = []
        for rollout, advantage, chosen, k in entries:
            for rows in chosen.split(c.micro_batch or self.env.num_envs):
                obs, here = take(rollout.observations[k], rows), upload(rows, advantage.device)
                log_prob_old, weight = rollout.log_probs[k][here], advantage[here]
                dist = self.policy.dist(obs)
                log_prob = dist.log_prob(rollout.actions[k][here])
                loss, _ = clipped_surrogate(log_prob, log_prob_old, weight, c.clip_range)
                kl = torch.zeros_like(log_prob_old)
                if c.kl_coefficient:
                    kl = self._kl(dist, obs)
                    loss = loss + kl_penalty(kl, c.kl_coefficient)
                if c.old_kl_coefficient:
                    loss = loss + kl_penalty(0.5 * (log_prob - log_prob_old).square(), c.old_kl_coefficient)
                share = loss * len(rows)
                (share / total).backward()
                seen.append((log_prob.detach(), log_prob_old, weight, kl.detach(), share.detach()))
        return seen

    def _kl(self, dist: Any, obs: dict[str, Tensor]) -> Tensor:
        """[B], of the policy to the reference at this step; carries the gradient."""
        with torch.no_grad(), self.policy.reference():
            reference = self.policy.dist(obs)
        if self.config.kl == "exact" or self._table.dt is None:
            return dist.kl(reference, reduction="mean")
        return transition.flow_grpo_kl(self._table, dist.mean, reference.mean, obs["step"])

    def _ratio_metrics(self, seen: list[tuple[Tensor, ...]], steps: int) -> dict[str, float]:
        if not distributed.current().any(bool(seen)):
            values = dict.fromkeys(("ratio_std", "clip_fraction_low", "clip_fraction_high", "kl_old_nats"), 0.0)
            return {"ratio_mean": 1.0, **values, "loss": 0.0, "kl_reference": 0.0, "ratio_first_error": 0.0}
        first = (_column(seen[:1], 0) - _column(seen[:1], 1)).exp()
        log_prob, log_prob_old, advantage, kl = (_column(seen, i) for i in range(4))
        _, metrics = clipped_surrogate(log_prob, log_prob_old, advantage, self.config.clip_range)
        values = {name: float(value) for name, value in metrics.items()}
        # 0.5 E[(log r)^2] is the KL to second order, for log-ratios in nats; these are means over the elements
        values["kl_old_nats"] = values.pop("approx_kl") * free_elements(self.env) ** 2 * steps
        values["loss"] = float(_column([(row[4][None],) for row in seen], 0).sum()) / len(log_prob)
        return {**values, "kl_reference": float(kl.mean()), "ratio_first_error": float((first - 1).abs().max())}

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, generator, env's stream and the window's place; the policy's weights are saved with the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
            "window": dict(zip(("start", "age"), self._place or (0, 0), strict=True)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment.

        Raises:
            ValueError: the saved window has no place in this config's range; nothing was changed.
        """
        place = sde_window.Place(int(state["window"]["start"]), int(state["window"]["age"]))
        if self._window and place.start not in self._window.places:
            raise ValueError(
                f"the saved window starts at step {place.start}, this config's starts within "
                f"{self._window.places[0]}..{self._window.places[-1]}; continue with the window settings it was saved "
                f"with"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.env.load_state_dict(state["env"])
        self._place = place if self._window else None
