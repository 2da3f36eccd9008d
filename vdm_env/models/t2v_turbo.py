"""T2V-Turbo (arXiv 2405.18750) and v2 (arXiv 2410.05677): VideoCrafter2 distilled into a few consistency steps.

The network is VideoCrafter2's with an embedding of the guidance scale w (and, in v2, of a motion guidance scale)
added to the timestep's sinusoid, so guidance is an input and every step is one forward pass: the policy's own
`guidance_scale` stays 1. Sampling is the multistep consistency sampler ("lcm", `vdm_env.samplers.lcm_table`) on the
release's own grid (`vdm_env.grids.lcm_timesteps`), without VideoCrafter2's latent scale.

Release files: v1 is a LoRA of the UNet (`unet_lora.pt`), v2 a whole UNet (`unet_mg.pt`, or `unet_no_mg.pt` without
motion guidance). Text encoder and autoencoder are VideoCrafter2's.

Verified against outputs of the original classes: the network with w, with w and motion, and without either; the
sampler; names, shapes and order of the layers. Not verified, because the released files were not available:

- the LoRA list is read as its writer in github.com/Ji4chenLi/t2v-turbo (commit eaae323) makes it: up and down matrix
  of every linear layer and 2-D and 3-D convolution of the UNet, in the order of its modules, rank min(64, inputs,
  outputs), scale 1, no names. A file of another order or selection has other shapes somewhere and is refused, unless
  layers of equal shape changed places;
- v1's projection of the w embedding is neither in VideoCrafter2's checkpoint nor in the LoRA list, which has only its
  update; the original starts it from random numbers that it does not store. Deviation: here it starts from zero, so
  that loading is deterministic;
- v2's motion scale of 0.05 in the first 30 % of the process is the default of the authors' demo.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdm_env.errors import CorruptWeightsError
from vdm_env.models import local_weights, lvdm
from vdm_env.models.base import Condition, LatentVideoModel, ModelSpec, tiny_spec
from vdm_env.models.checkpoint_files import tensors_of, unpickle
from vdm_env.models.conditioning import GUIDANCE_WIDTH, TURBO_FPS, add_guided_embedding
from vdm_env.models.local_weights import Published
from vdm_env.models.lvdm_keys import Entry, unet_entries
from vdm_env.models.lvdm_sizes import UNetSizes
from vdm_env.models.unet3d import (
    PUBLISHED,
    SD_SCHEDULE,
    TINY_SIZE,
    VIDEOCRAFTER2,
    Parts,
    build,
    call_unet3d,
    load_videocrafter2,
    random_parts,
)
from vdm_env.models.untrained import seeded

_COMMON: dict[str, Any] = dict(
    height=320,
    width=512,
    num_frames=16,
    spatial_stride=8,
    max_frames=VIDEOCRAFTER2.max_frames,
    size_multiple=64,
    sampler="lcm",
    guidance_scale=1.0,
    fps=16.0,
)
T2V_TURBO = ModelSpec(name="T2VTurbo", num_steps=4, **_COMMON)
T2V_TURBO_V2 = ModelSpec(name="T2VTurboV2", num_steps=16, **_COMMON)
TURBO_SCHEDULE = SD_SCHEDULE
"""Grid drawn from a teacher of 50 steps."""
TURBO_V2_SCHEDULE = replace(SD_SCHEDULE, lcm_origin_steps=200)
GUIDANCE_SCALE = 7.5
"""w that conditions the network."""
MOTION_SCALE = 0.05
MOTION_SHARE = 0.3
"""The motion scale acts in this first share of the process, and is 0 afterwards."""
_RELEASED = {
    "T2VTurbo": Published(
        model="T2VTurbo",
        repository="jiachenli-ucsb/T2V-Turbo-VC2",
        files=("unet_lora.pt",),
        size="below 1 GB, and VideoCrafter2's checkpoint",
        licence="the one on the repository's page, not confirmed here; read it before anything but research",
        needs=(PUBLISHED["VideoCrafter2"],),
    ),
    "T2VTurboV2": Published(
        model="T2VTurboV2",
        repository="jiachenli-ucsb/T2V-Turbo-v2",
        files=("unet_mg.pt",),
        size="about 5.7 GB in float32, and VideoCrafter2's checkpoint",
        licence="the one on the repository's page, not confirmed here; read it before anything but research",
        needs=(PUBLISHED["VideoCrafter2"],),
    ),
}


def call_turbo(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """`call_unet3d`; a motion scale is switched off for the videos that are past its share of the process."""
    if "motion" in condition:
        early = t >= SD_SCHEDULE.num_train_timesteps * (1 - MOTION_SHARE)
        motion = condition["motion"].reshape(-1)
        condition = condition | {"motion": torch.where(early.to(motion.device), motion, torch.zeros_like(motion))}
    return call_unet3d(denoiser, x_t, t, condition)


# ------------------------------------------------------------------------------------------------- LoRA files


def lora_layers(sizes: UNetSizes) -> list[Entry]:
    """The layers the LoRA list covers, in its order: linear ones, 2-D and 3-D convolutions, not 1-D ones."""
    return [e for e in unet_entries(sizes) if e.source.endswith(".weight") and len(e.shape) in (2, 4, 5)]


def read_lora(path: str | Path) -> list[tuple[Tensor, Tensor]]:
    """(up, down) pairs of a release file, a pickled list [up, down, up, down, ...].

    Raises:
        FileNotFoundError: no such file.
        CorruptWeightsError: damaged, or no such list.
    """
    path = Path(path)
    return lora_pairs(unpickle(path), path)


def lora_pairs(content: Any, path: Path) -> list[tuple[Tensor, Tensor]]:
    """(up, down) pairs of a file's content; see `read_lora`."""
    if (
        not isinstance(content, Sequence)
        or len(content) % 2
        or not content
        or not all(isinstance(t, Tensor) for t in content)
    ):
        number = f" of {len(content)}" if hasattr(content, "__len__") else ""
        raise CorruptWeightsError(
            f"{path} holds a {type(content).__name__}{number}, expected a list of tensors: up, down, up, down, ..."
        )
    flat = [tensor.detach() for tensor in content]
    return list(zip(flat[::2], flat[1::2], strict=True))


