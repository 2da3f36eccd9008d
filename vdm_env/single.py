"""The single numpy environment: one video, plain arrays, for everything written against `gymnasium.Env`.

Description: as the vector environment (`vdm_env.env`) with one video, without its batch axis and without gradients.

Observation space: the vector environment's dict for one video: latents [C,F,H,W], and the entries that are one number
a video of shape [1], because Stable-Baselines3 takes no arrays of shape []. Unless `observe_embedding=False` also
what the network is conditioned on, under the model's own names ("text" [L,D] for most). Action space: Box of the
latents' shape; infinite, or [-action_bound, action_bound] for code that insists on finite bounds. Actions are never
clipped here. Rewards, starting state, episode end: as there. Arguments: see `vdm_env.make` and `DenoisingEnv`.
Version history: v0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from vdm_env.env import DenoisingVectorEnv
from vdm_env.host import upload


class DenoisingEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One video as a `gymnasium.Env`, on the networks of a vector env.

    Args:
        env: the vector env whose process this is; it keeps its own state, and its `num_envs` does not matter.
        observe_embedding: put the prompt's embedding into the observation.
        action_bound: finite bound of the action space; None leaves it unbounded. Choose it beyond |output| + 5
            action_std: a caller that clips to the box (as Stable-Baselines3 does) must not touch real actions.

    Raises:
        ValueError: a bound that is not a positive finite number.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self, env: DenoisingVectorEnv, *, observe_embedding: bool = True, action_bound: float | None = None
    ) -> None:
        if action_bound is not None and not (math.isfinite(action_bound) and action_bound > 0):
            raise ValueError(f"action_bound={action_bound}: expected a positive finite number, or None for no bound")
        self.vector = env.derive(num_envs=1, group_size=1, observe_embedding=observe_embedding)
        self.render_mode = env.render_mode
        self.mdp, self.model, self.prompts = self.vector.mdp, self.vector.model, self.vector.prompts
        self.split = self.vector.split
        spaces: Any = self.vector.single_observation_space
        self.observation_space = gymnasium.spaces.Dict(  # type: ignore[assignment]
            {name: _at_least_1d(space) for name, space in spaces.items()}
        )
        box = self.vector.single_action_space
        bound = np.inf if action_bound is None else action_bound
        self.action_space = gymnasium.spaces.Box(-bound, bound, box.shape, box.dtype.type)  # type: ignore[union-attr]

    @property
    def num_steps(self) -> int:
        """Denoising steps of an episode."""
        return self.vector.num_steps

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts a new episode.

        Args:
            seed: starts a fresh deterministic stream of videos and prompts; None continues it.
            options: any of prompt (text), prompt_id or image, latents [C,F,H,W], step (int), noise_levels; see the
                vector env.

        Raises:
            ValueError: an unknown option, or one that does not fit.
        """
        super().reset(seed=seed)
        given = dict(options or {})
        known = ("prompt", "prompt_id", "image", "latents", "step", "noise_levels")
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"unknown reset options {unknown}; expected some of {list(known)}")
        wide: dict[str, Any] = {name: given[name] for name in ("image", "step", "noise_levels") if name in given}
        if "prompt" in given:
            wide["prompts"] = [given["prompt"]]
        if "prompt_id" in given:
            wide["prompt_ids"] = [given["prompt_id"]]
        if given.get("latents") is not None:
            wide["latents"] = torch.as_tensor(np.array(given["latents"]))[None]
        obs, _ = self.vector.reset(seed=seed, options=wide)
        return _row(obs), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One denoising step; `action` [C,F,H,W] is what the network emits.

        At the end info has `reward_parts` ({name: float}) and `video` (what the reward saw, [n,3,H,W] float in [0,1]).

        Raises:
            TypeError, ValueError, RuntimeError: as the vector env's.
        """
        if not isinstance(action, np.ndarray) or action.dtype.kind != "f":
            kind = action.dtype if isinstance(action, np.ndarray) else type(action).__name__
            raise TypeError(f"action must be a float array of shape {self.action_space.shape}, got {kind}")
        if action.shape != self.action_space.shape:
            raise ValueError(f"action must have shape {self.action_space.shape}, got {action.shape}")
        with torch.no_grad():
            given = upload(torch.as_tensor(np.array(action))[None], self.vector.device)
            obs, reward, terminated, _, info = self.vector.step(given)
        plain: dict[str, Any] = {}
        if info:
            plain["reward_parts"] = {name: float(value[0]) for name, value in info["reward_parts"].items()}
            plain["video"] = _array(info["video"][0])
        return _row(obs), float(reward[0]), bool(terminated[0]), False, plain

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """The predicted clean video as one uint8 image [H,F*W,3], frames side by side; None without a render mode."""
        return self.vector.render()[0] if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self.vector.close()


def _array(value: Tensor) -> np.ndarray:
    """A copy: observations must not change when the env goes on."""
    return value.detach().cpu().numpy().copy()


def _row(obs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: np.atleast_1d(_array(value[0])) for name, value in obs.items()}


def _at_least_1d(space: gymnasium.Space[Any]) -> gymnasium.Space[Any]:
    if not isinstance(space, gymnasium.spaces.Box) or space.shape:
        return space
    return gymnasium.spaces.Box(space.low.reshape(1), space.high.reshape(1), (1,), space.dtype.type)  # type: ignore[union-attr]
