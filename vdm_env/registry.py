"""Environment ids, the models and rewards they name, and plug-ins; `making.py` makes the environments.

An id is `<Model>-<Reward>`; rewards combine with `+`, with weights in front: "VideoCrafter2-HPS+Aesthetic",
"MovingShapes-HPS+0.1*Aesthetic". A reward of several scores gives one of them when it is named after a colon:
"VideoCrafter2-VideoScore:temporal". Other packages add models and rewards through `register_model`, `register_reward`,
or the entry-point groups `vdm_env.models` and `vdm_env.rewards` (a loader or builder each, under the name it gets in
ids).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch

from vdm_env.gym import register_envs
from vdm_env.models import MODELS, ModelEntry, VideoModel
from vdm_env.rewards import REWARDS, Part, Reward, RewardContext, RewardEntry, WeightedSum, as_reward


@cache
def _plugins(group: str) -> dict[str, Callable[..., Any]]:
    """What other packages offer, by name; a plug-in's code is imported when it is used, not when it is listed."""

    def late(point: EntryPoint) -> Callable[..., Any]:
        return lambda *args, **options: point.load()(*args, **options)

    return {point.name: late(point) for point in entry_points(group=group)}


def _models() -> dict[str, ModelEntry]:
    return {**{name: ModelEntry(load, "plug-in") for name, load in _plugins("vdm_env.models").items()}, **MODELS}


def _rewards() -> dict[str, RewardEntry]:
    return {
        **{name: RewardEntry(build, "plug-in", True) for name, build in _plugins("vdm_env.rewards").items()},
        **REWARDS,
    }


def list_models() -> list[str]:
    """Names of all models, plug-ins included."""
    return sorted(_models())


def list_rewards() -> list[str]:
    """Names of all rewards, plug-ins included."""
    return sorted(_rewards())


def list_envs() -> list[str]:
    """All ids of one model and one reward; rewards also combine with `+`."""
    models, rewards = _models(), _rewards()
    return [
        f"{model}-{reward}"
        for model in sorted(models)
        for reward in sorted(rewards)
        if not (models[model].world and rewards[reward].published)  # small weights do not carry a published name
    ]


def register_model(name: str, load: Callable[..., VideoModel], summary: str = "") -> None:
    """Adds a model: `load(*, weights, scale, device, dtype, seed)` returns a `VideoModel`.

    Raises:
        ValueError: the name is taken, or has a "-" in it (ids are split there).
    """
    _check_new(name, _models())
    MODELS[name] = ModelEntry(load, summary)
    register_envs(f"{name}-{reward}" for reward in list_rewards())


def register_reward(
    name: str, build: Callable[[RewardContext], Reward], summary: str = "", *, differentiable: bool = True
) -> None:
    """Adds a reward: `build(context)` returns a `Reward` (or a plain function of (video, prompts)).

    Raises:
        ValueError: the name is taken, or has a "-" or "+" in it.
    """
    _check_new(name, _rewards())
    REWARDS[name] = RewardEntry(build, summary, differentiable)
    register_envs(f"{model}-{name}" for model in list_models())


def _check_new(name: str, taken: Iterable[str]) -> None:
    if not name or set(name) & set("-+*: "):
        raise ValueError(
            f"{name!r} cannot be a name in an environment id: it must be non-empty without '-', '+', '*', ':' and "
            "spaces"
        )
    if name in taken:
        raise ValueError(f"{name!r} is registered already; choose another name")


def _lookup(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    if name in table:
        return table[name]
    lowered = {known.lower(): known for known in table}
    near = [lowered[n] for n in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.4)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"unknown {kind} {name!r}: {hint}known: {', '.join(sorted(table))}")


def _reward_entry(name: str) -> tuple[RewardEntry, str | None]:
    """The entry of a reward's name, and which of its scores the name asks for, as in "VideoScore:temporal"."""
    base, colon, dimension = name.partition(":")
    entry: RewardEntry = _lookup("reward", base, _rewards())
    if colon and dimension not in entry.dimensions:
        known = ", ".join(f"{base}:{d}" for d in entry.dimensions) or "it has one score only; leave the colon out"
        raise ValueError(f"reward {name!r}: {base} gives no score called {dimension!r}: {known}")
    return entry, dimension or None


def parse_id(env_id: str) -> tuple[str, dict[str, float]]:
    """Model name and {reward name: weight} of an id.

    Raises:
        ValueError: not of the form `<Model>-<Reward>[+<weight>*<Reward>...]`, or unknown names.
    """
    text = env_id.removeprefix("vdm_env/").removesuffix("-v0")
    model, dash, rewards = text.partition("-")
    if not dash or not model or not rewards:
        raise ValueError(f"{env_id!r} is no environment id: expected <Model>-<Reward>, for example 'MovingShapes-HPS'")
    _lookup("model", model, _models())
    return model, parse_rewards(rewards, env_id)


