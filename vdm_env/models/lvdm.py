"""Reads VideoCrafter2's `model.ckpt` and turns it, once, into diffusers and transformers folders of safetensors.

The checkpoint is a pickle of one dictionary of tensors: the UNet under `model.diffusion_model.`, the autoencoder
under `first_stage_model.`, the OpenCLIP text tower under `cond_stage_model.model.`, and buffers of the noise
schedule. It is unpickled with `weights_only=True`, so that nothing in it can run, and compared with the architecture
name by name: a missing, an extra or a misshapen tensor is an error that lists them. What is left out is left out by
name (`Conversion.unused`): the text tower's last layer and projection, and buffers that are computed from the
configuration.

Verified: the key tables against state dicts of the original classes, small and full size, and the networks against
their outputs. Not verified: the released file itself, which was not available; its layout is read off the classes
that its authors load it into strictly.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from huggingface_hub.utils import WeakFileLock
from safetensors.torch import save_file
from torch import Tensor

from vdm_env.checksums import file_sha256, write_manifest
from vdm_env.errors import CorruptWeightsError
from vdm_env.grids import latent_scale_lvdm, scaled_linear_alphas_cumprod
from vdm_env.models.checkpoint_files import read_checkpoint
from vdm_env.models.lvdm_keys import Entry, text_entries, unet_entries, vae_entries
from vdm_env.models.lvdm_sizes import AutoencoderSizes, TextSizes, UNetSizes

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.model."
CONVERTED = "converted"
"""Sub-folder of a model's folder in which the converted weights lie."""
MARKER = "vdm_env.json"
"""File that says a folder was written by `save_folders`, and of which model it is."""
NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012
_SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
)
_OPTIONAL = {name: ((NUM_TRAIN_TIMESTEPS,),) for name in _SCHEDULE} | {
    # The original appends 0.7 for 1000 steps, not for the remaining 600; entries from 1000 on are never read.
    "scale_arr": ((NUM_TRAIN_TIMESTEPS,), (NUM_TRAIN_TIMESTEPS + 400,)),
    TEXT_PREFIX + "attn_mask": None,
}
"""Buffers that may be there and are not needed, with the shapes they may have (None: any)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of the three networks of a checkpoint; the defaults are the release's."""

    unet: UNetSizes = field(default_factory=UNetSizes)
    vae: AutoencoderSizes = field(default_factory=AutoencoderSizes)
    text: TextSizes = field(default_factory=TextSizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """A checkpoint under diffusers' and transformers' names."""

    unet: dict[str, Tensor]
    """of `UNet3DConditionModel`"""
    conditioning: dict[str, Tensor]
    """of `FpsTimeEmbedding` or `GuidedTimeEmbedding`, less the UNet's own time embedding"""
    vae: dict[str, Tensor]
    text_encoder: dict[str, Tensor]
    unused: tuple[str, ...]
    """checkpoint names that were left out, all of them known"""


def check_tensors(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], what: str) -> None:
    """Every name and every shape must fit.

    Raises:
        CorruptWeightsError: with the lists of missing, unexpected and misshapen tensors.
    """
    wrong = {
        "missing": sorted(set(expected) - set(given)),
        "unexpected": sorted(set(given) - set(expected)),
        "misshapen": [
            f"{name} is {tuple(given[name].shape)}, expected {shape}"
            for name, shape in expected.items()
            if name in given and tuple(given[name].shape) != shape
        ],
        "not of a floating type": [n for n in expected if n in given and not given[n].is_floating_point()],
    }
    if any(wrong.values()):
        listed = "; ".join(f"{len(names)} {kind}: {_shortened(names)}" for kind, names in wrong.items() if names)
        raise CorruptWeightsError(
            f"{what} does not fit the architecture. {listed}. It is of another model, or incomplete"
        )


