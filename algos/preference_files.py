"""The files of preference data: groups of videos of one prompt with all their scores; see `algos.preference_data`.

A folder holds

    index.json             settings (how the videos were made), versions, and for every shard its size and checksum and
                           its groups' prompts as TEXT, rewards, sub-scores, video seeds and what making them has
                           cost; a checksum of itself
    shard-00000.safetensors ...   `latents` [G,N,C,F,H,W]: clean latents of G groups of N candidates, float32

All candidates and all their scores are kept: which of them make a pair, by which score and with what weight, is decided
by whoever reads, and can be decided anew without sampling again. Texts and not numbers stand for prompts, because the
numbers are those of one environment.

Shards are added and never changed. A shard is on the disk and renamed into place before the index that lists it, so a
crash, of the machine too, loses at most the shard being written. Latents are read row by row from the files; what is in
memory is the index.

The cost is kept because videos that somebody has paid for are not free to who learns from them: a comparison by cost
has to add it. It is no part of what the data are: data made again at another cost are the same data.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from algos.checkpoint import sync
from algos.provenance import plain
from algos.run_files import replace_json
from vdm_env import __version__
from vdm_env.checksums import file_sha256

FORMAT = 1
INDEX = "index.json"
REQUIRED = ("model", "latent_shape", "candidates", "reward")
"""settings that all data have: name of the model, [C,F,H,W], N, name of the reward; the others are the maker's"""
_SEED_APART = " (seed is that of the videos: VideoDPOConfig.data_seed sets it apart from the seed of the learning)"
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
COSTS = ("device_s", "videos_sampled", "reward_queries", "denoiser_forwards")
"""what making videos costs: device-seconds of rollout, decoding and reward, and the counts of `vdm_env.mdp.Counters`"""
AGAIN = "restore the folder from a copy, or delete it and build the data again"


class DamagedDataError(ValueError):
    """A file of preference data is missing, truncated or not what was written; the message names it."""


