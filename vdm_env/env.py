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

Action space: [B,C,F,H,W], what the network emits (noise, v or flow), unbounded. Any float type; used in the latents' type.
Rewards: 0, and at the last step the reward model's score of the decoded video.
Starting state: noise keyed by the video's seed, or what `reset(options=...)` gives.
Episode end: `terminated` after `num_steps` steps, `truncated` never. Autoreset is disabled: the final latents stay in the
observation and stepping a finished env raises.
Arguments: see `vdm_env.make`. Version history: v0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from vdm_env import noise
from vdm_env.mdp import DenoisingMDP
from vdm_env.models.base import VideoModel
from vdm_env.policy import DenoisingPolicy
from vdm_env.prompts import PromptBook
from vdm_env.rewards.base import FramePolicy, Reward, as_reward
from vdm_env.video import frame_row

MAX_SEED = (1 << 63) - 2
"""Video seeds lie in 0 .. MAX_SEED: one below int64's largest, which Gymnasium's sampling of a Box cannot represent."""
_OPTIONS = ("prompts", "prompt_ids", "latents", "step", "noise_levels", "reset_mask", "image")


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Everything an environment is made of; `derive` makes another one with some of it changed."""

    id: str
    model: VideoModel
    reward: Reward
    prompts: PromptBook
    split: str
    num_envs: int
    group_size: int
    num_steps: int
    sampler: str
    noise_level: float | Sequence[float] | None
    guidance_scale: float
    size: tuple[int, int, int]
    decode_frames: FramePolicy | None
    device: torch.device | str
    dtype: torch.dtype
    seed: int
    gold: Any = None
    observe_embedding: bool = False

    def __post_init__(self) -> None:
        for name in ("num_envs", "group_size", "num_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
        if self.num_envs % self.group_size:
            near = max(1, round(self.num_envs / self.group_size)) * self.group_size
            raise ValueError(
                f"num_envs={self.num_envs} is not a multiple of group_size={self.group_size}; try num_envs={near}"
            )


class DenoisingVectorEnv(gymnasium.vector.VectorEnv):
    """See the module's docstring; made by `vdm_env.make`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4, "autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, config: EnvConfig, render_mode: str | None = "rgb_array") -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode={render_mode!r}: expected one of {self.metadata['render_modes']}, or None")
        self.config = config
        self.render_mode = render_mode
        self.mdp = DenoisingMDP(
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
        self.num_envs, self.group_size, self.split = config.num_envs, config.group_size, config.split
        config.prompts.ids(config.split)  # an unknown or empty split is refused here
        self.model, self.prompts, self.device = config.model, config.prompts, self.mdp.device
        self.single_observation_space = self._observation_space()
        float_type = np.float64 if config.dtype == torch.float64 else np.float32
        self.single_action_space = gymnasium.spaces.Box(-np.inf, np.inf, self.mdp.latent_shape, float_type)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._seed, self._videos_drawn, self._groups_drawn = config.seed, 0, 0
        self._latents: Tensor | None = None
        self._clean: Tensor | None = None

    def _observation_space(self) -> gymnasium.spaces.Dict:
        box = gymnasium.spaces.Box
        number: Any = np.float64 if self.config.dtype == torch.float64 else np.float32
        spaces: dict[str, gymnasium.Space[Any]] = {
            "latents": box(-np.inf, np.inf, self.mdp.latent_shape, number),
            "timestep": box(-np.inf, np.inf, (), number),
            "step": box(0, self.mdp.num_steps, (), np.int64),
            "action_std": box(0, np.inf, (), number),
            "stochastic": box(0, 1, (), np.bool_),
            "prompt_id": box(0, MAX_SEED, (), np.int64),
            "video_seed": box(0, MAX_SEED, (), np.int64),
        }
        if self.config.observe_embedding:
            spaces |= {name: _space_of(value[0]) for name, value in self.mdp.unconditional(1).items()}
        return gymnasium.spaces.Dict(spaces)

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
            seed: an int starts a fresh deterministic stream of videos and prompts; None continues the stream; a list of num_envs ints are
                the videos' own seeds (the same seed is the same noise, in any place of any batch).
            options: any of
                prompts / prompt_ids: texts or numbers, one for each group or one for each env;
                latents: [B,C,F,H,W] to start from instead of noise; step: where on the grid, an int or [B];
                noise_levels: one number for each denoising step, for these episodes only;
                reset_mask: [B] bool, which envs to reset (whole groups); the others go on untouched.

        Returns:
            Observation and an empty info.

        Raises:
            ValueError: an unknown option, or one that does not fit; the message says what would.
        """
        options = dict(options or {})
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"unknown reset options {unknown}; expected some of {list(_OPTIONS)}")
        if options.get("image") is not None:
            raise ValueError(f"{self.config.id}: option 'image' was given, but this model is conditioned on text alone; leave it out")
        mask = self._reset_mask(options.get("reset_mask"))
        if isinstance(seed, Integral):
            self._seed, self._videos_drawn, self._groups_drawn = int(seed), 0, 0
        self._set_noise_levels(options.get("noise_levels"), bool(mask.all()))
        prompt_ids = self._draw_prompts(options, mask)
        video_seeds = self._draw_seeds(seed, mask)
        latents = self._start_latents(options.get("latents"), video_seeds)
        step = self._start_step(options.get("step"))
        if self._latents is None or bool(mask.all()):
            self._latents, self._step, self._prompt_ids, self._video_seeds = latents, step, prompt_ids, video_seeds
            self._clean = latents.detach()
        else:
            wide = mask.to(self.device).reshape(-1, 1, 1, 1, 1)
            self._latents = torch.where(wide, latents, self._latents)
            self._clean = torch.where(wide, latents, self._clean).detach()
            self._step = torch.where(mask.to(self.device), step, self._step)
            self._prompt_ids = torch.where(mask, prompt_ids, self._prompt_ids)
            self._video_seeds = torch.where(mask, video_seeds, self._video_seeds)
        return self._observation(), {}

    def _reset_mask(self, given: Any) -> Tensor:
        if given is None:
            return torch.ones(self.num_envs, dtype=torch.bool)
        mask = torch.as_tensor(given).cpu()
        if mask.dtype != torch.bool or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"reset_mask must be bool of shape ({self.num_envs},) with at least one True, got {mask.dtype} {tuple(mask.shape)}"
            )
        groups = mask.reshape(-1, self.group_size)
        if bool((groups.any(1) != groups.all(1)).any()):
            raise ValueError(f"reset_mask cuts through a group of {self.group_size}; reset whole groups: {mask.tolist()}")
        if self._latents is None and not bool(mask.all()):
            raise ValueError("the first reset must start every env; leave reset_mask out")
        return mask

    def _set_noise_levels(self, levels: Any, everyone: bool) -> None:
        if levels is None:
            if everyone:
                self.mdp.table = self.mdp.base_table
            return
        if not everyone:
            raise ValueError("noise_levels hold for all envs: they cannot be given together with a partial reset_mask")
        levels = [float(v) for v in levels]
        if len(levels) != self.mdp.base_table.num_steps:
            raise ValueError(
                f"noise_levels has {len(levels)} numbers; expected one for each of the {self.mdp.base_table.num_steps} steps"
            )
        self.mdp.table = self.mdp.make_table(self.config.num_steps, self.config.sampler, levels)

    def _draw_prompts(self, options: Mapping[str, Any], mask: Tensor) -> Tensor:
        texts, ids = options.get("prompts"), options.get("prompt_ids")
        if texts is not None and ids is not None:
            raise ValueError("give prompts or prompt_ids, not both")
        if texts is not None:
            ids = self.prompts.add(texts)
        if ids is not None:
            given = [int(i) for i in ids]
            groups = self.num_envs // self.group_size
            if len(given) == groups:
                given = [i for i in given for _ in range(self.group_size)]
            if len(given) != self.num_envs:
                raise ValueError(f"got {len(given)} prompts; expected {groups} (one a group) or {self.num_envs} (one an env)")
            outside = [i for i in given if not 0 <= i < len(self.prompts)]
            if outside:
                raise ValueError(f"prompt_ids {outside} are outside the {len(self.prompts)} known prompts (env.prompts)")
            chosen = torch.tensor(given)
            if bool((chosen.reshape(-1, self.group_size) != chosen[:: self.group_size, None]).any()):
                raise ValueError(f"the {self.group_size} envs of a group must share their prompt, got prompt_ids {given}")
            return chosen
        pool = torch.tensor(self.prompts.ids(self.split))
        drawn = torch.zeros(self.num_envs, dtype=torch.int64)
        for group in mask.reshape(-1, self.group_size)[:, 0].nonzero().flatten().tolist():
            # An endless shuffle: every prompt once before any comes again.
            epoch, place = divmod(self._groups_drawn, len(pool))
            order = torch.randperm(len(pool), generator=noise.generator_for(self._seed, 1, epoch))
            drawn[group * self.group_size : (group + 1) * self.group_size] = pool[order[place]]
            self._groups_drawn += 1
        return drawn

    def _draw_seeds(self, seed: int | Sequence[int] | None, mask: Tensor) -> Tensor:
        if seed is not None and not isinstance(seed, Integral):
            seeds_given = [int(s) for s in seed]  # type: ignore[union-attr]
            if len(seeds_given) != self.num_envs or not all(0 <= s <= MAX_SEED for s in seeds_given):
                raise ValueError(
                    f"got video seeds {seeds_given}; expected one int for the stream, or {self.num_envs} ints in 0 .. {MAX_SEED}"
                )
            return torch.tensor(seeds_given)
        seeds = torch.zeros(self.num_envs, dtype=torch.int64)
        for place in mask.nonzero().flatten().tolist():
            seeds[place] = noise.mix(self._seed, 2, self._videos_drawn)
            self._videos_drawn += 1
        return seeds

    def _start_latents(self, given: Any, video_seeds: Tensor) -> Tensor:
        if given is None:
            return self.mdp.initial_latents(video_seeds)
        expected = (self.num_envs, *self.mdp.latent_shape)
        if not isinstance(given, Tensor) or tuple(given.shape) != expected or not given.is_floating_point():
            got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"option latents must be a float tensor of shape {expected}, got {got}")
        if not bool(torch.isfinite(given.detach()).all()):
            raise ValueError("option latents has NaN or infinity; start from finite latents, or leave it out for noise")
        return given.to(self.device, self.mdp.dtype)

    def _start_step(self, given: Any) -> Tensor:
        step = torch.as_tensor(0 if given is None else given, dtype=torch.int64, device=self.device).expand(self.num_envs).clone()
        if int(step.min()) < 0 or int(step.max()) >= self.num_steps:
            raise ValueError(f"option step must lie in 0 .. {self.num_steps - 1}, got {step.tolist()}")
        return step

    # ------------------------------------------------------------------ step

    def step(  # type: ignore[override]  # torch tensors instead of numpy arrays
        self, action: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        """Applies x' = A_k x + B_k a to every video; the last step decodes and scores.

        Args:
            action: [B,C,F,H,W], what the network emits.

        Returns:
            Observation, reward [B], terminated [B] bool, truncated [B] bool (all False), info. At the end info has `reward_parts`
            ({name: [B]}) and `video` (what the reward saw, [B,n,3,H,W], detached).

        Raises:
            TypeError: the action is no float tensor.
            ValueError: wrong shape, NaN or infinity.
            RuntimeError: no reset yet, or an env that is finished.
        """
        if self._latents is None:
            raise RuntimeError("step was called before reset: call env.reset() first")
        finished = self._step >= self.num_steps
        if bool(finished.any()):
            places = finished.nonzero().flatten().tolist()
            raise RuntimeError(
                f"envs {places[:8]} are finished; call env.reset() (or env.reset(options={{'reset_mask': terminated}})): autoreset is off"
            )
        self._check_action(action)
        action = action.to(self._latents.dtype)
        with torch.no_grad():
            self._clean = self.mdp.x0(self._latents, action, self._step).detach()
        self._latents = self.mdp.step(self._latents, action, self._step)
        self._step = self._step + 1
        terminated = self._step >= self.num_steps
        reward = torch.zeros(self.num_envs, dtype=self._latents.dtype, device=self.device)
        info: dict[str, Any] = {}
        if bool(terminated.any()):
            reward, info = self._finish(terminated, reward)
        return self._observation(), reward, terminated, torch.zeros_like(terminated), info

    def _finish(self, terminated: Tensor, reward: Tensor) -> tuple[Tensor, dict[str, Any]]:
        assert self._latents is not None
        done = terminated.cpu()
        rows = terminated.nonzero().flatten()
        everyone = bool(done.all())
        latents = self._latents if everyone else self._latents[rows]
        outcome = self.mdp.outcome(latents, self._prompt_ids[done], self._video_seeds[done])
        if everyone:
            return outcome.reward.to(reward.dtype), {"reward_parts": outcome.parts, "video": outcome.video}
        # Envs at other steps go on: their entries are 0.
        parts = {name: torch.zeros_like(reward).index_put((rows,), value.to(reward)) for name, value in outcome.parts.items()}
        return reward.index_put((rows,), outcome.reward.to(reward.dtype)), {"reward_parts": parts, "video": outcome.video}

    def _check_action(self, action: Any) -> None:
        expected = (self.num_envs, *self.mdp.latent_shape)
        if not isinstance(action, Tensor) or not action.is_floating_point():
            kind = action.dtype if isinstance(action, Tensor) else type(action).__name__
            raise TypeError(f"action must be a float tensor of shape {expected}, got {kind}")
        if tuple(action.shape) != expected:
            raise ValueError(f"action must have shape {expected} (that of obs['latents']), got {tuple(action.shape)}")
        if action.device.type != self.device.type:
            raise ValueError(f"action is on {action.device}, the env on {self.device}; write action.to(env.device)")
        # One reduction instead of a mask: a sum is finite only if all terms are (and overflow would be an error just as well).
        if not bool(torch.isfinite(action.detach().sum(dtype=torch.float64))):
            rows = (~torch.isfinite(action.detach()).flatten(1).all(1)).nonzero().flatten().tolist()
            raise ValueError(f"action has NaN or infinity for envs {rows[:8]}; look at the policy's loss and gradients")

    def _observation(self) -> dict[str, Tensor]:
        assert self._latents is not None
        table, at = self.mdp.table, self._step.clamp(max=self.num_steps - 1)
        going = self._step < self.num_steps
        dtype = self._latents.dtype
        obs = {
            "latents": self._latents,
            "timestep": torch.where(going, table.timesteps[at], 0.0).to(dtype),
            "step": self._step.clone(),
            "action_std": torch.where(going, table.action_std[at], 0.0).to(dtype),
            "stochastic": table.stochastic[at] & going,
            "prompt_id": self._prompt_ids.to(self.device, copy=True),
            "video_seed": self._video_seeds.to(self.device, copy=True),
        }
        return obs | self.mdp.condition(self._prompt_ids) if self.config.observe_embedding else obs

    def set_state(self, obs: Mapping[str, Tensor]) -> None:
        """Puts every env where an observation stands: its latents (with their graph), step, prompt and video seed.

        Unlike `reset` it starts nothing and draws nothing, so that a stored observation can be stepped again.
        """
        self._latents = obs["latents"]
        self._clean = self._latents.detach()
        self._step = obs["step"].to(self.device)
        self._prompt_ids, self._video_seeds = obs["prompt_id"].cpu(), obs["video_seed"].cpu()

    # ------------------------------------------------------------------ the rest

    def render(self) -> tuple[np.ndarray, ...]:  # type: ignore[override]
        """The predicted clean video of each env as one uint8 image, its frames side by side (the noise at step 0)."""
        if self._clean is None:
            raise RuntimeError("render was called before reset: call env.reset() first")
        with torch.no_grad():
            video = self.mdp.decode(self._clean)
        return tuple(frame_row(v) for v in video)

    def prompt_ids(self, split: str | None = None) -> list[int]:
        """Numbers of a split's prompts (of this env's own split if None)."""
        return self.prompts.ids(split or self.split)

    def make_policy(self, **options: Any) -> DenoisingPolicy:
        """The model's denoiser with a LoRA of its own as a Gaussian policy; see `DenoisingPolicy`."""
        options.setdefault("guidance_scale", self.config.guidance_scale)
        return DenoisingPolicy(self.mdp, **options)

    def derive(self, **changes: Any) -> DenoisingVectorEnv:
        """Another env on the same networks, for example `env.derive(split="test", num_steps=50)`.

        Args:
            changes: any of num_envs, group_size, num_steps, sampler, noise_level, split, decode_frames, reward, seed, guidance_scale,
                size, observe_embedding.
        """
        known = {"num_envs", "group_size", "num_steps", "sampler", "noise_level", "split", "decode_frames", "reward", "seed"}
        known |= {"guidance_scale", "size", "observe_embedding"}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(f"derive cannot change {unknown}; expected some of {sorted(known)}")
        if changes.get("sampler", self.config.sampler) != self.config.sampler:
            changes.setdefault("noise_level", None)  # the other sampler's published one
        if "reward" in changes:
            changes["reward"] = as_reward(changes["reward"])
        twin = DenoisingVectorEnv(replace(self.config, **changes), self.render_mode)
        twin.mdp._conditions = self.mdp._conditions  # the same prompts and text encoder: embed once
        return twin

    def to_torchrl(self) -> Any:
        """The same process as a `torchrl.envs.EnvBase`."""
        from vdm_env.torchrl import DenoisingEnvBase

        return DenoisingEnvBase(self)

    def state_dict(self) -> dict[str, int]:
        """Where the stream of prompts and video seeds stands (not the latents in flight)."""
        return {"seed": self._seed, "videos_drawn": self._videos_drawn, "groups_drawn": self._groups_drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues the stream from a `state_dict`."""
        self._seed, self._videos_drawn, self._groups_drawn = state["seed"], state["videos_drawn"], state["groups_drawn"]


def _space_of(value: Tensor) -> gymnasium.spaces.Box:
    """The space of one prompt's entry of a condition."""
    kind = np.dtype(str(value.dtype).removeprefix("torch.")).type
    low, high = (0, 1) if value.dtype == torch.bool else (-np.inf, np.inf)
    if not value.is_floating_point() and value.dtype != torch.bool:
        low, high = 0, MAX_SEED
    return gymnasium.spaces.Box(low, high, tuple(value.shape), kind)
