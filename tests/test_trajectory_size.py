"""What algorithms keep of a rollout: at most twice the sequence of its latents, and one copy of it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import algos.ddpo
import algos.flow_grpo
from algos.rollout import Rollout, collect
from tests.models import tiny_env


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each memory that these tensors lie in, by its address: views and aliases count once, as a whole."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def stored(rollout: Rollout) -> dict[int, int]:
    tensors = [value for obs in rollout.observations for value in obs.values()]
    tensors += [*rollout.actions, *rollout.log_probs, *rollout.parts.values(), rollout.reward, rollout.prompt_id]
    return storages(tensors)


def alive(least: int) -> dict[int, int]:
    """Every memory of at least this many bytes that some tensor of this process holds."""
    gc.collect()
    # Plain ones: those that a compiler imagines, which other tests leave behind, lie in no memory.
    found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and not thing.is_meta]
    return {key: size for key, size in storages(found).items() if size >= least}


def algorithm(name: str, env: Any) -> Any:
    policy = env.make_policy(lora_rank=1)
    if name == "ddpo":
        config = algos.ddpo.DDPOConfig(videos_per_rollout=8, updates_per_rollout=1, advantage="batch")
        return algos.ddpo.DDPO(env, policy, config)
    grpo = algos.flow_grpo.FlowGRPOConfig(videos_per_rollout=8, updates_per_rollout=1)
    return algos.flow_grpo.FlowGRPO(env, policy, grpo)


@pytest.mark.parametrize(("name", "kind"), [("ddpo", "unet"), ("flow_grpo", "flow")])
def test_a_rollout_is_at_most_twice_its_latents(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """x_k and a_k of S steps, beside S + 1 latents: x_{k+1} of a step is x_k of the next one and is not kept twice."""
    env = tiny_env(kind, num_envs=4, group_size=4, num_steps=10)
    learner = algorithm(name, env)
    env.reset(seed=0)
    one = env.mdp.initial_latents(torch.arange(4)).nbytes
    sequence = 2 * (env.num_steps + 1) * one  # of two batches of four videos
    seen: list[Rollout] = []
    measured: list[int] = []

    def noted(*given: Any, **options: Any) -> Rollout:
        seen.append(collect(*given, **options))
        return seen[-1]

    accumulate = type(learner)._accumulate

    def during(self: Any, *given: Any) -> Any:
        measured.append(sum(size for key, size in alive(one).items() if key not in before))
        return accumulate(self, *given)

    monkeypatch.setattr(getattr(algos, name), "collect", noted)
    monkeypatch.setattr(type(learner), "_accumulate", during)
    before = alive(one)
    learner.update()
    assert len(seen) == 2
    kept: dict[int, int] = {}
    for rollout in seen:
        kept |= stored(rollout)
    assert sequence < sum(kept.values()) <= 2 * sequence, f"{sum(kept.values()) / sequence:.2f} times the latents"
    # What else is alive when learning starts: the env's last latents and the video that was scored.
    video = 4 * env.mdp.num_frames * 3 * env.mdp.height * env.mdp.width * 4
    assert sequence < measured[0] <= 2 * sequence + video, f"{measured[0] / sequence:.2f} times the latents"


def test_an_observation_without_embeddings_is_its_latents() -> None:
    """The other entries are a few numbers a video; embeddings would be larger than small latents."""
    env = tiny_env(num_envs=4, num_steps=10)
    rollout = collect(env, env.make_policy(lora_rank=1))
    latents = sum(storages([obs["latents"] for obs in rollout.observations]).values())
    actions = sum(storages(rollout.actions).values())
    assert latents == actions == 10 * rollout.actions[0].nbytes
    assert sum(stored(rollout).values()) < 1.1 * (latents + actions)
    assert all(not value.requires_grad for obs in rollout.observations for value in obs.values())
