"""Options that several commands share, and the environments and policies made with them. Imports torch when used."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.training import SAMPLING

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
MAX_SEED = 2**63 - 2
"""That of `vdm_env.starts`, which needs torch."""
UNLESS_GIVEN: dict[str, Any] = {
    "dtype": "float32",
    "weights": "pretrained",
    "scale": "full",
    "compile": False,
    "tile_decoding": False,
    "free_text_encoder": False,
}
"""What `ProcessOptions` stand for where they are None: nobody has asked for anything else."""
_SIZE = ("num_frames", "height", "width")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessOptions:
    """How a video is made. None: the model's own, and of a switch: off."""

    num_steps: int | None = None
    """denoising steps of a video"""
    sampler: str | None = None
    """ddim, flow_grpo, dance, cps, ... (see vdm_env/samplers.py)"""
    noise_level: float | None = None
    """noise of the sampler: eta of ddim, a of a flow SDE; 0: none"""
    guidance_scale: float | None = None
    """weight w of classifier-free guidance; 1: none"""
    guidance_interval: tuple[float, float] | None = None
    """two noise levels, low and high (inf: no limit), between which there is guidance, as standard deviations of the
    noise in relation to the clean latents'; the other steps cost half as much. None: guidance at all steps"""
    num_frames: int | None = None
    """frames of a video"""
    height: int | None = None
    """height in pixels"""
    width: int | None = None
    """width in pixels"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one, else cpu"""
    dtype: Dtype | None = None
    """number format of the networks; None: float32"""
    weights: Literal["pretrained", "random"] | None = None
    """random: the architecture without any file, for tests; None: pretrained"""
    scale: Literal["full", "tiny"] | None = None
    """tiny: random weights, shrunk to run anywhere; None: full"""
    compile: bool | None = None
    """compile the network's repeated blocks with torch.compile: slow at the first calls, needs a C++ compiler (on a GPU
    Triton), results differ in rounding"""
    tile_decoding: bool | None = None
    """decode large pictures in overlapping tiles: less memory, slightly other pixels at the seams"""
    decode_chunk: int | None = None
    """frames decoded together by a decoder that looks across frames (SVD): less memory, differences at the borders of
    chunks; None: all"""
    free_text_encoder: bool | None = None
    """embed all prompts at once and give the text encoder's memory back"""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """What videos are made in training. None: what suits the algorithm and model."""

    num_envs: int | None = None
    """videos side by side (in each process, where there are several); a multiple of the group size"""
    group_size: int | None = None
    """neighbouring videos that share a prompt"""
    decode_frames: str | None = None
    """frames decoded for the reward: all, random1, alternate, a number of evenly spread ones, or indices as in 0,4 (one
    index: 4,)"""
    split: Literal["train", "validation", "test"] = "train"
    """prompts that training draws from"""
    prompts: str | None = None
    """name of a prompt set (activities, actions, objects, scenes), or a file: .txt with a prompt a line, .csv, .json,
    ...; about 5 % of its texts each become validation and test prompts, unless a .json file says which, as in
    {"train": [...], "test": [...]}; None: the model's own"""
    prompt_column: str | None = None
    """column of the texts in the file of --prompts; None: prompt, caption, name or text"""
    prompt_encoding: str | None = None
    """of the file of --prompts, such as latin-1; None: utf-8"""
    images: str | None = None
    """folder of pictures to start from, for models that animate images"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyOptions:
    """What is trained."""

    lora_rank: int = 16
    """rank of the LoRA; 0: all weights"""
    lora_alpha: float | None = None
    """scale of the LoRA; None: its rank, a factor of 1"""
    lora_targets: tuple[str, ...] = ()
    """endings of the names of the layers that get a LoRA; none: the model's own choice"""
    gradient_checkpointing: bool = False
    """compute the network again in the backward pass: less memory, more time"""
    offload_activations: bool = False
    """keep what the backward pass needs in main memory: less memory of the GPU, more time"""


def place(device: str, *, keep_memory: bool = True) -> str:
    """The device a name stands for. Where it is the CPU, freed memory stays with the process from here on."""
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and keep_memory:
        from vdm_env.allocator import keep_freed_memory

        keep_freed_memory()
    return device