def parse_rewards(rewards: str, env_id: str) -> dict[str, float]:
    """{reward name: weight} of `<Reward>[+<weight>*<Reward>...]`; `env_id` is named in errors.

    Raises:
        ValueError: unknown names, a name twice, or a weight that is no number.
    """
    weights: dict[str, float] = {}
    for term in rewards.split("+"):
        factor, star, name = term.partition("*")
        if not star:
            factor, name = "1", term
        _reward_entry(name)
        if name in weights:
            raise ValueError(f"{env_id!r} names reward {name!r} twice")
        try:
            weights[name] = float(factor)
        except ValueError:
            raise ValueError(
                f"{env_id!r}: weight {factor!r} of {name!r} is not a number; write for example 0.5*{name}"
            ) from None
    return weights


RewardWeights = Mapping[str, float | Mapping[str, float]]
"""{reward name: weight}, or {reward name: {"weight": w, "mean": m, "std": s}} for weight * (score - mean) / std"""


def build_reward(weights: RewardWeights, context: RewardContext, published: RewardContext | None = None) -> Reward:
    """One reward, or the weighted sum of several, by name; `published` is the context of published networks, if other.

    An embedded world always has its own small weights; with published networks the caller's choice of weights counts.
    A mean and a deviation beside the weight normalise that part (`rewards.calibrate` measures them, and its sum's
    `config` is such a mapping).

    Raises:
        ValueError: no reward, an unknown name, or numbers that do not fit.
    """
    if not weights:
        raise ValueError("reward={} names no reward; give at least one, for example {'HPS': 1.0}")
    parts = []
    for name, weight in weights.items():
        entry, dimension = _reward_entry(name)
        chosen = published if entry.published and published is not None else context
        numbers = dict(weight) if isinstance(weight, Mapping) else {"weight": weight}
        unknown = sorted(set(numbers) - {"weight", "mean", "std"})
        if unknown:
            raise ValueError(f"reward {name!r}: unknown {unknown}; a part has a weight, a mean and a std")
        reward = as_reward(entry.build(replace(chosen, dimension=dimension)))
        parts.append(Part(reward=reward, **{key: float(value) for key, value in numbers.items()}))
    plain = len(parts) == 1 and (parts[0].weight, parts[0].mean, parts[0].std) == (1.0, 0.0, 1.0)
    return parts[0].reward if plain else WeightedSum(parts)


def make_reward(
    name: str,
    *,
    weights: str = "pretrained",
    scale: str = "full",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_frames: int | None = None,
) -> Reward:
    """The reward of an environment, without the environment: `make_reward("MovingShapes-HPS")`.

    Args:
        name: an id, for the reward that environment would have; or rewards alone, "HPS+0.1*Aesthetic", as published.
        weights, scale, device, dtype, seed: as in `make`.
        num_frames: of the videos that will be scored, where the network has to fit them.

    Raises:
        ValueError: an unknown name, or options that do not fit.
        MissingWeightsError: pretrained weights that are not on this machine.
    """
    check_place(device, dtype)
    model, _, alone = name.partition("-")
    if alone and model in _models():
        world, terms = _models()[model].world, parse_id(name)[1]
    else:  # any model that has no world of its own gives the same rewards
        world, terms = None, parse_rewards(name, name)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "seed": seed, "num_frames": num_frames}
    chosen = RewardContext(weights=weights, scale=scale, **options)  # type: ignore[arg-type]
    own = RewardContext(world=world, **options) if world else chosen  # type: ignore[arg-type]
    return build_reward(terms, own, chosen)


def load_model(
    name: str,
    *,
    weights: str = "pretrained",
    scale: str = "full",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> VideoModel:
    """The video model of an environment, without the environment.

    Args:
        name: of `list_models()`.
        weights, scale, dtype, seed: as in `make`.
        device: as in `make`, or with random weights "meta": shapes without numbers, to count with.

    Raises:
        ValueError: an unknown name.
        MissingWeightsError, CorruptWeightsError: pretrained weights that are not on this machine, or damaged.
    """
    entry = _lookup("model", name, _models())
    return entry.load(weights=weights, scale=scale, device=device, dtype=dtype, seed=seed)


def check_place(device: torch.device | str, dtype: torch.dtype) -> None:
    """Raises ValueError unless networks of that type can be computed with on that device."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r}: expected torch.float32, bfloat16, float16 or float64")
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used here ({reason}); device='cpu' always works") from error
    if kind == "meta":
        raise ValueError(f"device={device!r} holds shapes without numbers, so nothing can be sampled there; take 'cpu'")
