"""The zoo: which algorithms there are, by name, and what each of them wants of its environment. Imports no torch.

algorithm_class, config_class = algos.load("flow_grpo")
env = vdm_env.make("MovingShapes-HPS", num_envs=16, **algos.ZOO["flow_grpo"].env)
algorithm = algorithm_class(env, env.make_policy(), config_class.preset("MovingShapes"))
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any


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
    ),
    "offline_dpo": Entry(
        module="algos.offline_dpo",
        algorithm="OfflineDPO",
        learns_from="preferences",
        summary="preferences that are on disk already",
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
        raise ValueError(f"unknown algorithm {name!r}: {hint}there are {', '.join(sorted(ZOO))}")
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
