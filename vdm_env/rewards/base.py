"""What a reward is: the protocol, the frame policies, and the checks the environment applies to every score.

A reward maps videos [B,F,3,H,W] in [0,1] and B prompts to B scores. It scores every frame it is handed; which frames
those are is said by its frame policy, so that the environment decodes only what will be looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

FramePolicy = str | int | Sequence[int]
"""`"all"`, `"alternate"`, `"first"`, `"last"`, `"random<n>"`, `"tsn<n>"`, `"middle<n>"`.

N (= `"middle<n>"`), or indices.
"""

ScoreFunction = Callable[[Tensor, list[str]], Tensor]


@runtime_checkable
class Reward(Protocol):
    """A reward model. Any object with these attributes and this call is one; there is nothing to subclass.

    name: how it is called in logs. differentiable: whether gradients of the scores reach the pixels. frames: the frames
    it wants (see `select_frames`). range: bounds of its scores, infinite where there is none.

    Two methods are optional: `score_parts(video, prompts)`, see the function of that name, and
    `check_num_frames(count)`, which raises ValueError where it cannot score a video of that many frames.
    """

    @property
    def name(self) -> str: ...

    @property
    def differentiable(self) -> bool: ...

    @property
    def frames(self) -> FramePolicy: ...

    @property
    def range(self) -> tuple[float, float]: ...

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of video [B,F,3,H,W] in [0,1]; score i belongs to video i and prompt i and to no other."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionReward:
    """A plain function, or another reward, made a `Reward` with attributes of its own."""

    function: ScoreFunction
    name: str
    differentiable: bool = True
    frames: FramePolicy = "all"
    range: tuple[float, float] = (-math.inf, math.inf)
    least_frames: int = 1
    """fewer cannot be scored"""

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        return self.function(video, prompts)

    @property
    def devices(self) -> Any:
        """Accelerators elsewhere that serve the function, see `remote.remote_parts`; AttributeError if it has none."""
        function: Any = self.function
        return function.devices

    def check_num_frames(self, count: int) -> None:
        """Raises ValueError where a video of that many frames cannot be scored."""
        if count < self.least_frames:
            raise ValueError(
                f"reward {self.name!r} needs at least {self.least_frames} frames, got {count}; decode more "
                "(decode_frames='all')"
            )
        if hasattr(self.function, "check_num_frames"):
            self.function.check_num_frames(count)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartedReward(FunctionReward):
    """The same of a reward that has parts, which it keeps."""

    def score_parts(self, video: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [B] and what they are made of, {name: [B]}, as the reward itself has them."""
        inner: Any = self.function
        return inner.score_parts(video, prompts)


def as_reward(reward: Reward | ScoreFunction, **attributes: Any) -> Reward:
    """A `Reward` from a `Reward` or from any callable `f(video, prompts) -> [B]`.

    A plain callable is taken as differentiable, over all frames and unbounded, unless it carries attributes that say
    otherwise (`f.differentiable = False`) or `attributes` do. A differentiable reward whose scores have no graph is
    found out where gradients are asked for, not here. With `frames` any reward gets another frame policy.

    Args:
        reward: the reward or the callable.
        attributes: any of name, differentiable, frames, range, least_frames; they win over what the object says.

    Raises:
        TypeError: not callable, or an unknown attribute.
        ValueError: frames choose a number of frames that the reward cannot score.
    """
    if not callable(reward):
        raise TypeError(
            f"a reward is a callable f(video[B,F,3,H,W] in [0,1], prompts) -> scores [B]; got {type(reward).__name__}"
        )
    needed = ("name", "differentiable", "frames", "range")
    known = (*needed, "least_frames")
    unknown = sorted(set(attributes) - set(known))
    if unknown:
        raise TypeError(f"unknown reward attributes {unknown}; expected some of {list(known)}")
    if not attributes and all(hasattr(reward, key) for key in needed):
        return reward  # type: ignore[return-value]
    found = {key: getattr(reward, key) for key in known if hasattr(reward, key)}
    found.setdefault("name", getattr(reward, "__name__", type(reward).__name__))
    function = reward.function if isinstance(reward, FunctionReward) else reward
    kind = PartedReward if hasattr(function, "score_parts") else FunctionReward
    made = kind(function=function, **(found | attributes))
    if "frames" in attributes:
        check_frames(made, made.frames, None)
    return made


def check_frames(reward: Reward, policy: FramePolicy, num_frames: int | None) -> None:
    """Raises ValueError unless the policy fits videos of that length and chooses frames the reward can score.

    Args:
        reward: the reward; what it wants itself, `reward.frames`, is not questioned.
        policy: which frames it is to see.
        num_frames: of the videos; None: not known yet, and only what follows from the policy alone is checked.
    """
    count = _counted(policy) if num_frames is None else len(select_frames(policy, num_frames, 0))
    own = reward.function if isinstance(reward, FunctionReward) else reward
    if policy == getattr(own, "frames", None):
        return
    if count is not None and hasattr(reward, "check_num_frames"):
        try:
            reward.check_num_frames(count)
        except ValueError as error:
            raise ValueError(f"frame policy {policy!r} does not fit: {error}") from error


