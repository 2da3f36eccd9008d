"""Flow-GRPO (Liu et al. 2025, arXiv:2505.05470), with DanceGRPO's (arXiv:2505.07818) and MixGRPO's settings.

    L = mean over videos and trained steps k of max(-A r_k, -A clip(r_k, 1 - c, 1 + c)) + beta KL_k(theta || reference)
    A_i = (R_i - mean_group R) / (std R + eps),   r_k = pi_theta(a_k | x_k) / pi_old(a_k | x_k)

Log-probabilities are means over latent elements. Videos of one prompt are compared, so no value function is needed. Any
sampler with noise serves: the flow SDEs ("flow_grpo", "dance", "cps") and DDIM with eta > 0 are the env's choice.

With a window (MixGRPO, Flow-GRPO-Fast) only `window_size` neighbouring denoising steps get noise and are trained; the
others follow the ODE. The window is set anew for each update by the env's own noise levels.

Deviations: no EMA of the weights, a random subset of timesteps is drawn for each optimiser step instead of each video,
and "cps" is scored by its true density. The KL is by default the true one per element; the published form leaves out
the time step and is `kl="published"`. Before the first update r = 1 exactly; where only part of a batch is trained
(best_of_n, groups of equal rewards, micro_batch), the network sees another batch size and r = 1 up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from algos.advantages import clip_advantages, group_advantages
from algos.losses import clipped_surrogate, kl_penalty
from algos.rollout import Rollout, collect
from algos.training import (
    adamw,
    check_choice,
    check_not_negative,
    check_positive,
    num_batches,
    optimiser_step,
    reward_metrics,
    start_stream,
)
from vdm_env import transition

Std = Literal["population", "unbiased"]
KL = Literal["exact", "published"]
Choice = Literal["first", "random"]
Strategy = Literal["progressive", "random", "fixed"]
Entry = tuple[Rollout, Tensor, Tensor, int]
"""A rollout, its advantages [B], the videos trained on (int64) and one denoising step: one unit of work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowGRPOConfig:
    """Defaults: Flow-GRPO's for Stable Diffusion 3.5 (there 48 groups of 24, two optimiser steps for each rollout)."""

    learning_rate: float = 3e-4
    """of AdamW, constant"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-4
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    clip_range: float = 1e-4
    """c, on the exponential of the difference of mean log-probabilities"""
    adv_clip_max: float = 5.0
    """advantages are clipped to this magnitude"""
    std: Std = "population"
    """estimator of the rewards' spread; DanceGRPO and MixGRPO: "unbiased" """
    global_std: bool = True
    """spread of the whole rollout; False: of each group"""
    std_eps: float = 1e-4
    """added to the spread; DanceGRPO and MixGRPO: 1e-8"""
    filter_equal_groups: bool = True
    """leave out groups whose rewards are all equal (advantage 0); False: they still feel the KL"""
    best_of_n: int | None = None
    """videos of each group that are trained on, half the best and half the worst; an even number; None: all"""
    kl_coefficient: float = 0.04
    """beta of the KL to the reference; 0 saves the reference's forward pass"""
    kl: KL = "exact"
    """"exact": KL per element; "published": Flow-GRPO's, which is -dt times that (flow models only; beta is for it)"""
    timestep_fraction: float = 0.99
    """fraction of the noisy steps that is trained on, rounded down, at least one; a window is trained whole"""
    timestep_choice: Choice = "first"
    """which these are: the "first" (0.99: all but the last), or "random" ones, drawn anew for each optimiser step"""
    drop_last_step: bool = False
    """without a window, never train on the grid's last step (DanceGRPO); it keeps its noise"""
    window_size: int | None = None
    """denoising steps with noise; None: all that the env has"""
    window_strategy: Strategy = "progressive"
    """the window moves on and starts again at the end, jumps to a "random" place, or stays "fixed" at window_start"""
    window_start: int = 0
    """first step that a window may hold"""
    window_end: int | None = None
    """one past the last step that a window may hold (Flow-GRPO-Fast: half of them); None: past the last noisy one"""
    window_shift: int = 1
    """steps that "progressive" moves on by; less than window_size makes windows overlap"""
    window_iterations: int = 25
    """updates at each place"""
    shared_initial_noise: bool = False
    """videos of a group start from the noise of its first (DanceGRPO, MixGRPO)"""
    videos_per_rollout: int = 1152
    """videos sampled before the policy changes; a multiple of env.num_envs"""
    updates_per_rollout: int = 1
    """parts the rollout's batches are dealt into, each with an optimiser step of its own; a divisor of their number"""
    num_inner_epochs: int = 1
    """passes over a rollout"""
    micro_batch: int | None = None
    """videos per backward pass, the knob for memory; None: env.num_envs"""
    seed: int = 0
    """of the env's stream of prompts and noise, of shuffling and of random windows"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "clip_range", "adv_clip_max", "std_eps")
        check_positive(self, "timestep_fraction", "videos_per_rollout", "updates_per_rollout", "num_inner_epochs")
        check_positive(self, "window_shift", "window_iterations")
        check_not_negative(self, "weight_decay", "kl_coefficient", "window_start")
        for name, choices in (("std", Std), ("kl", KL), ("timestep_choice", Choice), ("window_strategy", Strategy)):
            check_choice(self, name, choices)
        for name in ("micro_batch", "window_size", "best_of_n"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        if self.timestep_fraction > 1 or self.clip_range >= 1:
            raise ValueError(
                f"FlowGRPOConfig.timestep_fraction is {self.timestep_fraction} and clip_range {self.clip_range}, "
                f"expected at most 1 and less than 1"
            )
        if self.best_of_n is not None and self.best_of_n % 2:
            raise ValueError(
                f"FlowGRPOConfig.best_of_n is {self.best_of_n}, expected an even number: half are a group's best "
                f"videos and half its worst (DanceGRPO: 8); None trains on all"
            )

    @classmethod
    def preset(cls, model: str) -> FlowGRPOConfig:
        """Settings for a model by name; "MovingShapes" wants an env with group_size=8.

        Raises:
            ValueError: there are none for this model.
        """
        presets = {"MovingShapes": cls(learning_rate=5e-4, videos_per_rollout=64, kl_coefficient=0.0)}
        if model not in presets:
            raise ValueError(
                f"no Flow-GRPO preset for {model!r}, only for {', '.join(presets)}; write FlowGRPOConfig(...)"
            )
        return presets[model]

    @classmethod
    def dance(cls, **changes: Any) -> FlowGRPOConfig:
        """DanceGRPO's for HunyuanVideo, for an env with sampler="dance", 16 steps and group_size=24."""
        settings = cls(
            learning_rate=1e-5,
            std="unbiased",
            global_std=False,
            std_eps=1e-8,
            best_of_n=8,
            kl_coefficient=0.0,
            timestep_fraction=0.6,
            timestep_choice="random",
            drop_last_step=True,
            shared_initial_noise=True,
        )
        return replace(settings, **changes)

    @classmethod
    def mix(cls, **changes: Any) -> FlowGRPOConfig:
        """MixGRPO's for FLUX, for an env with sampler="flow_grpo", 25 steps and group_size=12."""
        settings = cls(
            learning_rate=1e-5,
            std="unbiased",
            global_std=False,
            std_eps=1e-8,
            kl_coefficient=0.0,
            window_size=4,
            shared_initial_noise=True,
        )
        return replace(settings, **changes)


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