def merge_lora(
    parts: Mapping[str, Mapping[str, Tensor]], pairs: Sequence[tuple[Tensor, Tensor]], sizes: UNetSizes
) -> None:
    """Adds every pair's product to its layer's weight, in place.

    Args:
        parts: {"unet": ..., "conditioning": ...} as `lvdm.convert_unet` returns them.
        pairs: as `read_lora` returns them.
        sizes: of the UNet.

    Raises:
        CorruptWeightsError: not one pair for each layer, or one that does not fit; nothing has changed then.
    """
    layers = lora_layers(sizes)
    problems = [] if len(pairs) == len(layers) else [f"{len(pairs)} pairs for {len(layers)} layers"]
    for place, (entry, (up, down)) in enumerate(zip(layers, pairs, strict=False)):
        rank = down.shape[0] if down.ndim else 0
        want_up = (entry.shape[0], rank) + (1,) * (len(entry.shape) - 2)
        if not rank or tuple(up.shape) != want_up or tuple(down.shape) != (rank, *entry.shape[1:]):
            problems.append(
                f"pair {place} is {tuple(up.shape)}, {tuple(down.shape)}, for {entry.source} of shape {entry.shape}"
            )
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CorruptWeightsError(
            f"the LoRA list does not fit this UNet: {'; '.join(problems[:8])}{more}. It is of another model or order"
        )
    with torch.no_grad():
        for entry, (up, down) in zip(layers, pairs, strict=True):
            weight = parts[entry.part][entry.names[0]]
            weight += (up.flatten(1).float() @ down.flatten(1).float()).reshape(weight.shape).to(weight)


