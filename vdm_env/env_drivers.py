"""One face for the three kinds of environment, so that the same checks run on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from torch import Tensor

Step = tuple[dict[str, Tensor], Tensor, Tensor, Tensor]


class Driver(Protocol):
    """An environment as dicts of tensors, batch first; `step` gives observation, reward, terminated and truncated."""

    mdp: Any
    num_envs: int
    group_size: int
    num_steps: int
    keeps_graph: bool
    """whether gradients pass `step`"""
    takes_mask: bool
    """whether `reset(options={"reset_mask": ...})` is part of the interface"""

    def reset(self, seed: int | None = None, options: Mapping[str, Any] | None = None) -> dict[str, Tensor]: ...

    def step(self, action: Tensor) -> Step: ...

    def in_space(self) -> bool:
        """Whether the latest observation lies in the env's own space or spec."""
        ...


class VectorDriver:
    """A torch-native `gymnasium.vector.VectorEnv`."""

    keeps_graph, takes_mask = True, True

    def __init__(self, env: Any) -> None:
        self.env, core = env, env.unwrapped
        self.mdp, self.num_envs, self.group_size = core.mdp, env.num_envs, core.group_size
        self.num_steps = core.num_steps

    def reset(self, seed: int | None = None, options: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        self.obs, _ = self.env.reset(seed=seed, options=dict(options or {}))
        return dict(self.obs)

    def step(self, action: Tensor) -> Step:
        self.obs, reward, terminated, truncated, _ = self.env.step(action)
        return dict(self.obs), reward, terminated, truncated

    def in_space(self) -> bool:
        obs = {name: value.detach().cpu().numpy() for name, value in self.obs.items()}
        return bool(self.env.observation_space.contains(obs))


class SingleDriver:
    """A numpy `gymnasium.Env`, as a batch of one."""

    keeps_graph, takes_mask = False, False
    num_envs = group_size = 1

    def __init__(self, env: Any) -> None:
        self.env, self.mdp, self.num_steps = env, env.unwrapped.mdp, env.unwrapped.num_steps

    def reset(self, seed: int | None = None, options: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        self.obs, _ = self.env.reset(seed=seed, options=dict(options or {}))
        return self._batched(self.obs)

    def step(self, action: Tensor) -> Step:
        self.obs, reward, terminated, truncated, _ = self.env.step(action[0].numpy())
        return self._batched(self.obs), torch.tensor([reward]), torch.tensor([terminated]), torch.tensor([truncated])

    def in_space(self) -> bool:
        return bool(self.env.observation_space.contains(self.obs))

    @staticmethod
    def _batched(obs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        tensors = {name: torch.as_tensor(value) for name, value in obs.items()}  # shares memory: changes would be seen
        return {name: value if value.shape == (1,) else value[None] for name, value in tensors.items()}


class TorchRLDriver:
    """A `torchrl.envs.EnvBase`."""

    keeps_graph, takes_mask = True, False

    def __init__(self, env: Any) -> None:
        self.env, self.mdp, self.num_steps = env, env.mdp, env.num_steps
        self.num_envs, self.group_size = env.batch_size[0], env.group_size

    def reset(self, seed: int | None = None, options: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        if seed is not None:
            self.env.set_seed(seed)
        self.tensordict = self.env.reset()
        return self._observation()

    def step(self, action: Tensor) -> Step:
        # A fresh one: EnvBase.step writes into what it is given.
        after = self.env.step(self.tensordict.copy().set("action", action))["next"]
        self.tensordict = after.exclude("reward")
        ends = after["terminated"][:, 0]
        return self._observation(), after["reward"][:, 0], ends, after["done"][:, 0] & ~ends

    def in_space(self) -> bool:
        return bool(self.env.observation_spec.is_in(self.tensordict.select(*self.env.observation_spec.keys())))

    def _observation(self) -> dict[str, Tensor]:
        return {name: self.tensordict[name] for name in self.env.observation_spec.keys()}


def driver_of(env: Any) -> Driver:
    """The driver for an environment.

    Raises:
        TypeError: none of the three kinds, or no process of this package inside.
    """
    if isinstance(env, gymnasium.vector.VectorEnv):
        kind: Any = VectorDriver
    elif isinstance(env, gymnasium.Env):
        kind = SingleDriver
    elif hasattr(env, "observation_spec") and hasattr(env, "rollout"):  # torchrl itself need not be imported for this
        kind = TorchRLDriver
    else:
        raise TypeError(
            f"{type(env).__name__} is no environment: expected a gymnasium.vector.VectorEnv, a gymnasium.Env or a "
            "torchrl.envs.EnvBase, as vdm_env.make, gymnasium.make and env.to_torchrl() give them"
        )
    core = env if kind is TorchRLDriver else env.unwrapped
    if not hasattr(core, "mdp") or not hasattr(core, "num_steps"):
        raise TypeError(f"{type(core).__name__} has no `mdp` and `num_steps`: it is no denoising environment")
    return kind(env)