def check_inputs(video: Tensor, prompts: Sequence[str], name: str) -> None:
    """Raises ValueError or TypeError unless video is [B,F,3,H,W] of floats with one prompt for each of the B videos."""
    if not isinstance(video, Tensor) or not video.is_floating_point():
        kind = video.dtype if isinstance(video, Tensor) else type(video).__name__
        raise TypeError(f"reward {name!r} expects a float tensor [B,F,3,H,W] in [0,1], got {kind}")
    if video.ndim != 5 or video.shape[2] != 3 or 0 in video.shape:
        raise ValueError(
            f"reward {name!r} expects video [B,F,3,H,W] in [0,1] with B, F, H, W >= 1, got shape {tuple(video.shape)}"
        )
    if isinstance(prompts, str) or len(prompts) != len(video):
        given = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"reward {name!r} expects a list of {len(video)} prompts, one for each video, got {given}")


class NotFiniteError(ValueError):
    """Scores that are NaN or infinite."""


def validate_scores(scores: Any, batch: int, name: str) -> Tensor:
    """The scores, checked: a real floating tensor [batch] without NaN or infinity. The graph is kept.

    Raises:
        TypeError: no tensor, or not of a floating type.
        ValueError: wrong shape, or (NotFiniteError) values that are not finite; the message gives their indices.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"reward {name!r} returned {type(scores).__name__}; expected a float tensor of shape [{batch}]")
    if not scores.is_floating_point():
        raise TypeError(f"reward {name!r} returned dtype {scores.dtype}; expected floats, so return scores.float()")
    if tuple(scores.shape) != (batch,):
        hint = "return one score a video, not a mean over the batch" if scores.ndim == 0 else "one score a video"
        raise ValueError(f"reward {name!r} returned shape {tuple(scores.shape)}; expected ({batch},): {hint}")
    finite = torch.isfinite(scores.detach())
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        values = scores.detach()[bad[:8]].tolist()
        raise NotFiniteError(
            f"reward {name!r} returned values that are not finite for videos {bad[:8]}{' ...' if len(bad) > 8 else ''} "
            f"of {batch}: {values}; look at those videos and prompts (NaN in the latents? a division by zero?)"
        )
    return scores


def score_parts(reward: Reward, video: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Checked scores [B] and what they are made of, {name: [B]}; a reward without `parts` is its own only part."""
    check_inputs(video, prompts, reward.name)
    if hasattr(reward, "score_parts"):
        total, parts = reward.score_parts(video, prompts)
    else:
        total = reward(video, prompts)
        parts = {reward.name: total}
    return validate_scores(total, len(video), reward.name), parts


_COUNTED = re.compile(r"(random|tsn|middle)([1-9]\d*)")


def _counted(policy: FramePolicy) -> int | None:
    """How many frames a policy chooses, where that does not depend on the video; None also for what is no policy."""
    if policy in ("first", "last"):
        return 1
    if isinstance(policy, str):
        match = _COUNTED.fullmatch(policy)
        return None if match is None else int(match[2])
    return policy if isinstance(policy, int) else len(torch.as_tensor(policy))


def select_frames(policy: FramePolicy, num_frames: int, generator: torch.Generator | int | None = None) -> Tensor:
    """Indices of the frames a policy looks at; a pure function of its arguments.

    Args:
        policy: `"all"`; `"alternate"` (0, 2, 4, ...; VADER's "alt"); `"first"`; `"last"`; `"random<n>"` (n different
            frames; VADER trains with one); `"tsn<n>"` (one random frame of each of n equal segments, Wang et al. 2016,
            arXiv:1608.00859); `"middle<n>"` or n (the middle of each of n equal segments, n evenly spread frames; a
            video of fewer than n frames repeats some); or a sequence of indices, negative ones from the end.
        num_frames: frames of the video.
        generator: what random policies draw from: a CPU generator, or a seed.

    Returns:
        int64 [n], ascending except for explicit indices.

    Raises:
        ValueError: an unknown policy, an index outside the video, more random frames than there are, or a random policy
            without a generator.
    """
    if num_frames < 1:
        raise ValueError(f"a video has at least one frame, got num_frames={num_frames}")
    if isinstance(policy, bool) or not isinstance(policy, str | int):
        index = torch.as_tensor(list(policy) if isinstance(policy, Sequence) else policy, dtype=torch.int64)
        if index.ndim != 1 or not len(index) or int(index.min()) < -num_frames or int(index.max()) >= num_frames:
            raise ValueError(f"frame indices {policy} do not fit a video of {num_frames} frames (0..{num_frames - 1})")
        return index % num_frames
    text = f"middle{policy}" if isinstance(policy, int) else policy
    simple = {"all": slice(None), "alternate": slice(None, None, 2), "first": slice(1), "last": slice(-1, None)}
    if text in simple:
        return torch.arange(num_frames)[simple[text]]
    match = _COUNTED.fullmatch(text)
    if match is None:
        raise ValueError(
            f"unknown frame policy {policy!r}; expected 'all', 'alternate', 'first', 'last', 'random<n>', 'tsn<n>', "
            "'middle<n>' with n >= 1 (as in 'random1'), a number of frames, or a list of frame indices"
        )
    kind, n = match[1], int(match[2])
    if kind == "middle":
        return ((torch.arange(n) + 0.5) * num_frames / n).long()
    if generator is None:
        raise ValueError(f"frame policy {policy!r} is random: pass a torch.Generator or a seed, so that runs repeat")
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    if n > num_frames:
        raise ValueError(
            f"frame policy {policy!r} asks for {n} frames of a video of {num_frames}; use at most that many"
        )
    if kind == "random":
        return torch.randperm(num_frames, generator=generator)[:n].sort().values
    return ((torch.arange(n) + torch.rand(n, generator=generator)) * num_frames / n).long().clamp(max=num_frames - 1)


def is_random(policy: FramePolicy) -> bool:
    """Whether a policy draws its frames at random."""
    return isinstance(policy, str) and policy.startswith(("random", "tsn"))
