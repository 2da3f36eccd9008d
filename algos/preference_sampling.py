"""Makes preference data with an environment: N candidates for each prompt, scored by the environment's reward.

Group g is of prompt g of the list, from the beginning again after the last one. A candidate's noise is keyed by
(seed, group, candidate) alone, so the data do not depend on where sampling was interrupted, on which groups were asked
for first, or on the environment's own stream.

What sampling and scoring cost is written with the data (`preference_files.COSTS`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from algos import distributed
from algos.preference_data import PreferenceData
from algos.preference_files import COSTS, PreferenceWriter
from vdm_env import noise
from vdm_env.rewards.remote import serving_devices
from vdm_env.starts import MAX_SEED

Weights = Literal["reference", "policy"]
_KEY = 4
"""of these videos' seeds, apart from those of the env's stream"""
_PHASES = ("rollout_s", "decode_s", "reward_s")
_TOLERANCE = 0.01
"""of a score that is asked for again, relative to the group's largest: other machines and half precision round"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """G groups of N candidates: latents [G,N,C,F,H,W], reward [G,N], scores {name: [G,N]}, video_seeds [G,N]; CPU.

    cost is what making and scoring all of them has cost, see `preference_files.COSTS`.
    """

    prompts: list[str]
    latents: Tensor
    reward: Tensor
    scores: dict[str, Tensor]
    video_seeds: Tensor
    cost: dict[str, float]

    def append_to(self, writer: PreferenceWriter) -> None:
        """Writes them as one shard; of several processes, which all have them and see one folder, the first writes."""
        ranks = distributed.current()
        if ranks.main:
            writer.append(self.prompts, self.latents, self.reward, self.scores, self.video_seeds, self.cost)
        ranks.wait()
        if not ranks.main:
            writer.read_again()

    def after(self, number: int) -> Groups:
        """Those after the first so many, with their share of the cost."""
        share = len(self.prompts[number:]) / len(self.prompts)
        return Groups(
            prompts=self.prompts[number:],
            latents=self.latents[number:],
            reward=self.reward[number:],
            scores={name: value[number:] for name, value in self.scores.items()},
            video_seeds=self.video_seeds[number:],
            cost={name: value * share for name, value in self.cost.items()},
        )


def video_seed(seed: int, group: int, candidate: int) -> int:
    """The seed of one candidate's noise."""
    return min(noise.mix(seed, _KEY, group, candidate), MAX_SEED)


def sampling_settings(
    env: Any, policy: Any, *, candidates: int, seed: int, weights: Weights = "reference", split: str | None = None
) -> dict[str, Any]:
    """What decides what the videos and their scores are, as far as it has a name: the settings of the data.

    Denoisers are told apart by hashes of the first numbers of each of their weights, adapters and references by hashes
    of all. Decoders and rewards are known by their names and settings alone: `check_scores` asks them again.

    Args:
        env: its model, size, sampler, steps, noise level and reward make the videos.
        policy: its guidance scale and interval, and with weights="policy" its trained weights.
        candidates: N.
        seed: of the noise.
        weights: "reference" samples with the policy's reference (the untrained model unless it was refreshed), "policy"
            with the policy as it is.
        split: of the prompts; the env's own if None.
    """
    mdp = env.mdp
    trained = policy.reference_state_dict() if weights == "reference" else policy.lora_state_dict()
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
        # As texts: an upper limit may be infinite, which JSON does not have. Absent where there is none, so that data
        # from before there were intervals are still known.
        **(
            {}
            if policy.guidance_interval is None
            else {"guidance_interval": [str(level) for level in policy.guidance_interval]}
        ),
        "network_sha256": _fingerprint(base),
        "adapter_sha256": _fingerprint(trained.items(), whole=True) if trained else None,
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
    is not full, its last video is sampled again and dropped. Several processes share the work; all return everything.

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
    before, cpu_before = replace(env.mdp.counters), time.process_time()
    ids = [prompts[g % len(prompts)] for g in numbers for _ in range(candidates)]
    seeds = [video_seed(seed, g, c) for g in numbers for c in range(candidates)]
    latents, reward, scores = [], [], []
    ranks = distributed.current()
    width = env.num_envs * ranks.world
    with policy.reference() if weights == "reference" else nullcontext():
        for start in range(0, len(ids), width):
            part, mine = slice(start, start + width), ranks.rows(width)
            found = _episode(twin, policy, _filled(ids[part], width)[mine], _filled(seeds[part], width)[mine])
            used = len(ids[part])
            latents.append(ranks.gather(found[0])[:used])
            reward.append(ranks.gather(found[1])[:used])
            scores.append({name: ranks.gather(value)[:used] for name, value in found[2].items()})
    shape = (len(numbers), candidates)
    names = list(scores[0])
    return Groups(
        prompts=[env.prompts[prompts[g % len(prompts)]] for g in numbers],
        latents=torch.cat(latents).unflatten(0, shape),
        reward=torch.cat(reward).reshape(shape),
        scores={name: torch.cat([row[name] for row in scores]).reshape(shape) for name in names},
        video_seeds=torch.tensor(seeds).reshape(shape),
        cost=ranks.totals(
            _spent(
                before,
                env.mdp.counters,
                time.process_time() - cpu_before,
                env.mdp.device,
                devices=1 + serving_devices(env.mdp.reward) / ranks.world,
            )
        ),
    )


