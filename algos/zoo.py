"""The zoo: which algorithms there are, by name, and what each of them wants of its environment. Imports no torch.

algorithm_class, config_class = algos.load("flow_grpo")
env = vdm_env.make("MovingShapes-HPS", num_envs=16, **algos.ZOO["flow_grpo"].env)
algorithm = algorithm_class(env, env.make_policy(), config_class.preset("MovingShapes"))

A class of one's own stands wherever a name of the zoo does, as "package.module:Class"; see `recipe`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One algorithm of the zoo."""

    module: str
    """that defines the class and its config"""
    algorithm: str
    """name of the class; the config's is this and "Config" """
    learns_from: str
    """"reward gradient", "policy gradient", "preferences", or "weighted samples" """
    env: Mapping[str, Any] = field(default_factory=dict)
    """options of `vdm_env.make` beyond the model's defaults that suit it; where it compares videos, their group_size"""
    summary: str
    """one line for `--help` and tables"""
    data: Literal["", "builds", "reads"] = ""
    """whether it has preference data in the `folder` of its config, which it builds there or finds"""


_GROUP: dict[str, Any] = {"group_size": 8}
_ONE_FRAME: dict[str, Any] = {"decode_frames": "random1"}  # the frame subsampling of the VADER paper

ZOO: dict[str, Entry] = {
    "vader": Entry(
        module="algos.vader",
        algorithm="VADER",
        learns_from="reward gradient",
        env=_ONE_FRAME,
        summary="reward back-propagation through the last denoising steps",
    ),
    "draft_lv": Entry(
        module="algos.draft_lv",
        algorithm="DRaFTLV",
        learns_from="reward gradient",
        env=_ONE_FRAME,
        summary="the last step's reward gradient, averaged over noises",
    ),
    "refl": Entry(
        module="algos.refl",
        algorithm="ReFL",
        learns_from="reward gradient",
        env=_ONE_FRAME,
        summary="reward gradients through the clean estimate of a late step",
    ),
    "instructvideo": Entry(
        module="algos.instructvideo",
        algorithm="InstructVideo",
        learns_from="reward gradient",
        env={"noise_level": 0.0},
        summary="partial denoising of given videos, reward on a few attenuated frames",
    ),
    "ddpo": Entry(
        module="algos.ddpo",
        algorithm="DDPO",
        learns_from="policy gradient",
        env=_GROUP,
        summary="PPO over denoising steps",
    ),
    "flow_grpo": Entry(
        module="algos.flow_grpo",
        algorithm="FlowGRPO",
        learns_from="policy gradient",
        env=_GROUP,
        summary="group-relative policy gradient, with or without a window of noisy steps",
    ),
    "diffusion_dpo": Entry(
        module="algos.diffusion_dpo",
        algorithm="DiffusionDPO",
        learns_from="preferences",
        env=_GROUP,
        summary="preferences among the policy's own videos, with a replay buffer",
    ),
    "online_vpo": Entry(
        module="algos.online_vpo",
        algorithm="OnlineVPO",
        learns_from="preferences",
        env=_GROUP,
        summary="best against worst candidate, with a reference that is refreshed",
    ),
    "videodpo": Entry(
        module="algos.videodpo",
        algorithm="VideoDPO",
        learns_from="preferences",
        summary="weighted pairs of the untrained model's videos, built once and kept on disk",
        data="builds",
    ),
    "offline_dpo": Entry(
        module="algos.offline_dpo",
        algorithm="OfflineDPO",
        learns_from="preferences",
        summary="preferences that are on disk already",
        data="reads",
    ),
    "d3po": Entry(
        module="algos.d3po",
        algorithm="D3PO",
        learns_from="preferences",
        env=_GROUP,
        summary="preferences at every denoising step, by log-probabilities",
    ),
    "diffusion_kto": Entry(
        module="algos.diffusion_kto",
        algorithm="DiffusionKTO",
        learns_from="preferences",
        env=_GROUP,
        summary="single videos labelled good or bad",
    ),
    "diffusion_nft": Entry(
        module="algos.diffusion_nft",
        algorithm="DiffusionNFT",
        learns_from="weighted samples",
        env=_GROUP,
        summary="contrast of good and bad videos on the forward process",
    ),
    "rwr": Entry(
        module="algos.rwr",
        algorithm="RWR",
        learns_from="weighted samples",
        env=_GROUP,
        summary="reward-weighted regression, and fine-tuning on the best of each group",
    ),
    "ppo_torchrl": Entry(
        module="algos.ppo_torchrl",
        algorithm="TorchRLPPO",
        learns_from="policy gradient",
        env=_GROUP,
        summary="TorchRL's ClipPPOLoss on the same environment",
    ),
    "ppo_sb3": Entry(
        module="algos.ppo_sb3",
        algorithm="SB3PPO",
        learns_from="policy gradient",
        env=_GROUP,
        summary="Stable-Baselines3's PPO on the same environment",
    ),
}