def world_of(env_id: str) -> str | None:
    """The embedded world of an environment's model, if it has one.

    Raises:
        ValueError: no environment id, or unknown names in it; the nearest are named.
    """
    from vdm_env.models import MODELS
    from vdm_env.registry import parse_id

    model = parse_id(env_id)[0]
    return MODELS[model].world if model in MODELS else None


def make_env(
    env_id: str, process: ProcessOptions, *, seed: int = 0, defaults: Mapping[str, Any] | None = None, **more: Any
) -> Any:
    """The environment of an id.

    Args:
        env_id: such as "MovingShapes-HPS".
        process: options; those that are None are taken from `defaults`.
        seed: of the environment, and of random weights.
        defaults: options of `vdm_env.make`; before them, for an embedded world, comes the sampling of the demo.
        more: further options of `vdm_env.make`; None counts as not given.

    Raises:
        ValueError, TypeError, OSError: see `vdm_env.make`.
    """
    import torch

    import vdm_env

    given = {name: value for name, value in (asdict(process) | more).items() if value is not None}
    given |= {"device": place(process.device), "dtype": getattr(torch, process.dtype or UNLESS_GIVEN["dtype"])}
    own = dict(SAMPLING) if world_of(env_id) else {}
    return vdm_env.make(env_id, seed=seed, **{**own, **(defaults or {}), **given})


def make_policy(env: Any, options: PolicyOptions, seed: int = 0) -> Any:
    """The policy of an environment.

    Raises:
        ValueError: see `vdm_env.policy.DenoisingPolicy`.
    """
    return env.make_policy(
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_targets=options.lora_targets or None,
        gradient_checkpointing=options.gradient_checkpointing,
        offload_activations=options.offload_activations,
        seed=seed,
    )


def resolved_process(env: Any, process: ProcessOptions) -> ProcessOptions:
    """The options with what the environment made of those that were None."""
    config = env.config
    size = dict(zip(_SIZE, config.size, strict=True))
    names = ("num_steps", "sampler", "noise_level", "guidance_scale", "guidance_interval")
    found = {name: getattr(config, name) for name in names}
    found |= {name: value for name, value in UNLESS_GIVEN.items() if getattr(process, name) is None}
    return replace(process, **found, **size, device=str(env.device))


def resolved_batch(env: Any, batch: BatchOptions) -> BatchOptions:
    """The options with what the environment made of those that were None."""
    frames = env.config.decode_frames
    shown = "".join(f"{frame}," for frame in frames) if isinstance(frames, list | tuple) else frames
    return replace(
        batch,
        num_envs=env.num_envs,
        group_size=env.group_size,
        decode_frames=None if shown is None else str(shown),
    )


def chosen_frames(text: str | None) -> Any:
    """`decode_frames` of `vdm_env.make` from its text; a number is a count, one with a comma an index."""
    if text is None or not text.replace(",", "").replace(" ", "").isdecimal():
        return text
    return [int(part) for part in text.split(",") if part.strip()] if "," in text else int(text)


def own_prompts(batch: BatchOptions) -> dict[str, Any]:
    """`prompts` and `images` of `vdm_env.make`, where options name any.

    Raises:
        ValueError, OSError: an unknown set, or a file that cannot be read.
    """
    found: dict[str, Any] = {} if batch.images is None else {"images": batch.images}
    if batch.prompts is not None:
        from vdm_env.prompt_sets import prompts_from

        how = {"column": batch.prompt_column, "encoding": batch.prompt_encoding}
        found["prompts"] = prompts_from(batch.prompts, **{name: value for name, value in how.items() if value})
    return found


def check_seed(seed: int) -> None:
    """Refuses a seed that no generator takes.

    Raises:
        ValueError: it lies outside 0 .. 2^63 - 2.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"--seed {seed} lies outside 0 .. {MAX_SEED}")


def check_target(path: str | Path) -> None:
    """Finds out whether a file can be written, before the work whose result it is to hold; leaves nothing behind.

    Raises:
        ValueError: it cannot; the message says why.
    """
    path = Path(path)
    try:
        there = path.exists()
        made = [folder for folder in path.parents if not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab"):
                pass
        finally:
            with suppress(OSError):
                if not there:
                    path.unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror or error}; give another file") from error
