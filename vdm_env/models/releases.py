"""Published diffusers folders: how to know one, where it lies on this machine, and loading all its networks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from vdm_env.models import local_weights
from vdm_env.models.base import ModelSpec, frozen, tiny_spec
from vdm_env.models.loading import load_folder
from vdm_env.models.local_weights import Published
from vdm_env.models.opensora_weights import Tokenize, byte_tokenizer, hub_tokenizer, read_json
from vdm_env.models.untrained import seeded
from vdm_env.models.visiting import resting_place

UNCONFIRMED = "not confirmed here, see the repository's page before anything but research"


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A published diffusers folder and how to know it."""

    published: Published
    parts: tuple[str, ...] = ("transformer", "vae", "text_encoder")
    """sub-folders with a config.json, the denoiser's first"""
    marks: Mapping[str, Any] = field(default_factory=dict)
    """entries of the denoiser's config.json that tell it from its relatives"""
    without: tuple[str, ...] = ()
    """sub-folders that only a relative has"""


def release(model: str, repository: str, size: str, licence: str, parts: tuple[str, ...], **marks: Any) -> Release:
    """A `Release` of these parts; `marks` are entries of the first one's config.json."""
    files = (*(f"{part}/*" for part in parts), "tokenizer*/*", "model_index.json")
    published = Published(
        model=model, repository=repository, files=files, size=size, licence=f"{licence} ({UNCONFIRMED})"
    )
    return Release(published=published, parts=parts, marks=marks)


def find_release(wanted: Release) -> Path:
    """The folder of a release on this machine.

    Raises:
        MissingWeightsError: it is nowhere, or not complete; the message says how to get it.
        CorruptWeightsError: a config.json that cannot be read.
    """

    def fits(place: Path) -> bool:
        if not all((place / part / "config.json").is_file() for part in wanted.parts):
            return False
        if any((place / part).exists() for part in wanted.without):
            return False
        config = read_json(place / wanted.parts[0] / "config.json")
        return all(config.get(name) == value for name, value in wanted.marks.items())

    folder = local_weights.find_folder(wanted.published, fits)
    if folder is not None:
        return folder
    cached = local_weights.find_cached(wanted.published, f"{wanted.parts[0]}/config.json")
    if cached is not None and fits(cached.parents[1]):
        return cached.parents[1]
    raise local_weights.missing(wanted.published)


def placed(network: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Moves and casts a network as `from_pretrained` does: in half precision some layers of diffusers stay float32."""
    network.to(device)
    kept: set[str] = set()
    if isinstance(network, ModelMixin) and dtype in (torch.float16, torch.bfloat16):
        kept = set(network._keep_in_fp32_modules or ())
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return network


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What `load_parts` found or made."""

    spec: ModelSpec
    networks: dict[str, Any]
    """by sub-folder; frozen and in place, text encoders in main memory"""
    folder: Path | None
    """of the release; None for random weights"""

    def tokenizer(self, length: int, part: str = "tokenizer") -> Tokenize:
        """The release's, padding to `length`; bytes for tokens where there is no release."""
        if self.folder is None:
            return byte_tokenizer(length)
        return hub_tokenizer(self.folder / part, length)


def load_parts(
    spec: ModelSpec,
    wanted: Release,
    classes: Mapping[str, Any],
    untrained: Mapping[str, Callable[[], nn.Module]],
    *,
    weights: str,
    tiny: tuple[int, int, int] | None,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
) -> Loaded:
    """All networks of a release, or untrained ones.

    Args:
        spec: of the model.
        wanted: where it is published.
        classes: by sub-folder, what to load from there.
        untrained: by sub-folder, what makes an untrained one.
        weights: "pretrained" or "random".
        tiny: (num_frames, height, width) of a shrunken model's videos; None for the full size.
        device: of all networks but text encoders.
        dtype: of all networks; diffusers keeps single layers of a release in float32.
        seed: of random weights.

    Raises:
        MissingWeightsError: the release is not on this machine.
        CorruptWeightsError: it is, but damaged or of another architecture.
    """

    def home(part: str) -> torch.device | str:
        return resting_place(device) if part.startswith("text_encoder") else device

    if weights == "pretrained":
        folder = find_release(wanted)
        networks = {n: load_folder(cls, folder / n, device=home(n), dtype=dtype) for n, cls in classes.items()}
        return Loaded(spec=spec, networks=networks, folder=folder)
    warnings.warn(f"{spec.name} has random weights: use it for tests, speed and memory, not for results", stacklevel=5)
    if tiny is not None:
        spec = tiny_spec(spec, *tiny)
    with seeded(seed, device, dtype):
        networks = {name: frozen(placed(make(), home(name), dtype)) for name, make in untrained.items()}
    return Loaded(spec=spec, networks=networks, folder=None)
