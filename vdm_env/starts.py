"""How episodes start: the stream of prompts and video seeds, and the checks of what `reset` is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdm_env import noise
from vdm_env.images import ImageBook
from vdm_env.prompts import PromptBook

MAX_SEED = (1 << 63) - 2
"""Video seeds lie in 0 .. MAX_SEED: one below int64's largest, which Gymnasium's sampling of a Box cannot represent."""
OPTIONS = ("prompts", "prompt_ids", "images", "image", "latents", "step", "noise_levels", "reset_mask")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Which part of a wider env an env is: of world * B videos side by side those from rank * B on.

    Every part draws the prompts and seeds of all, and keeps its own, so that the parts together simulate what one env
    of world * B videos would.

    Raises:
        ValueError: a rank outside 0 .. world - 1.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank} of world={self.world}: expected a rank in 0 .. {self.world - 1}")

    def widened(self, mask: Tensor) -> Tensor:
        """The reset mask [world * B] of all parts.

        Raises:
            ValueError: not everything is reset, and what the other parts reset is not known here.
        """
        if self.world > 1 and not bool(mask.all()):
            raise ValueError(
                f"this env is part {self.rank} of {self.world} of a wider one, and its videos start together: leave "
                f"reset_mask out"
            )
        return mask.repeat(self.world)

    def own(self, values: Tensor) -> Tensor:
        """The rows [B] of this part, of all parts' [world * B]."""
        return values.chunk(self.world)[self.rank]


@dataclass(kw_only=True)
class Stream:
    """An endless, deterministic sequence of video seeds and prompts."""

    seed: int
    videos_drawn: int = 0
    groups_drawn: int = 0

    def video_seeds(self, mask: Tensor) -> Tensor:
        """New seeds [B] where the mask [B] is True, 0 elsewhere."""
        seeds = torch.zeros(len(mask), dtype=torch.int64)
        for place in mask.nonzero().flatten().tolist():
            seeds[place] = min(noise.mix(self.seed, 2, self.videos_drawn), MAX_SEED)
            self.videos_drawn += 1
        return seeds

    def prompt_ids(self, mask: Tensor, group_size: int, pool: Sequence[int]) -> Tensor:
        """Prompt numbers [B] from the pool, one for each group under the mask: all of the pool before any again."""
        drawn = torch.zeros(len(mask), dtype=torch.int64)
        for group in mask[::group_size].nonzero().flatten().tolist():
            epoch, place = divmod(self.groups_drawn, len(pool))
            order = torch.randperm(len(pool), generator=noise.generator_for(self.seed, 1, epoch))
            drawn[group * group_size : (group + 1) * group_size] = pool[int(order[place])]
            self.groups_drawn += 1
        return drawn


def check_options(options: Mapping[str, Any], env_id: str, book: PromptBook) -> None:
    """Raises ValueError for options that no reset, or not this model's, understands."""
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"unknown reset options {unknown}; expected some of {list(OPTIONS)}")
    given = [name for name in ("image", "images") if options.get(name) is not None]
    if given and not isinstance(book, ImageBook):
        raise ValueError(
            f"{env_id}: option {given[0]!r} was given, but this model is conditioned on text alone; leave it out"
        )
    if len(given) > 1:
        raise ValueError("give image (one for all envs) or images (one a group or one an env), not both")


def reset_mask(given: Any, num_envs: int, group_size: int, *, first: bool) -> Tensor:
    """Which envs to reset, bool [num_envs]; whole groups, and all of them the first time."""
    if given is None:
        return torch.ones(num_envs, dtype=torch.bool)
    mask = torch.as_tensor(given).cpu()
    if mask.dtype != torch.bool or mask.shape != (num_envs,) or not mask.any():
        raise ValueError(
            f"reset_mask must be bool of shape ({num_envs},) with at least one True, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    groups = mask.reshape(-1, group_size)
    if bool((groups.any(1) != groups.all(1)).any()):
        raise ValueError(f"reset_mask cuts through a group of {group_size}; reset whole groups: {mask.tolist()}")
    if first and not bool(mask.all()):
        raise ValueError("the first reset must start every env; leave reset_mask out")
    return mask


def given_prompts(options: Mapping[str, Any], book: PromptBook, num_envs: int, group_size: int) -> Tensor | None:
    """Prompt numbers [num_envs] that the options ask for, None if they do not; what is new is added to the book."""
    texts, ids = options.get("prompts"), options.get("prompt_ids")
    images = options.get("images") if options.get("image") is None else [options["image"]]
    if images is not None:
        assert isinstance(book, ImageBook)  # check_options has seen to it
        if ids is not None:
            raise ValueError("give images or prompt_ids, not both")
        _check_number(images, num_envs, group_size, one_for_all=options.get("image") is not None)
        ids, texts = book.add_images(images, texts), None
        ids = ids * num_envs if len(ids) == 1 else ids
    if texts is not None and ids is not None:
        raise ValueError("give prompts or prompt_ids, not both")
    groups = num_envs // group_size
    if texts is not None:
        _check_number(texts, num_envs, group_size)
        ids = book.add(texts)
    if ids is None:
        return None
    if not isinstance(ids, Sequence | Tensor) or isinstance(ids, str):
        raise ValueError(f"prompt_ids={ids!r}: expected a list of numbers, one a group or one an env")
    given = [int(i) for i in ids]
    if len(given) == groups:
        given = [i for i in given for _ in range(group_size)]
    if len(given) != num_envs:
        raise ValueError(f"got {len(given)} prompts; expected {groups} (one a group) or {num_envs} (one an env)")
    outside = [i for i in given if not 0 <= i < len(book)]
    if outside:
        raise ValueError(f"prompt_ids {outside} are outside the {len(book)} known prompts (env.prompts)")
    chosen = torch.tensor(given)
    if bool((chosen.reshape(-1, group_size) != chosen[::group_size, None]).any()):
        raise ValueError(f"the {group_size} envs of a group must share their prompt, got prompt_ids {given}")
    return chosen


def _check_number(given: Any, num_envs: int, group_size: int, one_for_all: bool = False) -> None:
    groups = num_envs // group_size
    if one_for_all or isinstance(given, str) or len(given) in (0, groups, num_envs):
        return
    raise ValueError(f"got {len(given)} prompts; expected {groups} (one a group) or {num_envs} (one an env)")


def given_seeds(seeds: Sequence[int], num_envs: int) -> Tensor:
    """The videos' own seeds, int64 [num_envs]."""
    given = [int(s) for s in seeds]
    if len(given) != num_envs or not all(0 <= s <= MAX_SEED for s in given):
        raise ValueError(
            f"got video seeds {given}; expected one int for the stream, or {num_envs} ints in 0 .. {MAX_SEED}"
        )
    return torch.tensor(given)


def given_latents(given: Any, shape: tuple[int, ...]) -> Tensor:
    """Latents to start from, checked."""
    if not isinstance(given, Tensor) or tuple(given.shape) != shape or not given.is_floating_point():
        got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"option latents must be a float tensor of shape {shape}, got {got}")
    if not bool(torch.isfinite(given.detach()).all()):
        raise ValueError("option latents has NaN or infinity; start from finite latents, or leave it out for noise")
    return given


def given_step(given: Any, num_envs: int, num_steps: int) -> Tensor:
    """Denoising steps to start at, int64 [num_envs]."""
    step = torch.as_tensor(0 if given is None else given, dtype=torch.int64).expand(num_envs).clone()
    if int(step.min()) < 0 or int(step.max()) >= num_steps:
        raise ValueError(f"option step must lie in 0 .. {num_steps - 1}, got {step.tolist()}")
    return step
