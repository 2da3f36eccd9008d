"""Makes preference data with an environment: N candidates for each prompt, scored by the environment's reward.

Group g is of prompt g of the list, from the beginning again after the last one. A candidate's noise is keyed by
(seed, group, candidate) alone, so the data do not depend on where sampling was interrupted, on which groups were asked
for first, or on the environment's own stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from algos.preference_data import PreferenceData
from algos.preference_files import PreferenceWriter
from vdm_env import noise
from vdm_env.starts import MAX_SEED

Weights = Literal["reference", "policy"]
_KEY = 4
"""of these videos' seeds, apart from those of the env's stream"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """G groups of N candidates: latents [G,N,C,F,H,W], reward [G,N], scores {name: [G,N]}, video_seeds [G,N]; CPU."""

    prompts: list[str]
    latents: Tensor
    reward: Tensor
    scores: dict[str, Tensor]
    video_seeds: Tensor

    def append_to(self, writer: PreferenceWriter) -> None:
        """Writes them as one shard."""
        writer.append(self.prompts, self.latents, self.reward, self.scores, self.video_seeds)


def video_seed(seed: int, group: int, candidate: int) -> int:
    """The seed of one candidate's noise."""
    return min(noise.mix(seed, _KEY, group, candidate), MAX_SEED)


def sampling_settings(
    env: Any, policy: Any, *, candidates: int, seed: int, weights: Weights = "reference", split: str | None = None
) -> dict[str, Any]:
    """Everything that decides what the videos and their scores are: the settings of the data.

    The networks are told apart by hashes of the first numbers of each of their weights.

    Args:
        env: its model, size, sampler, steps, noise level and reward make the videos.
        policy: its guidance scale, and with weights="policy" its trained weights.
        candidates: N.
        seed: of the noise.
        weights: "reference" samples with the untrained model, "policy" with the policy as it is.
        split: of the prompts; the env's own if None.
    """
    mdp = env.mdp
    base = (
        (name.replace(".base_layer", ""), value)
        for name, value in mdp.model.denoiser.named_parameters()
        if ".policy_" not in name
    )
    return {
        "model": mdp.model.spec.name,
        "latent_shape": list(mdp.latent_shape),
        "size": [mdp.num_frames, mdp.height, mdp.width],
        "candidates": candidates,
        "seed": seed,
        "prompts_sha256": env.prompts.sha256(split or env.split),
        "reward": mdp.reward.name,
        "reward_settings": getattr(mdp.reward, "config", None),
        "decode_frames": mdp.decode_frames,
        "sampler": mdp.sampler,
        "num_steps": mdp.num_steps,
        "noise_level": mdp.noise_level,
        "guidance_scale": policy.guidance_scale,
        "network_sha256": _fingerprint(base),
        "adapter_sha256": None
        if weights == "reference"
        else _fingerprint(policy.lora_state_dict().items(), whole=True),
    }


