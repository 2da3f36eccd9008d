"""The environment as a `torchrl.envs.EnvBase`, and policies as TorchRL actors. The only file here that imports torchrl.

Keys: the observations of `vdm_env.env` at the root, `action`, and under `next` the observations, `reward` [B,1],
`done` and `terminated` [B,1]. `env.rollout(...)` keeps the graph, so reward back-propagation works through it;
TorchRL's collectors run without gradients. `env.set_seed(s); env.reset()` starts the same episode as the vector env's
`reset(seed=s)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType
from torchrl.modules import ProbabilisticActor

from vdm_env import noise as keyed_noise
from vdm_env.env import DenoisingVectorEnv
from vdm_env.host import upload
from vdm_env.policy import DenoisingPolicy, MeanNormal

_SEEN_BY_POLICY = ("latents", "timestep", "step", "action_std", "stochastic", "prompt_id", "video_seed")


class DenoisingEnvBase(EnvBase):
    """A `DenoisingVectorEnv` behind TorchRL's interface.

    Each step acts on the state in the tensordict it is given, so a rollout may start anywhere: from
    `env.reset(options={"step": 3})`, or from a stored tensordict with `env.rollout(n, tensordict=td,
    auto_reset=False)`. An attribute that is not TorchRL's (`num_steps`, `prompts`, `mdp`, `make_policy`, ...) is the
    vector env's.

    Args:
        env: the vector env; it is driven by this object from now on.
    """

    batch_locked = True

    def __init__(self, env: DenoisingVectorEnv) -> None:
        super().__init__(device=env.device, batch_size=torch.Size([env.num_envs]))
        self.vector = env
        self.info: dict[str, Any] = {}
        """the vector env's info of the last step: `reward_parts` and `video` once an episode has ended"""
        batch = (env.num_envs,)
        shape, float_type = (*batch, *env.mdp.latent_shape), env.mdp.dtype
        kinds = {
            "latents": Unbounded(shape, dtype=float_type),
            "timestep": Unbounded(batch, dtype=float_type),
            "step": Bounded(0, env.num_steps, batch, dtype=torch.int64),
            "action_std": Bounded(0.0, torch.inf, batch, dtype=float_type),
            "stochastic": Categorical(2, shape=torch.Size(batch), dtype=torch.bool),
            "prompt_id": Unbounded(batch, dtype=torch.int64),
            "video_seed": Unbounded(batch, dtype=torch.int64),
        }
        if env.config.observe_embedding:
            kinds |= {k: Unbounded((*batch, *v.shape[1:]), dtype=v.dtype) for k, v in env.mdp.unconditional(1).items()}
        self.observation_spec = Composite(kinds, shape=self.batch_size).to(env.device)
        self.action_spec = Unbounded(shape, dtype=float_type, device=env.device)
        self.reward_spec = Unbounded((*batch, 1), dtype=float_type, device=env.device)
        flags = {name: Binary(1, shape=torch.Size((*batch, 1)), dtype=torch.bool) for name in ("done", "terminated")}
        self.done_spec = Composite(flags, shape=self.batch_size).to(env.device)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "vector" not in self.__dict__:
                raise
            return getattr(self.__dict__["vector"], name)

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        options: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> TensorDict:
        options = dict(options or {})
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is not None:
            options["reset_mask"] = mask.reshape(self.batch_size)
        obs, self.info = self.vector.reset(seed=seed, options=options)
        going = torch.zeros(*self.batch_size, 1, dtype=torch.bool, device=self.device)
        return TensorDict({**obs, "done": going, "terminated": going.clone()}, self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.vector.set_state(tensordict)
        obs, reward, terminated, _, self.info = self.vector.step(tensordict["action"])
        done = terminated[:, None]
        return TensorDict(
            {**obs, "reward": reward[:, None], "done": done, "terminated": done.clone()},
            self.batch_size,
            device=self.device,
        )

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.vector.load_state_dict({"seed": int(seed), "videos_drawn": 0, "groups_drawn": 0})


class KeyedMeanNormal(MeanNormal):
    """`MeanNormal` whose samples draw their noise from (video seed, step), as `DenoisingPolicy` does.

    So an actor samples the same episode as `policy(obs)`, whatever the state of torch's generator.
    """

    def __init__(self, loc: Tensor, scale: Tensor, video_seed: Tensor, step: Tensor) -> None:
        super().__init__(loc, scale)
        self._keys = video_seed, step

    def rsample(self, sample_shape: Sequence[int] | torch.Size = (), *, noise: Tensor | None = None) -> Tensor:
        """As in `MeanNormal`, for one sample a video."""
        if len(sample_shape):
            raise ValueError(f"one sample a (video seed, step) is defined, got sample_shape={tuple(sample_shape)}")
        if noise is None:
            drawn = keyed_noise.normal(*self._keys, self.loc.shape[1:])
            noise = upload(drawn, self.loc.device, self.loc.dtype)
        return super().rsample(noise=noise)


def make_module(policy: DenoisingPolicy) -> TensorDictModule:
    """The policy as a module for `env.rollout(n, module)`: writes the reparameterised sample to `action`."""
    return TensorDictModule(_Call(policy, policy.forward), in_keys=list(_SEEN_BY_POLICY), out_keys=["action"])


def make_actor(policy: DenoisingPolicy, *, return_log_prob: bool = True) -> ProbabilisticActor:
    """The policy as a `ProbabilisticActor`, for TorchRL's losses (`ClipPPOLoss`) and collectors.

    It writes `loc`, `action` and `action_log_prob` (the mean over latent elements). Tensordicts have one batch
    dimension: flatten the [B, steps] of a rollout before a loss. Filter `requires_grad` when handing its parameters
    to an optimiser.
    """
    return ProbabilisticActor(
        TensorDictModule(_Call(policy, policy.mean), in_keys=list(_SEEN_BY_POLICY), out_keys=["loc"]),
        in_keys={"loc": "loc", "scale": "action_std", "video_seed": "video_seed", "step": "step"},
        out_keys=["action"],
        distribution_class=KeyedMeanNormal,
        return_log_prob=return_log_prob,
        default_interaction_type=ExplorationType.RANDOM,
    )


class _Call(torch.nn.Module):
    """One method of a policy as a module over the tensors of an observation; its parameters are the trainable ones."""

    def __init__(self, policy: DenoisingPolicy, method: Any) -> None:
        super().__init__()
        self.__dict__["_method"] = method  # no sub-module: the frozen network's parameters are not the actor's
        self.trainable = torch.nn.ParameterList(policy.trainable_parameters())

    def forward(self, *values: Tensor) -> Tensor:
        return self.__dict__["_method"](dict(zip(_SEEN_BY_POLICY, values, strict=True)))