class PreferenceWriter:
    """Creates preference data, or goes on with what is there.

    Args:
        folder: is created if need be.
        settings: how the videos are made, JSON-able, REQUIRED among them.

    Raises:
        ValueError: settings that lack something, or differ from those of the data in the folder; the message names the
            keys.
        DamagedDataError: the data in the folder are damaged.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        settings = _normal(settings)
        missing = [key for key in REQUIRED if key not in settings]
        if missing:
            raise ValueError(f"settings lack {', '.join(missing)}; all preference data say {', '.join(REQUIRED)}")
        if not isinstance(settings["candidates"], int) or settings["candidates"] < 2:
            raise ValueError(f"settings say candidates={settings['candidates']!r}, expected a whole number >= 2")
        self._index: dict[str, Any]
        if (self.folder / INDEX).exists():
            self._index = read_index(self.folder)
            check_same(self.folder, self._index["settings"], settings)
        else:
            versions = {"vdm_env": __version__, "torch": str(torch.__version__)}
            self._index = {"format": FORMAT, "settings": settings, "versions": versions, "shards": []}

    @property
    def groups(self) -> int:
        """Groups written so far."""
        return sum(len(shard["prompts"]) for shard in self._index["shards"])

    def read_again(self) -> None:
        """Takes over what another process of this run has written since."""
        self._index = read_index(self.folder)

    def cost(self, groups: int) -> dict[str, float] | None:
        """What the first groups have cost, see `total_cost`."""
        return total_cost(self._index["shards"], groups)

    def append(
        self,
        prompts: Sequence[str],
        latents: Tensor,
        reward: Tensor,
        scores: Mapping[str, Tensor] | None = None,
        video_seeds: Tensor | None = None,
        cost: Mapping[str, float] | None = None,
    ) -> None:
        """Adds one shard; when this returns the index lists it.

        Args:
            prompts: G texts.
            latents: [G,N,C,F,H,W] clean latents; kept as float32.
            reward: [G,N], what pairs are ranked by unless the reader says otherwise.
            scores: {name: [G,N]} of which the reward is made; the same names in all shards.
            video_seeds: [G,N] int64, of the noise the videos were made from.
            cost: what making and scoring them has cost, COSTS by name; None: not known.

        Raises:
            ValueError: shapes that do not fit, numbers that are not finite, empty prompts, other names of scores, costs
                that are not COSTS or negative.
            RuntimeError: the index was changed by somebody else since this writer read it.
        """
        settings = self._index["settings"]
        groups, n = len(prompts), settings["candidates"]
        scores = dict(scores or {})
        if not groups or any(not isinstance(text, str) or not text.strip() for text in prompts):
            raise ValueError(f"expected one non-empty text for each group, got {list(prompts)[:4]!r}")
        _check("latents", latents, (groups, n, *settings["latent_shape"]))
        for name, value in {"reward": reward, **scores}.items():
            _check(name, value, (groups, n))
        if video_seeds is not None and tuple(video_seeds.shape) != (groups, n):
            raise ValueError(f"video_seeds has shape {tuple(video_seeds.shape)}, expected {(groups, n)}")
        if cost is not None and (set(cost) != set(COSTS) or not all(0 <= v < math.inf for v in cost.values())):
            raise ValueError(f"cost is {dict(cost)}, expected finite numbers >= 0 for {', '.join(COSTS)}, or None")
        shards = self._index["shards"]
        if shards and sorted(shards[0]["scores"]) != sorted(scores):
            raise ValueError(f"scores are {sorted(scores)}, but those of the data are {sorted(shards[0]['scores'])}")
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX).exists() != bool(shards) or (shards and read_index(self.folder) != self._index):
            raise RuntimeError(f"{self.folder / INDEX} was changed by another writer; let one at a time write to it")
        path = self.folder / f"shard-{len(shards):05d}.safetensors"
        part = path.with_name(path.name + ".part")
        save_file({"latents": latents.detach().to("cpu", torch.float32).contiguous()}, str(part))
        shard = {
            "file": path.name,
            "bytes": part.stat().st_size,
            "sha256": file_sha256(part),
            "prompts": list(prompts),
            "reward": _numbers(reward),
            "scores": {name: _numbers(value) for name, value in sorted(scores.items())},
            "video_seeds": None if video_seeds is None else video_seeds.tolist(),
            "cost": None if cost is None else {name: float(cost[name]) for name in COSTS},
        }
        sync(part)
        part.replace(path)
        sync(self.folder)  # the shard's name is on the disk before the index that lists it
        index = {**self._index, "shards": [*shards, shard]}
        replace_json(self.folder / INDEX, {**index, "sha256": digest(index)})
        self._index = index


def total_cost(shards: Sequence[Mapping[str, Any]], groups: int) -> dict[str, float] | None:
    """What the first groups have cost, COSTS by name; a shard that is used in part counts by the share of its groups.

    None where one of them does not say: videos from elsewhere, or an index written before costs were kept.
    """
    total, left = dict.fromkeys(COSTS, 0.0), groups
    for shard in shards:
        used = min(left, len(shard["prompts"]))
        if used <= 0:
            break
        cost = shard.get("cost")
        if cost is None:
            return None
        total = {name: value + cost[name] * used / len(shard["prompts"]) for name, value in total.items()}
        left -= used
    return total


def check_same(folder: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the keys, unless two settings agree."""
    asked = _normal(asked)
    keys = [key for key in sorted({*stored, *asked}) if stored.get(key) != asked.get(key)]
    if keys:
        rows = "; ".join(f"{key}: {stored.get(key)!r} there, {asked.get(key)!r} asked for" for key in keys)
        raise ValueError(
            f"{folder} holds preference data made differently in {', '.join(keys)} ({rows}); take another folder, or "
            f"the settings the data were made with{_SEED_APART if 'seed' in keys else ''}"
        )


def _normal(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return json.loads(json.dumps(plain(settings)))


def read_index(folder: Path) -> dict[str, Any]:
    """The index without its checksum, once that was found right."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(
                f"{path} is of format {index['format']!r}, but this version reads format {FORMAT}; read it with the "
                f"version that wrote it"
            )
        stored = index.pop("sha256")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DamagedDataError(f"{path} is damaged or truncated ({error!r}); {AGAIN}") from error
    if stored != digest(index):
        raise DamagedDataError(f"{path} is not what was written (other checksum); {AGAIN}")
    wrong = [shard["file"] for shard in index["shards"] if not _SHARD.fullmatch(shard["file"])]
    if wrong:
        raise DamagedDataError(f"{path} lists {wrong[0]!r}, which is no shard's name; {AGAIN}")
    return index


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able value, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != shape:
        given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {given}, expected a floating-point tensor {shape}")
    if not bool(torch.isfinite(value.detach()).all()):
        raise ValueError(f"{name} has NaN or infinity; leave such videos out")


def _numbers(value: Tensor) -> list[list[float]]:
    return value.detach().double().tolist()