@torch.no_grad()
def check_scores(env: Any, data: PreferenceData, prompts: Sequence[int], *, seed: int) -> None:
    """Finds out whether an env would score data as they are scored, by scoring their first group again.

    A name does not tell what a reward is: a function of one's own has any, and weights and decoders have none. The
    videos are decoded from the stored latents; nothing of this is counted as a cost.

    Args:
        env: whose reward and decoder are asked.
        data: made with settings equal to the env's, see `sampling_settings`.
        prompts: as `sample_groups` was given them.
        seed: of the noise the data were made from.

    Raises:
        ValueError: the reward, or one of its parts, is off by more than 1 % of the group's largest score.
    """
    twin = env.derive(group_size=1)  # its counters are its own
    mdp, n = twin.mdp, data.reward.shape[1]
    latents = data.latents(torch.zeros(n, dtype=torch.int64), torch.arange(n)).to(mdp.device, mdp.dtype)
    seeds = torch.tensor([video_seed(seed, 0, c) for c in range(n)])
    found = mdp.outcome(latents, torch.tensor([prompts[0]] * n), seeds)
    scores = {"the reward": (found.reward, data.reward[0])}
    scores |= {name: (value, data.scores[name][0]) for name, value in found.parts.items() if name in data.scores}
    for name, (now, stored) in scores.items():
        off = float((now.double().cpu() - stored).abs().max())
        if not off <= _TOLERANCE * float(stored.abs().max()) + 1e-6:
            raise ValueError(
                f"{name} gives {[round(float(v), 4) for v in now]} for the first group of {data.folder}, but "
                f"{[round(float(v), 4) for v in stored]} are stored: another reward or decoder of the same name and "
                f"settings made them; take another folder, or the reward and weights they were made with"
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
        weights: "reference" samples with the policy's reference, "policy" with the policy as it is.
        split: of the prompts; the env's own if None.
        groups_per_shard: written at a time, the most an interruption can lose.

    Raises:
        ValueError: the folder holds data made differently; the message names the settings. Or data whose videos the
            env's reward scores otherwise, see `check_scores`.
        DamagedDataError: the folder holds damaged data.
    """
    if groups < 1 or groups_per_shard < 1:
        raise ValueError(f"groups={groups}, groups_per_shard={groups_per_shard}: expected whole numbers >= 1")
    how: dict[str, Any] = {"candidates": candidates, "seed": seed, "weights": weights}
    writer = PreferenceWriter(folder, sampling_settings(env, policy, split=split, **how))
    ids = env.prompt_ids(split)
    if writer.groups:  # what is there must be what would be made
        check_scores(env, PreferenceData(folder), ids, seed=seed)
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


def _spent(before: Any, now: Any, cpu_s: float, device: torch.device, devices: float = 1.0) -> dict[str, float]:
    """Between two states of an MDP's counters, COSTS by name; device-seconds are those of `algos.meter`.

    `devices`: held by this process, its share of those that only serve rewards included, as far as rewards say.
    """
    spent = {name: float(getattr(now, name) - getattr(before, name)) for name in (*COSTS[1:], *_PHASES)}
    device_s = cpu_s if device.type == "cpu" else devices * sum(spent[name] for name in _PHASES)
    return {"device_s": device_s, **{name: spent[name] for name in COSTS[1:]}}


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