def _shortened(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def convert_part(entries: Iterable[Entry], given: Mapping[str, Tensor], what: str) -> dict[str, dict[str, Tensor]]:
    """Tensors of one network under their new names, {part: {name: tensor}}; tensors without a use are in part "".

    Raises:
        CorruptWeightsError: see `check_tensors`.
    """
    entries = list(entries)
    check_tensors({entry.source: entry.shape for entry in entries}, given, what)
    parts: dict[str, dict[str, Tensor]] = {}
    for entry in entries:
        tensor, part = given[entry.source], parts.setdefault(entry.part, {})
        if not entry.names:
            part[entry.source] = tensor
            continue
        tensor = tensor.reshape(tensor.shape[: tensor.ndim - entry.squeeze])
        part |= dict(zip(entry.names, tensor.chunk(len(entry.names)), strict=True))
    return parts


def convert(state: Mapping[str, Tensor], sizes: Sizes | None = None, what: str = "the checkpoint") -> Conversion:
    """Renames all tensors of a VideoCrafter2 checkpoint.

    Args:
        state: as `read_checkpoint` returns it.
        sizes: of the networks; the release's if None.
        what: how messages call it.

    Raises:
        CorruptWeightsError: missing, extra or misshapen tensors, which it lists, or another noise schedule.
    """
    sizes = sizes or Sizes()
    tables = (
        (UNET_PREFIX, unet_entries(sizes.unet)),
        (VAE_PREFIX, vae_entries(sizes.vae)),
        (TEXT_PREFIX, text_entries(sizes.text)),
    )
    entries = [entry._replace(source=prefix + entry.source) for prefix, table in tables for entry in table]
    buffers = {name: tensor for name, tensor in state.items() if _is_known_buffer(name, tensor)}
    _check_schedule(buffers, what)
    parts = convert_part(entries, {name: tensor for name, tensor in state.items() if name not in buffers}, what)
    unused = (*parts.pop("", {}), *buffers)
    return Conversion(**parts, unused=unused)


def convert_unet(state: Mapping[str, Tensor], sizes: UNetSizes, what: str = "the UNet") -> dict[str, dict[str, Tensor]]:
    """A UNet's own state dict (no prefix) as {"unet": ..., "conditioning": ...}; strict like `convert`."""
    return convert_part(unet_entries(sizes), state, what)


def convert_vae(
    state: Mapping[str, Tensor], sizes: AutoencoderSizes, what: str = "the autoencoder"
) -> dict[str, Tensor]:
    """An autoencoder's own state dict (no prefix) under `AutoencoderKL`'s names; strict like `convert`."""
    return convert_part(vae_entries(sizes), state, what)["vae"]


def convert_text(state: Mapping[str, Tensor], sizes: TextSizes, what: str = "the text encoder") -> dict[str, Tensor]:
    """An OpenCLIP text tower's own state dict (no prefix) under `CLIPTextModel`'s names; strict like `convert`."""
    return convert_part(text_entries(sizes), state, what)["text_encoder"]


def _is_known_buffer(name: str, tensor: Tensor) -> bool:
    if name not in _OPTIONAL:
        return False
    shapes = _OPTIONAL[name]
    return shapes is None or tuple(tensor.shape) in shapes


def _check_schedule(buffers: Mapping[str, Tensor], what: str) -> None:
    """A checkpoint of another noise schedule has the same names and would sample noise: compare the numbers."""
    alphas = scaled_linear_alphas_cumprod(NUM_TRAIN_TIMESTEPS, BETA_START, BETA_END)
    for name, ours in (("alphas_cumprod", alphas), ("scale_arr", latent_scale_lvdm())):
        if name in buffers:
            stored = buffers[name].double()[:NUM_TRAIN_TIMESTEPS]
            if not torch.allclose(stored, ours.double(), atol=2e-3 if buffers[name].dtype != torch.float32 else 1e-5):
                raise CorruptWeightsError(
                    f"{what}: its buffer {name!r} differs from VideoCrafter2's by up to "
                    f"{(stored - ours).abs().max():.3g}; it is of a model with another noise schedule, or damaged"
                )


# ---------------------------------------------------------------------------------------------------- folders


def save_folders(
    conversion: Conversion,
    folder: str | Path,
    sizes: Sizes | None = None,
    model: str = "VideoCrafter2",
    source: Path | None = None,
) -> Path:
    """Writes unet/, conditioning/, vae/ and text_encoder/ as safetensors; the folder appears complete or not at all.

    unet/, vae/ and text_encoder/ are ordinary diffusers and transformers folders. Checksums of all files lie beside
    them (see `vdm_env.checksums`), and what `source`, the checkpoint they were made from, looked like.

    Raises:
        FileExistsError: there is something at `folder` already.
    """
    sizes, folder = sizes or Sizes(), Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it, or choose another folder for the converted weights")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with torch.device("meta"):
            networks = (
                ("unet", UNet3DConditionModel(**sizes.unet.diffusers())),
                ("vae", AutoencoderKL(**sizes.vae.diffusers())),
            )
        for name, network in networks:
            network.save_config(building / name)
            _save(getattr(conversion, name), building / name / "diffusion_pytorch_model.safetensors")
        sizes.text.transformers().save_pretrained(building / "text_encoder")
        _save(conversion.text_encoder, building / "text_encoder" / "model.safetensors")
        _save(conversion.conditioning, building / "conditioning" / "model.safetensors")
        made_from = {} if source is None else {"source": _looks(source) | {"sha256": file_sha256(source)}}
        (building / MARKER).write_text(json.dumps({"model": model, "format": 1} | made_from) + "\n")
        write_manifest(building, [file for file in sorted(building.rglob("*")) if file.is_file()])
        building.chmod(0o755)  # a temporary folder is private
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return folder


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    # Pieces of one tensor share memory, which the format refuses.
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _looks(checkpoint: Path) -> dict[str, Any]:
    """What tells a file from another at a glance."""
    state = checkpoint.stat()
    return {"bytes": state.st_size, "modified_ns": state.st_mtime_ns}


def check_source(folder: Path, checkpoint: Path) -> None:
    """Whether converted weights were made from this checkpoint; by its content only if it does not look the same.

    Raises:
        CorruptWeightsError: they are those of another one.
    """
    source = json.loads((folder / MARKER).read_text()).get("source")
    if not isinstance(source, dict) or _looks(checkpoint).items() <= source.items():
        return
    if source.get("bytes") != checkpoint.stat().st_size or source.get("sha256") != file_sha256(checkpoint):
        raise CorruptWeightsError(
            f"{folder} holds the converted weights of another checkpoint than {checkpoint}; remove that folder, and "
            "the checkpoint is converted anew, or take the checkpoint away"
        )


def is_converted(folder: Path, model: str = "VideoCrafter2") -> bool:
    """Whether `save_folders` wrote this folder for that model."""
    try:
        return json.loads((folder / MARKER).read_text()).get("model") == model
    except (OSError, ValueError, AttributeError):
        return False


def convert_file(checkpoint: str | Path, folder: str | Path, sizes: Sizes | None = None) -> Path:
    """Reads a checkpoint and writes the folders, once; returns the folder.

    Several processes may ask for it at the same time: one converts, the others wait and take what it wrote. What an
    interrupted conversion left behind is removed.

    Raises:
        FileNotFoundError, FileExistsError, CorruptWeightsError: see `read_checkpoint`, `save_folders` and `convert`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.parent / f".{folder.name}.lock"):
        if is_converted(folder):
            return folder
        for left in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        conversion = convert(read_checkpoint(checkpoint), sizes, str(checkpoint))
        return save_folders(conversion, folder, sizes, source=Path(checkpoint))