@dataclass(frozen=True, kw_only=True)
class _Start:
    """An env for `collect` that starts its episodes with the window's noise levels and, if asked, shared noise."""

    env: Any
    noise_levels: list[float] | None
    shared_noise: bool

    @property
    def num_steps(self) -> int:
        return self.env.num_steps

    def reset(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        obs, info = self.env.reset(options=None if self.noise_levels is None else {"noise_levels": self.noise_levels})
        if self.shared_noise:
            size = self.env.group_size
            obs = {**obs, "latents": obs["latents"][::size].repeat_interleave(size, dim=0)}
            self.env.set_state(obs)
        return obs, info

    def step(self, action: Tensor) -> Any:
        return self.env.step(action)


class FlowGRPO:
    """Group-relative policy gradient over an env's noisy denoising steps.

    Args:
        env: vector env with noise and groups of at least 2.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `FlowGRPOConfig`.

    Raises:
        ValueError: an env without noise or groups, a window outside its noisy steps, best_of_n beyond the group, a
            published KL without a flow model, or a rollout that the env's batch does not divide as asked.
    """

    def __init__(self, env: Any, policy: Any, config: FlowGRPOConfig) -> None:
        table = env.mdp.base_table
        self.noisy: list[int] = table.stochastic.nonzero().flatten().tolist()
        if not self.noisy:
            raise ValueError(
                f"Flow-GRPO learns from the sampler's noise, and {table.name!r} at this noise level has none; make "
                f"the env with noise_level > 0 (and a sampler that has noise), or use VADER, which needs none"
            )
        if env.group_size < 2:
            raise ValueError(
                f"Flow-GRPO compares videos of one prompt, but the env has group_size={env.group_size}; make it with "
                f"group_size=8, or use DDPO with advantage='per_prompt' or 'batch'"
            )
        if config.best_of_n is not None and config.best_of_n > env.group_size:
            raise ValueError(
                f"best_of_n is {config.best_of_n}, but a group has {env.group_size} videos; set best_of_n=None, or "
                f"make the env with group_size >= {config.best_of_n}"
            )
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
        self._levels: list[float] = []
        self._places = range(0)
        if config.window_size is not None:
            self._levels, self._places = self._window_levels(), self._window_places(config.window_size)
        self.window_start, self.window_age = config.window_start, 0
        if self._places and config.window_strategy == "random":
            self.window_start = self._random_place()
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm
        self._table = table

    # ------------------------------------------------------------------ the window

    def _window_levels(self) -> list[float]:
        """The env's noise level at each step."""
        level, steps = self.env.config.noise_level, self.env.num_steps
        if level is None:
            raise ValueError(
                f"a window needs the noise level as a number, and this env was made without; make it with "
                f"noise_level=..., the one that {self.env.mdp.base_table.name!r} should have inside the window"
            )
        levels = [float(level)] * steps if isinstance(level, int | float) else [float(v) for v in level]
        self.env.mdp.make_table(self.env.config.num_steps, self.env.config.sampler, levels)  # refuses fixed noise
        return levels

    def _window_places(self, size: int) -> range:
        """Where the window may start."""
        first, last = self.config.window_start, self.config.window_end
        last = self.noisy[-1] + 1 if last is None else last
        steps = self.env.num_steps
        if first + size > last or last > steps:
            raise ValueError(
                f"a window of window_size={size} has no place in steps {first}..{last - 1} of this env's 0..{steps - 1}"
                f"; make it smaller, change window_start or window_end, or sample with more steps"
            )
        if silent := sorted(set(range(first, last)) - set(self.noisy)):
            raise ValueError(
                f"the window would reach steps {silent}, which have no noise with {self.env.mdp.base_table.name!r}; "
                f"choose window_start and window_end within {self.noisy[0]}..{self.noisy[-1] + 1}"
            )
        return range(first, last - size + 1)

    def _random_place(self) -> int:
        return self._places[int(torch.randint(len(self._places), (), generator=self.generator))]

    def _advance_window(self) -> None:
        """Counts an update, and moves the window when it has had its number of them."""
        c = self.config
        if not self._places or c.window_strategy == "fixed":
            return
        self.window_age += 1
        if self.window_age < c.window_iterations:
            return
        self.window_age = 0
        if c.window_strategy == "random":
            self.window_start = self._random_place()
        else:
            self.window_start += c.window_shift
            if self.window_start not in self._places:
                self.window_start = self._places[0]

    def window(self) -> list[int] | None:
        """The denoising steps with noise in the next update; None without a window."""
        size = self.config.window_size
        return None if size is None else list(range(self.window_start, self.window_start + size))

    # ------------------------------------------------------------------ learning

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
        """
        c, window = self.config, self.window()
        levels = [v if k in window else 0.0 for k, v in enumerate(self._levels)] if window is not None else None
        start = _Start(env=self.env, noise_levels=levels, shared_noise=c.shared_initial_noise)
        rollouts = [collect(start, self.policy) for _ in range(self.batches)]
        self._table = self.env.mdp.table
        reward = torch.cat([rollout.reward for rollout in rollouts])
        advantages = self._advantages(reward).chunk(self.batches)
        chosen = [self._chosen(rollout.reward) for rollout in rollouts]
        seen: list[tuple[Tensor, ...]] = []
        norms = []
        for _ in range(c.num_inner_epochs):
            order = torch.randperm(self.batches, generator=self.generator).chunk(c.updates_per_rollout)
            for part in order:
                steps = self._deal_steps(window)
                entries = [(rollouts[i], advantages[i], chosen[i], k) for i in part.tolist() for k in steps]
                entries = [entry for entry in entries if len(entry[2])]
                if entries:
                    seen += self._accumulate(entries)
                    norms.append(optimiser_step(self.optimizer, self.parameters, c.max_grad_norm))
        metrics = {
            **reward_metrics(reward, self.env.group_size),
            **self._ratio_metrics(seen, len(steps)),
            "grad_norm": float(torch.stack(norms).mean()) if norms else 0.0,
            "learning_rate": c.learning_rate,
            "optimiser_steps": float(len(norms)),
            "videos_trained": float(sum(len(rows) for rows in chosen)),
            "steps_trained": float(len(steps)),
            "window_start": float(window[0] if window else 0),
        }
        self._advance_window()
        return metrics

    def _advantages(self, reward: Tensor) -> Tensor:
        c, size = self.config, self.env.group_size
        advantage = group_advantages(reward, size, std=c.std, global_std=c.global_std, eps=c.std_eps)
        # the mean of equal numbers is not that number to the last bit, and eps = 1e-8 would make an advantage of it
        return clip_advantages(torch.where(self._differ(reward), advantage, 0.0), c.adv_clip_max)

    def _differ(self, reward: Tensor) -> Tensor:
        """Bool [B]: whether rewards differ within the video's group."""
        groups = reward.reshape(-1, self.env.group_size)
        return (groups.amax(1) > groups.amin(1)).repeat_interleave(self.env.group_size)

    def _chosen(self, reward: Tensor) -> Tensor:
        """Places of a batch's videos that are trained on, ascending."""
        rows = best_and_worst(reward, self.env.group_size, self.config.best_of_n)
        return rows[self._differ(reward)[rows]] if self.config.filter_equal_groups else rows

    def _deal_steps(self, window: list[int] | None) -> list[int]:
        """The denoising steps of one optimiser step."""
        if window is not None:
            return window
        count = max(1, int(self.config.timestep_fraction * len(self.noisy)))
        if self.config.timestep_choice == "first":
            return self.noisy[:count]
        order = torch.randperm(len(self.noisy), generator=self.generator)[:count]
        return [self.noisy[i] for i in order.tolist()]

    def _accumulate(self, entries: list[Entry]) -> list[tuple[Tensor, ...]]:
        """Adds the gradient of the mean loss over the entries' videos; one graph is alive at a time.

        Returns:
            Per micro-batch: log_prob, log_prob_old, advantage, KL [b] and the loss times b, detached.
        """
        c = self.config
        total = sum(len(chosen) for _, _, chosen, _ in entries)
        seen: list[tuple[Tensor, ...]] = []
        for rollout, advantage, chosen, k in entries:
            for rows in chosen.split(c.micro_batch or self.env.num_envs):
                obs = {name: value[rows] for name, value in rollout.observations[k].items()}
                log_prob_old, weight = rollout.log_probs[k][rows], advantage[rows]
                dist = self.policy.dist(obs)
                log_prob = dist.log_prob(rollout.actions[k][rows])
                loss, _ = clipped_surrogate(log_prob, log_prob_old, weight, c.clip_range)
                kl = torch.zeros_like(log_prob_old)
                if c.kl_coefficient:
                    kl = self._kl(dist, obs)
                    loss = loss + kl_penalty(kl, c.kl_coefficient)
                share = loss * len(rows)
                (share / total).backward()
                seen.append((log_prob.detach(), log_prob_old, weight, kl.detach(), share.detach()))
        return seen

    def _kl(self, dist: Any, obs: dict[str, Tensor]) -> Tensor:
        """[B], of the policy to the reference at this step; carries the gradient."""
        with torch.no_grad(), self.policy.reference():
            reference = self.policy.dist(obs)
        if self.config.kl == "exact":
            return dist.kl(reference, reduction="mean")
        return transition.flow_grpo_kl(self._table, dist.mean, reference.mean, obs["step"])

    def _ratio_metrics(self, seen: list[tuple[Tensor, ...]], steps: int) -> dict[str, float]:
        if not seen:
            values = dict.fromkeys(("ratio_std", "clip_fraction_low", "clip_fraction_high", "kl_old_nats"), 0.0)
            return {"ratio_mean": 1.0, **values, "loss": 0.0, "kl_reference": 0.0, "ratio_first_error": 0.0}
        first = (seen[0][0] - seen[0][1]).exp()
        log_prob, log_prob_old, advantage, kl = (torch.cat([row[i] for row in seen]) for i in range(4))
        _, metrics = clipped_surrogate(log_prob, log_prob_old, advantage, self.config.clip_range)
        values = {name: float(value) for name, value in metrics.items()}
        # 0.5 E[(log r)^2] is the KL to second order, for log-ratios in nats; these are means over the elements
        values["kl_old_nats"] = values.pop("approx_kl") * math.prod(self.env.mdp.latent_shape) ** 2 * steps
        values["loss"] = float(torch.stack([row[4] for row in seen]).sum()) / len(log_prob)
        return {**values, "kl_reference": float(kl.mean()), "ratio_first_error": float((first - 1).abs().max())}

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, generator, env's stream and the window's place; the policy's weights are saved with the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
            "window": {"start": self.window_start, "age": self.window_age},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment.

        Raises:
            ValueError: the saved window has no place in this config's range; nothing was changed.
        """
        window = state["window"]
        if self._places and window["start"] not in self._places:
            raise ValueError(
                f"the saved window starts at step {window['start']}, this config's starts within "
                f"{self._places[0]}..{self._places[-1]}; continue with the window settings it was saved with"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.env.load_state_dict(state["env"])
        self.window_start, self.window_age = int(window["start"]), int(window["age"])
