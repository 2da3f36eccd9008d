"""The torch-native vector environment: `num_envs` videos denoised side by side, tensors in and out, autograd kept.

Description: an episode is the denoising of one video; see `vdm_env.transition` for the idea.

Observation space (a dict of tensors, B = num_envs):

| key        | shape, type        | meaning                                                             |
|------------|--------------------|---------------------------------------------------------------------|
| latents    | [B,C,F,H,W] float  | x_k                                                                 |
| timestep   | [B] float          | what the network is told as t                                       |
| step       | [B] int64          | denoising step k, 0 .. num_steps; num_steps once finished           |
| action_std | [B] float          | sigma_k / |B_k|: the policy's standard deviation at this step       |
| stochastic | [B] bool           | whether the step has noise; no log-probability where not            |
| prompt_id  | [B] int64          | number of the prompt in `env.prompts`                               |
| video_seed | [B] int64          | key of this video's noise                                           |

Action space: [B,C,F,H,W], what the network emits (noise, v or flow), unbounded. Any float type; used in the latents'
type. Rewards: 0, and at the last step the reward model's score of the decoded video. Starting state: noise keyed by
the video's seed, or what `reset(options=...)` gives. Episode end: `terminated` after `num_steps` steps, `truncated`
never. Autoreset is disabled: the final latents stay in the observation and stepping a finished env raises. Arguments:
see `vdm_env.make`. Version history: v0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Integral
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from vdm_env.config import EnvConfig
from vdm_env.guidance import as_interval, check_grid, check_some_guidance
from vdm_env.host import on_host, shared, upload
from vdm_env.mdp import DenoisingMDP
from vdm_env.policy import DenoisingPolicy
from vdm_env.registry import build_reward
from vdm_env.rewards.base import as_reward
from vdm_env.spaces import action_space, observation_space
from vdm_env.starts import (
    Shard,
    Stream,
    check_options,
    given_latents,
    given_prompts,
    given_seeds,
    given_step,
    reset_mask,
)
from vdm_env.transition import TransitionTable
from vdm_env.video import frame_row


class DenoisingVectorEnv(gymnasium.vector.VectorEnv):
    """See the module's docstring; made by `vdm_env.make`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4, "autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, config: EnvConfig, render_mode: str | None = "rgb_array") -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode={render_mode!r}: expected one of {self.metadata['render_modes']}, or None")
        self.config = config
        self.render_mode = render_mode
        self.mdp = self._make_mdp(config)
        grid = self.mdp.base_table.timesteps
        check_grid(config.guidance_interval, config.guidance_scale, self.mdp.schedule, grid)
        self.num_envs, self.group_size, self.split = config.num_envs, config.group_size, config.split
        config.prompts.ids(config.split)  # an unknown or empty split is refused here
        self.model, self.prompts, self.device = config.model, config.prompts, self.mdp.device
        self.single_observation_space = observation_space(self.mdp, config.observe_embedding)
        self.single_action_space = action_space(self.mdp)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.shard = Shard()
        """of several processes that simulate one wider env together, which part this is; `derive` leaves it out"""
        self._stream = Stream(seed=config.seed)
        self._latents: Tensor | None = None
        self._clean = torch.empty(0)
        self._unrendered: tuple[Tensor, Tensor, Tensor] | None = None
        self._rollout_started: float | None = None

    def _make_mdp(self, config: EnvConfig, kind: Callable[..., DenoisingMDP] = DenoisingMDP) -> DenoisingMDP:
        return kind(
            config.model,
            config.reward,
            config.prompts,
            num_steps=config.num_steps,
            sampler=config.sampler,
            noise_level=config.noise_level,
            size=config.size,
            decode_frames=config.decode_frames,
            device=config.device,
            dtype=config.dtype,
            gold=config.gold,
        )

    @property
    def num_steps(self) -> int:
        """Denoising steps of an episode (the length of the sampler's grid)."""
        return self.mdp.num_steps

    # ------------------------------------------------------------------ reset

    def reset(  # type: ignore[override]  # torch tensors instead of numpy arrays
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Starts new episodes.

        Args:
            seed: an int starts a fresh deterministic stream of videos and prompts; None continues the stream; a list
                of num_envs ints are the videos' own seeds (the same seed is the same noise, in any place of any
                batch).
            options: any of
                prompts / prompt_ids: texts or numbers, one for each group or one for each env;
                images: of a model that animates images, likewise (prompts are then their texts); image: one for all;
                latents: [B,C,F,H,W] to start from instead of noise; step: where on the grid, an int or [B];
                noise_levels: one number for each denoising step, for these episodes only;
                reset_mask: [B] bool, which envs to reset (whole groups); the others go on untouched.

        Returns:
            Observation and an empty info.

        Raises:
            ValueError: an unknown option, or one that does not fit; the message says what would.
        """
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"options must be a dict, got {type(options).__name__}")
        if isinstance(seed, str | float):
            raise TypeError(f"seed={seed!r}: expected an int, or a list of {self.num_envs} ints")
        options = dict(options or {})
        check_options(options, self.config.id, self.prompts)
        mask = reset_mask(options.get("reset_mask"), self.num_envs, self.group_size, first=self._latents is None)
        # Everything is prepared before anything changes: a refused reset loses no episode and no place in the stream.
        stream = Stream(seed=int(seed)) if isinstance(seed, Integral) else replace(self._stream)
        table = self._table(options.get("noise_levels"), bool(mask.all()))
        if seed is None or isinstance(seed, Integral):
            video_seeds = self.shard.own(stream.video_seeds(self.shard.widened(mask)))
        else:
            video_seeds = given_seeds(seed, self.num_envs)  # type: ignore[arg-type]
        step = given_step(options.get("step"), self.num_envs, table.num_steps)
        if options.get("latents") is None:
            latents = self.mdp.initial_latents(video_seeds)
        else:
            latents = given_latents(options["latents"], (self.num_envs, *self.mdp.latent_shape))
            latents = upload(latents, self.device, self.mdp.dtype)
        # Last of all, because texts that are new join the book here.
        prompt_ids = given_prompts(options, self.prompts, self.num_envs, self.group_size)
        if prompt_ids is None:
            drawn = stream.prompt_ids(self.shard.widened(mask), self.group_size, self.prompts.ids(self.split))
            prompt_ids = self.shard.own(drawn)
        self._stream, self.mdp.table = stream, table
        if self._latents is None or bool(mask.all()):
            self._latents, self._step, self._prompt_ids, self._video_seeds = latents, step, prompt_ids, video_seeds
            self._clean, self._unrendered = latents.detach(), None
            self._rollout_started = self.mdp.clock()
        else:
            wide = upload(mask, self.device).reshape(-1, 1, 1, 1, 1)
            self._latents = torch.where(wide, latents, self._latents)
            self._clean = torch.where(wide, latents, self._clean_latents()).detach()
            self._step = torch.where(mask, step, self._step)
            self._prompt_ids = torch.where(mask, prompt_ids, self._prompt_ids)
            self._video_seeds = torch.where(mask, video_seeds, self._video_seeds)
        self._restarted(mask)
        return self._observation(), {}

    def _restarted(self, mask: Tensor) -> None:
        """Called with the envs [B] bool whose state was set, and did not come from a step; for environments on top."""

    def _table(self, noise_levels: Any, everyone: bool) -> TransitionTable:
        """The table that holds after a reset with these noise levels."""
        if noise_levels is None:
            return self.mdp.base_table if everyone else self.mdp.table
        if not everyone:
            raise ValueError("noise_levels hold for all envs: they cannot be given together with a partial reset_mask")
        levels, steps = [float(v) for v in noise_levels], self.mdp.base_table.num_steps
        if len(levels) != steps:
            raise ValueError(f"noise_levels has {len(levels)} numbers; expected one for each of the {steps} steps")
        return self.mdp.make_table(self.config.num_steps, self.config.sampler, levels)

    # ------------------------------------------------------------------ step

    def step(  # type: ignore[override]  # torch tensors instead of numpy arrays
        self, action: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        """Applies x' = A_k x + B_k a to every video; the last step decodes and scores.

        Args:
            action: [B,C,F,H,W], what the network emits.

        Returns:
            Observation, reward [B], terminated [B] bool, truncated [B] bool (all False), info. At the end info has
            `reward_parts` ({name: [B]}) and `video` (what the reward saw, [b,n,3,H,W] of the b envs that end here, in
            their order, detached).

        Raises:
            TypeError: the action is no float tensor.
            ValueError: wrong shape, NaN or infinity. Numbers on an accelerator are looked at in the last step only,
                because each look would stall it; there the env is finished then, and needs a reset.
            RuntimeError: no reset yet, or an env that is finished.
        """
        if self._latents is None:
            raise RuntimeError("step was called before reset: call env.reset() first")
        finished = self._step >= self.num_steps  # steps are counted on the CPU: no look at them stalls an accelerator
        if bool(finished.any()):
            places = finished.nonzero().flatten().tolist()
            raise RuntimeError(
                f"envs {places[:8]} are finished and autoreset is off; call env.reset(), or "
                "env.reset(options={'reset_mask': terminated})"
            )
        self._check_action(action)
        action = action.to(self._latents.dtype)
        self._unrendered = self._latents.detach(), action.detach(), self._step
        self._latents = self.mdp.step(self._latents, action, self._step)
        self._step = self._step + 1
        terminated = self._step >= self.num_steps
        reward = torch.zeros(self.num_envs, dtype=self._latents.dtype, device=self.device)
        info: dict[str, Any] = {}
        if bool(terminated.any()):
            reward, info = self._finish(terminated, reward)
        ends = shared(terminated, self.device)
        return self._observation(), reward, ends, torch.zeros_like(ends), info

    def _finish(self, terminated: Tensor, reward: Tensor) -> tuple[Tensor, dict[str, Any]]:
        assert self._latents is not None
        rows = upload(terminated.nonzero().flatten(), self.device)
        everyone = bool(terminated.all())
        latents = self._latents if everyone else self._latents[rows]
        if self.device.type != "cpu":
            _check_finite(latents, "an action of this episode had", terminated.nonzero().flatten().tolist())
        if everyone and self._rollout_started is not None:
            self.mdp.counters.rollout_s += self.mdp.clock() - self._rollout_started
            self._rollout_started = None
        outcome = self.mdp.outcome(latents, self._prompt_ids[terminated], self._video_seeds[terminated])
        if everyone:
            return outcome.reward.to(reward.dtype), {"reward_parts": outcome.parts, "video": outcome.video}
        # Envs at other steps go on: their entries are 0.
        parts = {
            name: torch.zeros_like(reward).index_put((rows,), value.to(reward)) for name, value in outcome.parts.items()
        }
        return reward.index_put((rows,), outcome.reward.to(reward.dtype)), {
            "reward_parts": parts,
            "video": outcome.video,
        }

    def _check_action(self, action: Any) -> None:
        expected = (self.num_envs, *self.mdp.latent_shape)
        if not isinstance(action, Tensor) or not action.is_floating_point():
            kind = action.dtype if isinstance(action, Tensor) else type(action).__name__
            raise TypeError(f"action must be a float tensor of shape {expected}, got {kind}")
        if tuple(action.shape) != expected:
            raise ValueError(f"action must have shape {expected} (that of obs['latents']), got {tuple(action.shape)}")
        if action.device.type != self.device.type:
            raise ValueError(f"action is on {action.device}, the env on {self.device}; write action.to(env.device)")
        if self.device.type == "cpu":
            _check_finite(action, "action has")

    def _observation(self) -> dict[str, Tensor]:
        assert self._latents is not None
        table, at = self.mdp.table, self._step.clamp(max=self.num_steps - 1)
        going = self._step < self.num_steps
        dtype = self._latents.dtype
        numbers = {
            "timestep": torch.where(going, table.timesteps[at], 0.0).to(dtype),
            "step": self._step,
            "action_std": torch.where(going, table.action_std[at], 0.0).to(dtype),
            "stochastic": table.stochastic[at] & going,
            "prompt_id": self._prompt_ids,
            "video_seed": self._video_seeds,
        }
        obs = {"latents": self._latents} | {name: shared(value, self.device) for name, value in numbers.items()}
        return obs | self._observed_condition(obs) if self.config.observe_embedding else obs

    def _observed_condition(self, obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.mdp.condition_of(obs)

    def set_state(self, obs: Mapping[str, Tensor]) -> None:
        """Puts every env where an observation stands: its latents (with their graph), step, prompt and video seed.

        Unlike `reset` it starts nothing and draws nothing, so that a stored observation can be stepped again.
        """
        self._latents = obs["latents"]
        self._clean, self._unrendered = self._latents.detach(), None
        self._step = on_host(obs["step"])
        self._prompt_ids, self._video_seeds = on_host(obs["prompt_id"]), on_host(obs["video_seed"])
        self._restarted(torch.ones(self.num_envs, dtype=torch.bool))

    # ------------------------------------------------------------------ the rest

    def render(self) -> tuple[np.ndarray, ...]:  # type: ignore[override]
        """The predicted clean video of each env as one uint8 image, its frames side by side (the noise at step 0)."""
        if self._latents is None:
            raise RuntimeError("render was called before reset: call env.reset() first")
        with torch.no_grad():
            video = self.mdp.decode(self._clean_latents())
        return tuple(frame_row(v) for v in video)

    def _clean_latents(self) -> Tensor:
        """The clean estimate of the last step, worked out when somebody looks at it."""
        if self._unrendered is not None:
            self._clean, self._unrendered = self.mdp.x0(*self._unrendered), None
        return self._clean

    def prompt_ids(self, split: str | None = None) -> list[int]:
        """Numbers of a split's prompts (of this env's own split if None)."""
        return self.prompts.ids(split or self.split)

    def make_policy(self, **options: Any) -> DenoisingPolicy:
        """The model's denoiser with a LoRA of its own as a Gaussian policy; see `DenoisingPolicy`."""
        scale = options.setdefault("guidance_scale", self.config.guidance_scale)
        if "guidance_interval" in options:
            check_some_guidance(options["guidance_interval"], scale)
        options.setdefault("guidance_interval", self.config.guidance_interval)
        interval = as_interval(options["guidance_interval"])
        check_grid(interval, scale, self.mdp.schedule, self.mdp.base_table.timesteps)
        return DenoisingPolicy(self.mdp, **options)

    def derive(self, **changes: Any) -> DenoisingVectorEnv:
        """Another env on the same networks, for example `env.derive(split="test", num_steps=50)`.

        Args:
            changes: any of num_envs, group_size, num_steps, sampler, noise_level, split, decode_frames, reward, seed,
                guidance_scale and guidance_interval (of policies made from the new env), size, observe_embedding. A
                reward may be a name or {name: weight} where `make` could build one by name.
        """
        known = {
            "num_envs",
            "group_size",
            "num_steps",
            "sampler",
            "noise_level",
            "split",
            "decode_frames",
            "reward",
            "seed",
        }
        known |= {"guidance_scale", "guidance_interval", "size", "observe_embedding"}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(f"derive cannot change {unknown}; expected some of {sorted(known)}")
        if changes.get("guidance_interval") is not None:
            check_some_guidance(changes["guidance_interval"], changes.get("guidance_scale", self.config.guidance_scale))
        if changes.get("sampler", self.config.sampler) != self.config.sampler:
            changes.setdefault("noise_level", None)  # the other sampler's published one
        if isinstance(changes.get("reward"), str | Mapping):
            wanted = changes["reward"]
            assert self.config.context is not None  # make always gives one
            changes["reward"] = build_reward({wanted: 1.0} if isinstance(wanted, str) else wanted, self.config.context)
        if "reward" in changes:
            changes["reward"] = as_reward(changes["reward"])
        if "size" in changes and hasattr(self.model, "with_size"):
            changes["model"] = self.model.with_size(*changes["size"])
        twin = DenoisingVectorEnv(replace(self.config, **changes), self.render_mode)
        twin.mdp._conditions = self.mdp._conditions  # the same prompts and text encoder: embed once
        return twin

    def to_torchrl(self) -> Any:
        """The same process as a `torchrl.envs.EnvBase`."""
        from vdm_env.torchrl import DenoisingEnvBase

        return DenoisingEnvBase(self)

    def state_dict(self) -> dict[str, int]:
        """Where the stream of prompts and video seeds stands (not the latents in flight)."""
        return asdict(self._stream)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues the stream from a `state_dict`."""
        self._stream = Stream(**state)


def _check_finite(values: Tensor, what: str, places: Sequence[int] | None = None) -> None:
    """Raises ValueError where one of the values [B,...] is not finite; `places` are their envs, if not all."""
    # One reduction instead of a mask: a sum is finite only if all terms are (an overflow would be an error too).
    if not bool(torch.isfinite(values.detach().sum(dtype=torch.float64))):
        rows = (~torch.isfinite(values.detach()).flatten(1).all(1)).nonzero().flatten().tolist()
        rows = rows if places is None else [places[row] for row in rows]
        raise ValueError(f"{what} NaN or infinity for envs {rows[:8]}; look at the policy's loss and gradients")