# ---------------------------------------------------------------------------------------------------- loading


def load(
    spec: ModelSpec, *, weights: str, scale: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> LatentVideoModel:
    """`T2V_TURBO` or `T2V_TURBO_V2`; arguments and places of weights as in `vdm_env.models.unet3d.load`.

    Raises:
        MissingWeightsError: `weights="pretrained"` and VideoCrafter2's or T2V-Turbo's file is not on this machine.
        CorruptWeightsError: a file is truncated, damaged, or of another architecture.
    """
    v2 = spec.name == T2V_TURBO_V2.name
    numbers = {"fps": TURBO_FPS, "guidance": GUIDANCE_SCALE}
    if weights == "pretrained":
        parts, motion = _load_pretrained(_RELEASED[spec.name], device=device, dtype=dtype)
    else:
        warnings.warn(
            f"{spec.name} has random weights: use it for tests, speed and memory, not for results", stacklevel=3
        )
        motion = v2
        if scale == "tiny":
            spec = tiny_spec(spec, *TINY_SIZE)
        with seeded(seed, device, dtype):
            parts = random_parts(scale, spec.width)
            add_guided_embedding(parts.unet, motion_width=GUIDANCE_WIDTH if motion else None)
    if motion:
        numbers["motion"] = MOTION_SCALE
    schedule = TURBO_V2_SCHEDULE if v2 else TURBO_SCHEDULE
    return build(spec, parts, schedule, device=device, dtype=dtype, numbers=numbers, call=call_turbo)


def _load_pretrained(published: Published, *, device: torch.device | str, dtype: torch.dtype) -> tuple[Parts, bool]:
    """VideoCrafter2's networks with the release's UNet put in, and whether that takes a motion scale."""
    file = local_weights.find_file(published, published.files[0])
    if file is None:
        raise local_weights.missing(published)
    parts = load_videocrafter2(device=device, dtype=dtype)
    motion = put_in_unet(parts, file)
    return parts, motion


def put_in_unet(parts: Parts, file: Path, sizes: UNetSizes | None = None) -> bool:
    """Merges a LoRA list into VideoCrafter2's UNet, or replaces its weights, and adds the guidance embedding.

    Args:
        parts: VideoCrafter2's networks, without a frame-rate embedding put in yet; the UNet is changed in place.
        file: `unet_lora.pt`, `unet_mg.pt` or `unet_no_mg.pt`.
        sizes: of VideoCrafter2's UNet; the release's if None.

    Returns:
        Whether the network takes a motion scale.

    Raises:
        CorruptWeightsError: a damaged file, or one that does not fit.
    """
    sizes = replace(sizes or UNetSizes(), time_cond_proj_dim=GUIDANCE_WIDTH)
    content = unpickle(file)
    if isinstance(content, dict):
        state = tensors_of(content, file)
        motion = "motion_cond_proj.weight" in state
        if motion:
            sizes = replace(sizes, motion_cond_proj_dim=GUIDANCE_WIDTH)
        new = lvdm.convert_unet(state, sizes, str(file))
        parts.unet.load_state_dict(new["unet"])
        conditioning = new["conditioning"]
    else:
        motion = False
        base = parts.conditioning or {}
        like = parts.unet.time_embedding.linear_1.weight
        projection = torch.zeros(sizes.model_channels, GUIDANCE_WIDTH, dtype=like.dtype, device=like.device)
        conditioning = {name: tensor.to(like) for name, tensor in base.items()} | {"time_cond_proj.weight": projection}
        merge_lora({"unet": parts.unet.state_dict(), "conditioning": conditioning}, lora_pairs(content, file), sizes)
    add_guided_embedding(parts.unet, conditioning, motion_width=GUIDANCE_WIDTH if motion else None)
    return motion