def entry(name: str) -> Entry:
    """The entry of a name.

    Raises:
        ValueError: no such algorithm.
    """
    if name not in ZOO:
        near = get_close_matches(name, ZOO, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown algorithm {name!r}: {hint}there are {', '.join(sorted(ZOO))}, "
            "and package.module:Class for a class of one's own"
        )
    return ZOO[name]


def load(name: str) -> tuple[type[Any], type[Any]]:
    """Class and config class of an algorithm.

    Args:
        name: of the zoo, such as "vader".

    Raises:
        ValueError: no such algorithm.
    """
    found = entry(name)
    module = importlib.import_module(found.module)
    return getattr(module, found.algorithm), getattr(module, f"{found.algorithm}Config")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an algorithm is built, from the zoo or of one's own."""

    name: str
    """of the zoo, or package.module:Class"""
    label: str
    """short name, for folders and figures"""
    algorithm: type[Any]
    """the class"""
    config: type[Any] | None
    """dataclass of its settings; None: they are keyword arguments of the class"""
    env: Mapping[str, Any] = field(default_factory=dict)
    """options of `vdm_env.make` that suit it"""
    data: Literal["", "builds", "reads"] = ""
    """see `Entry`"""


def recipe(name: str) -> Recipe:
    """What builds the algorithm of a name.

    A class of one's own needs `update() -> dict`, `state_dict()` and `load_state_dict(state)`, nothing else. It is
    built as `Class(env, policy, config)` if it has an attribute `config_class` (or `Config`) that is a dataclass, whose
    `preset(model)` is used where there is one; otherwise as `Class(env, policy, **settings)`. A field or argument
    `seed` gets the training seed. An attribute `env_options` may hold options of `vdm_env.make`, such as
    {"group_size": 8}. Its module may lie in the current directory.

    Args:
        name: of the zoo, or package.module:Class.

    Raises:
        ValueError: no such algorithm, module or class, or a class that is no algorithm.
    """
    if ":" not in name:
        known = entry(name)
        algorithm, settings = load(name)
        return Recipe(name=name, label=name, algorithm=algorithm, config=settings, env=known.env, data=known.data)
    place, _, attribute = name.partition(":")
    found = getattr(_module(place, name), attribute, None)
    if not inspect.isclass(found):
        raise ValueError(f"--algo {name}: the module {place} has no class {attribute!r}")
    missing = [part for part in _NEEDED if not callable(getattr(found, part, None))]
    if missing:
        raise ValueError(
            f"--algo {name}: the class has no {' and no '.join(f'{part}()' for part in missing)}; an algorithm has "
            f"{', '.join(f'{part}()' for part in _NEEDED)}"
        )
    config = getattr(found, "config_class", getattr(found, "Config", None))
    if config is not None and not (inspect.isclass(config) and is_dataclass(config)):
        raise ValueError(f"--algo {name}: its config_class is {config!r}, expected a dataclass")
    options = getattr(found, "env_options", {})
    if not isinstance(options, Mapping):
        raise ValueError(f"--algo {name}: its env_options is {options!r}, expected options of vdm_env.make by name")
    return Recipe(name=name, label=attribute, algorithm=found, config=config, env=options)


_NEEDED = ("update", "state_dict", "load_state_dict")


def _module(place: str, name: str) -> Any:
    """A module of the current directory or of an installed package.

    Raises:
        ValueError: there is none, or it cannot be imported.
    """
    if not all(part.isidentifier() for part in place.split(".")):
        raise ValueError(f"--algo {name}: expected package.module:Class, such as my_package.my_module:MyAlgorithm")
    if os.getcwd() not in sys.path and "" not in sys.path:  # a console script does not look there by itself
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise ValueError(f"--algo {name}: {place} cannot be imported: {error}") from error
        raise ValueError(
            f"--algo {name}: no module {error.name!r} in the current directory or among the installed packages"
        ) from error
    except Exception as error:  # whatever a module of somebody else does when it is imported
        raise ValueError(f"--algo {name}: {place} cannot be imported: {type(error).__name__}: {error}") from error
