"""`make`: an environment from an id, or from your own model, reward and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vdm_env.compiled import CompileOptions, as_options, compile_blocks
from vdm_env.config import EnvConfig
from vdm_env.env import DenoisingVectorEnv
from vdm_env.guidance import as_interval, check_some_guidance
from vdm_env.images import ImageBook, ImageLike, as_image_book, default_images
from vdm_env.memory import free_text_encoder as let_go_of_text_encoder
from vdm_env.models import ModelSpec, VideoModel
from vdm_env.prompt_sets import prompt_set, prompts_from
from vdm_env.prompts import PromptBook
from vdm_env.registry import RewardWeights, build_reward, check_place, load_model, parse_id
from vdm_env.rewards import Reward, RewardContext, as_reward
from vdm_env.rewards.base import FramePolicy, ScoreFunction, select_frames

DEFAULT_PROMPTS = (
    "a dog riding a bike",
    "a cat playing chess",
    "a bear washing dishes",
    "a boat sailing on a calm lake at sunset",
)
"""Prompts of models without a world of their own until you give yours."""
PROMPTS_OF = {"Action": "actions", "ObjectRemoval": "objects", "ObjectRemovalDINO": "objects"}
"""Sets that stand in for these where a reward is about what the prompt names; see `vdm_env.prompt_sets`."""


def make(
    id: str | None = None,
    *,
    model: VideoModel | str | None = None,
    reward: Reward | ScoreFunction | str | RewardWeights | None = None,
    prompts: Mapping[str, Sequence[str]] | Sequence[str] | PromptBook | str | Path | None = None,
    images: Mapping[str, Sequence[ImageLike]] | Sequence[ImageLike] | ImageBook | str | Path | None = None,
    num_envs: int = 1,
    group_size: int = 1,
    num_steps: int | None = None,
    sampler: str | None = None,
    noise_level: float | Sequence[float] | None = None,
    guidance_scale: float | None = None,
    guidance_interval: Sequence[float] | None = None,
    split: str = "train",
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    decode_frames: FramePolicy | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: str = "pretrained",
    scale: str = "full",
    seed: int = 0,
    api: str = "gymnasium",
    observe_embedding: bool = False,
    free_text_encoder: bool = False,
    tile_decoding: bool = False,
    decode_chunk: int | None = None,
    compile: bool | str | Mapping[str, Any] | CompileOptions = False,
    render_mode: str | None = "rgb_array",
) -> Any:
    """Makes an environment by name, `make("MovingShapes-HPS", num_envs=4)`, or of your own objects.

    The latter: `make(model=..., reward=f, prompts=[...])`.

    Args:
        id: `<Model>-<Reward>`; `list_envs()` lists them. Without it, `model` and `reward` are needed.
        model: a name or a `VideoModel`; wins over the id's.
        reward: a name, {name: weight}, {name: {"weight": ..., "mean": ..., "std": ...}}, a `Reward`, or a function of
            (video [B,F,3,H,W] in [0,1], prompts) to [B]; wins over the id's.
        prompts: a list of texts, {"train": [...], "validation": [...], "test": [...]}, the name of a set (see
            `vdm_env.prompt_sets`: "activities", "actions", "objects", "scenes"), or a file of prompts (see
            `prompt_sets.read_prompts`); a world's own prompts if None.
        images: what a model that animates images (SVD) starts from: a folder (see `vdm_env.images.read_folder`), a
            list, or {"train": [...], ...} of files, PIL images or tensors [3,H,W] in [0,1]; `prompts` of the same form
            are then their texts. A few drawn ones if None.
        num_envs: videos side by side; a multiple of group_size.
        group_size: envs that share a prompt.
        num_steps, sampler, noise_level, guidance_scale: of the denoising process; the model's defaults if None.
            `noise_level` is eta of DDIM or a of a flow SDE, one number or one for each step.
        guidance_interval: noise levels (lo, hi] at which policies are guided, such as (0.2, 5.0), in standard
            deviations of the noise in relation to the clean latents'; the other steps cost half as much. All if None.
            See `vdm_env.guidance`.
        split: which prompts resets draw from.
        height, width, num_frames: of the video, in pixels and frames; the model's if None.
        decode_frames: frames decoded for the reward ("all", "random1", "alternate", a number, indices); the reward's
            wish if None.
        device, dtype: of the networks. Latents are float32 (float64 if dtype is).
        weights: "pretrained", or "random" for the architecture without any file.
        scale: "full", or with random weights "tiny": shrunk to run anywhere.
        seed: of the stream of prompts and noise until `reset(seed=...)`, and of random weights.
        api: "gymnasium" (a torch-native `gymnasium.vector.VectorEnv`) or "torchrl" (a `torchrl.envs.EnvBase`).
        observe_embedding: put what the network is conditioned on into observations, under the model's own names.
        free_text_encoder: embed all prompts now and give the memory of text encoders back, the model's and those of
            CLIP-style rewards; no other prompts after that. Without it the encoders of large models rest in main
            memory, except while new prompts are embedded.
        tile_decoding: encode and decode large pictures in overlapping tiles: less memory, slightly other pixels at the
            seams. Not every autoencoder can; a model object of your own goes on doing it.
        decode_chunk: frames decoded together by a decoder that looks across frames (SVD): less memory, differences at
            the borders of chunks. Other decoders take few frames at a time anyway, which changes nothing.
        compile: compile the repeated blocks of the network with `torch.compile`: True, the name of a backend, or
            fields of `vdm_env.compiled.CompileOptions`. The first calls of each batch size take longer; results differ
            in rounding. Not everywhere faster: measure it. A model object of your own stays compiled.
        render_mode: as in Gymnasium.

    Raises:
        ValueError: an unknown name (the nearest are named), an impossible size, step count, sampler or noise level.
        FileNotFoundError, ImportError: a file of prompts that is not there, or needs a library that is not.
        MissingWeightsError: pretrained weights that are not on this machine; the message says what works now.
    """
    if id is not None and not isinstance(id, str):
        raise TypeError(f"id must be a text such as 'MovingShapes-HPS', got {id!r}")
    check_place(device, dtype)
    if api not in ("gymnasium", "torchrl"):
        raise ValueError(f"api={api!r}: expected 'gymnasium' or 'torchrl'")
    if weights not in ("pretrained", "random") or scale not in ("full", "tiny"):
        raise ValueError(
            f"weights={weights!r}, scale={scale!r}: expected 'pretrained' or 'random', and 'full' or 'tiny'"
        )
    interval, compilation = as_interval(guidance_interval), as_options(compile)
    named_model, named_rewards = parse_id(id) if id is not None else (None, None)
    model = named_model if model is None else model
    reward = named_rewards if reward is None else reward
    if model is None or reward is None:
        raise ValueError('make needs an id ("MovingShapes-HPS") or both model=... and reward=...')
    model_name = model if isinstance(model, str) else model.spec.name
    network: VideoModel
    if isinstance(model, str):
        if scale == "tiny" and weights == "pretrained":
            raise ValueError(
                f"scale='tiny' has no pretrained weights; use make({id or model!r}, weights='random', scale='tiny')"
            )
        network = load_model(model, weights=weights, scale=scale, device=device, dtype=dtype, seed=seed)
    else:
        network = model
    spec = network.spec
    frames = spec.num_frames if num_frames is None else num_frames
    size = (frames, spec.height if height is None else height, spec.width if width is None else width)
    network.latent_shape(*size)  # an impossible size is refused before rewards are loaded
    if hasattr(network, "with_size"):  # Open-Sora's grid shift and positions depend on the size
        network = network.with_size(*size)
    network = _saving(network, tile_decoding, decode_chunk)
    scale_of_guidance = spec.guidance_scale if guidance_scale is None else guidance_scale
    check_some_guidance(interval, scale_of_guidance)
    if compilation is not None:
        compile_blocks(network.denoiser, compilation, device)
    if isinstance(reward, str):
        reward = {reward: 1.0}
    context = RewardContext(
        world=spec.world,  # type: ignore[arg-type]
        weights="pretrained" if spec.world else weights,  # type: ignore[arg-type]
        scale="full" if spec.world else scale,  # type: ignore[arg-type]
        device=device,
        dtype=dtype,
        seed=seed,
        num_frames=frames if decode_frames is None else len(select_frames(decode_frames, frames, 0)),
    )
    named = reward
    if isinstance(reward, Mapping):
        reward = build_reward(reward, context, replace(context, weights=weights, scale=scale))  # type: ignore[arg-type]
    else:
        reward = as_reward(reward)
    gold, own_prompts = _world(spec.world)
    if spec.world is None and isinstance(named, Mapping):
        own_prompts = next((prompt_set(PROMPTS_OF[name]) for name in named if name in PROMPTS_OF), own_prompts)
    book = _prompt_book(spec, prompts, images, own_prompts)
    config = EnvConfig(
        id=id or f"{model_name}-{reward.name}",
        model=network,
        reward=reward,
        prompts=book,
        split=split,
        num_envs=num_envs,
        group_size=group_size,
        num_steps=spec.num_steps if num_steps is None else num_steps,
        sampler=spec.sampler if sampler is None else sampler,
        noise_level=spec.noise_level if noise_level is None and sampler in (None, spec.sampler) else noise_level,
        guidance_scale=scale_of_guidance,
        guidance_interval=interval,
        compile=compilation,
        size=size,
        decode_frames=decode_frames,
        device=device,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        seed=seed,
        gold=gold,
        observe_embedding=observe_embedding,
        context=context,
    )
    env = DenoisingVectorEnv(config, render_mode)
    if free_text_encoder:
        let_go_of_text_encoder(env)
    return env.to_torchrl() if api == "torchrl" else env


def _saving(network: Any, tile_decoding: bool, decode_chunk: int | None) -> Any:
    """The model with these ways to save memory in decoding."""
    name = network.spec.name
    if tile_decoding:
        if not hasattr(network, "tile_decoding"):
            raise ValueError(f"{name} cannot decode in tiles; leave tile_decoding out")
        network.tile_decoding()
    if decode_chunk is None:
        return network
    if not hasattr(network, "with_decode_chunk"):
        raise ValueError(
            f"decode_chunk={decode_chunk!r}: the decoder of {name} does not take all frames together; leave it out"
        )
    return network.with_decode_chunk(decode_chunk)


def _prompt_book(spec: ModelSpec, prompts: Any, images: Any, own: Any) -> PromptBook:
    """The prompts of an environment; `DenoisingMDP` refuses those of the wrong kind."""
    if isinstance(prompts, ImageBook) and images is None:
        images, prompts = prompts, None
    if getattr(spec, "conditioned_on", "text") == "image" and prompts is None and images is None:
        return default_images()
    if images is not None:
        return as_image_book(images, prompts)
    prompts = own if prompts is None else prompts_from(prompts) if isinstance(prompts, str | Path) else prompts
    return prompts if isinstance(prompts, PromptBook) else PromptBook(prompts)


def _world(name: str | None) -> tuple[Any, Any]:
    """Gold score and prompts of an embedded world; neither where there is none."""
    if name is None:
        return None, {"train": DEFAULT_PROMPTS}
    from vdm_env.worlds import moving_shapes

    return moving_shapes.gold_score, moving_shapes.prompt_splits()