@torch.no_grad()
def sample_groups(
    env: Any,
    policy: Any,
    prompts: Sequence[int],
    groups: Iterable[int],
    *,
    candidates: int,
    seed: int,
    weights: Weights = "reference",
) -> Groups:
    """Samples and scores some groups.

    The episodes run on a twin of the env, which costs the env nothing but what its counters say: neither its episode
    nor its stream of prompts and noise changes. The twin has the env's batch size, whatever N is; where the last batch
    is not full, its last video is sampled again and dropped.

    Args:
        env: vector env.
        policy: of this env.
        prompts: numbers of the prompts that groups are of, in turn.
        groups: numbers g of the groups, at least one.
        candidates: N >= 2.
        seed: of the noise.
        weights: see `sampling_settings`.

    Raises:
        ValueError: fewer than two candidates, no groups or no prompts.
    """
    numbers = list(groups)
    if candidates < 2 or not numbers or not prompts:
        raise ValueError(
            f"candidates={candidates}, {len(numbers)} groups, {len(prompts)} prompts: expected 2 or more candidates, "
            f"and at least one group and one prompt"
        )
    twin = env.derive(group_size=1)
    twin.mdp.counters = env.mdp.counters
    ids = [prompts[g % len(prompts)] for g in numbers for _ in range(candidates)]
    seeds = [video_seed(seed, g, c) for g in numbers for c in range(candidates)]
    latents, reward, scores = [], [], []
    with policy.reference() if weights == "reference" else nullcontext():
        for start in range(0, len(ids), env.num_envs):
            part = slice(start, start + env.num_envs)
            found = _episode(twin, policy, _filled(ids[part], env.num_envs), _filled(seeds[part], env.num_envs))
            used = len(ids[part])
            latents.append(found[0][:used])
            reward.append(found[1][:used])
            scores.append({name: value[:used] for name, value in found[2].items()})
    shape = (len(numbers), candidates)
    names = list(scores[0])
    return Groups(
        prompts=[env.prompts[prompts[g % len(prompts)]] for g in numbers],
        latents=torch.cat(latents).unflatten(0, shape),
        reward=torch.cat(reward).reshape(shape),
        scores={name: torch.cat([row[name] for row in scores]).reshape(shape) for name in names},
        video_seeds=torch.tensor(seeds).reshape(shape),
    )


def build_preferences(
    folder: str | Path,
    env: Any,
    policy: Any,
    *,
    groups: int,
    candidates: int = 4,
    seed: int = 0,
    weights: Weights = "reference",
    split: str | None = None,
    groups_per_shard: int = 64,
) -> PreferenceData:
    """Makes preference data, or what is missing of them: call it again after an interruption, or with more groups.

    Args:
        folder: for the data.
        env: vector env; its reward ranks, and its parts are the sub-scores.
        policy: of this env.
        groups: there shall be when it returns; no more are made where there are as many already.
        candidates: N videos a group; VideoDPO samples 4, OnlineVPO 6.
        seed: of the noise.
        weights: "reference" samples with the untrained model, "policy" with the policy as it is.
        split: of the prompts; the env's own if None.
        groups_per_shard: written at a time, the most an interruption can lose.

    Raises:
        ValueError: the folder holds data made differently; the message names the settings.
        DamagedDataError: the folder holds damaged data.
    """
    if groups < 1 or groups_per_shard < 1:
        raise ValueError(f"groups={groups}, groups_per_shard={groups_per_shard}: expected whole numbers >= 1")
    how: dict[str, Any] = {"candidates": candidates, "seed": seed, "weights": weights}
    writer = PreferenceWriter(folder, sampling_settings(env, policy, split=split, **how))
    ids = env.prompt_ids(split)
    while writer.groups < groups:
        wanted = range(writer.groups, min(groups, writer.groups + groups_per_shard))
        sample_groups(env, policy, ids, wanted, **how).append_to(writer)
    return PreferenceData(folder)


def _episode(env: Any, policy: Any, ids: list[int], seeds: list[int]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Clean latents, rewards and their parts of one batch, on the CPU."""
    obs, _ = env.reset(seed=seeds, options={"prompt_ids": ids})
    reward, info = torch.empty(0), {}
    for _ in range(env.num_steps):
        obs, reward, _, _, info = env.step(policy(obs))
    return obs["latents"].cpu(), reward.cpu(), {name: value.cpu() for name, value in info["reward_parts"].items()}


def _filled(values: list[int], length: int) -> list[int]:
    return values + [values[-1]] * (length - len(values))


def _fingerprint(weights: Iterable[tuple[str, Tensor]], *, whole: bool = False) -> str:
    """A hash of names, shapes, types and values; of the first 1024 values of each unless `whole`."""
    found = hashlib.sha256()
    for name, value in sorted(weights, key=lambda item: item[0]):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        numbers = value.detach().flatten()
        found.update((numbers if whole else numbers[:1024]).float().cpu().numpy().tobytes())
    return found.hexdigest()
