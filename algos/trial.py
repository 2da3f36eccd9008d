"""One update of an algorithm on trial: what it touched, with everything put back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 5  # attributes of attributes: from an MDP to the layers of a part of its model


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """What one update of an algorithm did."""

    metrics: dict[str, float]
    """what `update()` returned"""
    reached: int
    """how many trainable parameters a gradient reached"""
    trainable: int
    """how many there are"""
    strays: list[str]
    """names of other parameters that got a gradient or changed"""
    reference_shift: float
    """largest |change| of the reference's output on a fixed observation"""


def try_update(algorithm: Any) -> Trial:
    """Makes one update, watches what it touches, and puts everything back.

    Back come the policy's weights, the algorithm's state, every other weight of the networks (copies wait in the CPU's
    memory) and the counters. What the algorithm's `state_dict` leaves out does not.

    Args:
        algorithm: has `env`, `policy`, `update`, `state_dict` and `load_state_dict`.
    """
    env, policy = algorithm.env, algorithm.policy
    trainable = {id(p): p for p in policy.trainable_parameters()}
    others = {name: p for name, p in parameters_of(env.mdp, policy) if id(p) not in trainable}
    before = {name: p.detach().to("cpu", copy=True) for name, p in others.items()}
    asked = {name: p.requires_grad for name, p in others.items()}
    weights = policy.lora_state_dict()
    state = copy.deepcopy(algorithm.state_dict())
    obs, _ = env.derive(seed=0).reset()
    touched: set[int] = set()

    def remember(key: int, gradient: Tensor) -> None:
        touched.add(key)

    for p in others.values():
        p.grad = None
    watched = [p for p in (*trainable.values(), *others.values()) if p.requires_grad]
    hooks = [p.register_hook(partial(remember, id(p))) for p in watched]
    with costing_nothing(env):
        reference = _reference(policy, obs)
        try:
            metrics = dict(algorithm.update())
            shift = float((_reference(policy, obs) - reference).abs().max())
            strays = [
                name
                for name, p in others.items()
                if id(p) in touched or p.grad is not None or not torch.equal(p.detach().cpu(), before[name])
            ]
        finally:
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                for name, p in others.items():
                    p.copy_(before[name])
                    p.requires_grad_(asked[name]).grad = None
            policy.load_lora_state_dict(weights)
            algorithm.load_state_dict(state)
    return Trial(
        metrics=metrics,
        reached=len(touched & set(trainable)),
        trainable=len(trainable),
        strays=sorted(strays),
        reference_shift=shift,
    )


@contextmanager
def costing_nothing(env: Any) -> Iterator[None]:
    """Inside, the env may be used; afterwards its stream of videos and its counters are where they were."""
    stream, counters = env.state_dict(), replace(env.mdp.counters)
    try:
        yield
    finally:
        env.load_state_dict(stream)
        for field in fields(counters):
            setattr(env.mdp.counters, field.name, getattr(counters, field.name))


@torch.no_grad()
def _reference(policy: Any, obs: dict[str, Tensor]) -> Tensor:
    with policy.reference():
        return policy.mean(obs).clone()


def parameters_of(*roots: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of every module that is found from the roots through attributes, lists and dicts; each once."""
    seen: set[int] = set()
    queue = [(type(root).__name__, root, 0) for root in roots]
    while queue:
        name, thing, depth = queue.pop(0)
        if id(thing) in seen or depth > _DEPTH or isinstance(thing, Tensor | type | ModuleType | str | int | float):
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            for key, parameter in thing.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{name}.{key}", parameter
        queue += [(f"{name}.{key}", value, depth + 1) for key, value in _attributes(thing)]


def _attributes(thing: Any) -> list[tuple[str, Any]]:
    if isinstance(thing, dict):
        return [(str(key), value) for key, value in thing.items()]
    if isinstance(thing, list | tuple):
        return [(str(i), value) for i, value in enumerate(thing)]
    found = dict(getattr(thing, "__dict__", {}))
    for kind in type(thing).__mro__:
        slots = getattr(kind, "__slots__", ())
        for key in (slots,) if isinstance(slots, str) else slots:
            found.setdefault(key, getattr(thing, key, None))
    # the parameters of a module's own parts were found above
    return [(key, value) for key, value in found.items() if key not in ("_parameters", "_buffers", "_modules")]
