"""The denoising process as a Markov decision process: model + transition table + prompts + reward.

State (x_k, t_k, prompt), action = what the network emits, transition x_{k+1} = A_k x_k + B_k a_k
(`vdm_env.transition`), reward 0 until the last step and then the reward model's score of the decoded video.
`DenoisingMDP` is the framework-free core; `vdm_env.env` and `vdm_env.torchrl` put their interfaces over it.

Legend: B videos, S denoising steps, C F H W latent channels, frames, rows, columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdm_env import noise, transition
from vdm_env.host import on_host, upload
from vdm_env.images import ImageBook
from vdm_env.models.base import Condition, VideoModel
from vdm_env.prompts import PromptBook
from vdm_env.rewards.base import FramePolicy, Reward, check_frames, score_parts, select_frames
from vdm_env.schedule import make_table
from vdm_env.transition import TransitionTable

MAX_IMAGE_CONDITIONS = 512
"""Conditions of (image, video seed) that are kept; they are made anew where one is needed again."""


@dataclass
class Counters:
    """What was spent since the MDP was made. Forwards and backwards count videos, each guidance branch by itself."""

    videos_sampled: int = 0
    reward_queries: int = 0
    reward_backward_queries: int = 0
    denoiser_forwards: int = 0
    denoiser_backwards: int = 0
    rollout_s: float = 0.0
    """from a reset of all envs to their last step, decoding and scoring apart"""
    decode_s: float = 0.0
    reward_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """End of an episode: scores [B], their parts {name: [B]} and the video [B,n,3,H,W] the reward saw."""

    reward: Tensor
    parts: dict[str, Tensor]
    video: Tensor


class DenoisingMDP:
    """Model, schedule, prompts and reward as one decision process.

    Its tables (`table`, of the latest reset, and `base_table`) lie on the CPU: index them with
    `vdm_env.host.on_host(obs["step"])`, or take `table.to(device)`.

    Args:
        model: any `VideoModel`.
        reward: what scores the decoded video.
        prompts: the texts and their splits.
        num_steps: denoising steps asked for (a grid may have one more, see `table.num_steps`).
        sampler: one of `model.schedule.samplers`.
        noise_level: eta of DDIM or a of a flow SDE; one number, one for each step, or None for the sampler's
            published one.
        size: (num_frames, height, width) of the video, in frames and pixels.
        decode_frames: which frames the reward sees; None leaves it to the reward.
        device: where latents live.
        dtype: of the latents: float32, or float64 for tests of exactness.
        gold: a true score of the world, if there is one: (video, prompts) to an object with a `total` [B].

    Raises:
        ValueError: an impossible size, number of steps, sampler or noise level, texts for a model that animates
            images, or the reverse.
    """

    def __init__(
        self,
        model: VideoModel,
        reward: Reward,
        prompts: PromptBook,
        *,
        num_steps: int,
        sampler: str,
        noise_level: float | Sequence[float] | None,
        size: tuple[int, int, int],
        decode_frames: FramePolicy | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        gold: Callable[[Tensor, Sequence[str]], Any] | None = None,
    ) -> None:
        self.model, self.schedule, self.reward, self.prompts = model, model.schedule, reward, prompts
        self.on_images = check_prompts(model, prompts)
        self.num_frames, self.height, self.width = size
        self.latent_shape = model.latent_shape(*size)
        self.device, self.dtype = torch.device(device), dtype
        self.decode_frames: FramePolicy = reward.frames if decode_frames is None else decode_frames
        check_frames(reward, self.decode_frames, self.num_frames)  # before anything is spent
        self.sampler, self.noise_level = sampler, noise_level
        self.base_table = self.make_table(num_steps, sampler, noise_level)
        self.table = self.base_table
        self._gold = gold
        self._conditions: dict[Any, Condition] = {}
        self.counters = Counters()

    def make_table(self, num_steps: int, sampler: str, noise_level: float | Sequence[float] | None) -> TransitionTable:
        """A transition table on this model's schedule, on the CPU; `vdm_env.transition` takes it to the latents."""
        return make_table(self.schedule, num_steps, sampler, noise_level)

    # ------------------------------------------------------------------ the process

    @property
    def num_steps(self) -> int:
        """Denoising steps of an episode."""
        return self.table.num_steps

    @property
    def num_train_timesteps(self) -> int:
        """Range of the network's timesteps, for losses at any t."""
        return self.schedule.num_train_timesteps

    def initial_latents(self, video_seeds: Tensor) -> Tensor:
        """X at step 0, [B,C,F,H,W]: noise keyed by the video's seed, at the schedule's first noise level."""
        drawn = noise.normal(video_seeds, noise.INITIAL, self.latent_shape)
        return upload(drawn, self.device, self.dtype) * self.schedule.init_sigma

    def step(self, x: Tensor, a: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """Next latents x_{k+1} = A_k x_k + B_k a_k; see `vdm_env.transition.step`."""
        return transition.step(self.table, x, a, k, mask)

    def x0(self, x: Tensor, a: Tensor, step: Tensor) -> Tensor:
        """The clean latents that the action implies at a step of the grid."""
        return transition.predict_x0(self.table, x, a, step)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents x_t of clean latents, noise and training timesteps t [B]."""
        return self.schedule.add_noise(x0, noise, t)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should emit for them."""
        return self.schedule.target(x0, noise, t)

    # ------------------------------------------------------------------ pixels and scores

    def encode(self, video: Tensor) -> Tensor:
        """Latents of a video [B,F,3,H,W] in [0,1].

        Raises:
            TypeError: whole numbers, such as uint8 in 0..255.
        """
        if not video.is_floating_point():
            raise TypeError(f"the video is {video.dtype}, expected floats in [0, 1]; divide bytes by 255 first")
        return self.model.encode(video.to(self.device))

    def decode(self, latents: Tensor, frames: Tensor | None = None) -> Tensor:
        """Video [B,F,3,H,W] in [0,1]; `frames` [B,n] chooses each video's frames. The graph is kept."""
        return self.model.decode(latents, frames)

    def score(self, video: Tensor, prompts: Sequence[str]) -> Tensor:
        """Reward scores [B] of videos; counted as reward queries.

        Raises:
            ValueError: the reward changed the video in place, or gave no finite score for each.
        """
        return self._score(video, list(prompts))[0]

    def gold(self, video: Tensor, prompts: Sequence[str]) -> Any | None:
        """The world's true score, or None where there is no such thing. For evaluation only."""
        return None if self._gold is None else self._gold(video, prompts)

    def frames_of(self, video_seeds: Tensor) -> Tensor | None:
        """Frames [B,n] the reward sees of each video, keyed by its seed; None is all."""
        if self.decode_frames == "all":
            return None
        chosen = [
            select_frames(self.decode_frames, self.num_frames, noise.generator_for(s, noise.FRAMES))
            for s in _numbers(video_seeds)
        ]
        return torch.stack(chosen)

    def outcome(self, x0: Tensor, prompt_ids: Tensor, video_seeds: Tensor) -> Outcome:
        """Decodes final latents and scores them."""
        started = self.clock()
        video = self.decode(x0, self.frames_of(video_seeds))
        self.counters.decode_s += self.clock() - started
        self.counters.videos_sampled += len(video)
        reward, parts = self._score(video, [self.prompts[i] for i in _numbers(prompt_ids)])
        return Outcome(reward=reward, parts={k: v.detach() for k, v in parts.items()}, video=video.detach())

    def _score(self, video: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        started = self.clock()
        before = _edits(video)
        scores, parts = score_parts(self.reward, video, prompts)
        if _edits(video) != before:
            raise ValueError(
                f"reward {self.reward.name!r} changed the video it was given, in place; work on a copy, as in "
                "video.mul(0.5) or video.clone()"
            )
        self.counters.reward_s += self.clock() - started
        self.counters.reward_queries += len(video)
        if scores.requires_grad:
            self.counters.reward_backward_queries += len(video)
        return scores.to(self.device), parts

    def clock(self) -> float:
        """Seconds, with the device's queue drained: phases of an episode are measured at their edges."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # ------------------------------------------------------------------ prompts

    def condition_of(self, obs: Mapping[str, Tensor]) -> Condition:
        """What the network is conditioned on in these states."""
        return self.condition(obs["prompt_id"], obs["video_seed"] if self.on_images else None)

    def action_scale(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Standard deviation of the policy in these states, [B] or broadcastable to the latents."""
        return obs["action_std"]

    def condition(
        self, prompt_ids: Tensor | Sequence[int], video_seeds: Tensor | Sequence[int] | None = None
    ) -> Condition:
        """What the network is conditioned on for these prompts; every prompt is embedded once.

        Image prompts carry a little noise, keyed by the video's seed; without seeds each image has a fixed draw.
        """
        ids = _numbers(prompt_ids)
        if self.on_images:
            return self._image_condition(ids, None if video_seeds is None else _numbers(video_seeds))
        new = sorted({i for i in ids if i not in self._conditions})
        # A model whose text encoder rests in main memory has a method `embedding()`: one way there and back for all.
        at_hand = getattr(self.model, "embedding", None) if new else None
        with nullcontext() if at_hand is None else at_hand():
            for i in new:
                self._embed(i, self.prompts[i])
        return self._gather(ids)

    def unconditional(self, batch: int, condition: Condition | None = None) -> Condition:
        """The empty prompt's condition, `batch` times.

        A model may make it from the prompts' own `condition` instead (Open-Sora's null caption shares the prompt's
        mask): then it has a method `unconditional(condition)`.
        """
        of_condition = getattr(self.model, "unconditional", None)
        if of_condition is not None and condition is not None:
            return of_condition(condition)
        if -1 not in self._conditions:
            self._embed(-1, "")
        return self._gather([-1] * batch)

    def _image_condition(self, ids: list[int], video_seeds: list[int] | None) -> Condition:
        size = (self.height, self.width)
        keys = [(i, -1 if video_seeds is None else video_seeds[row], *size) for row, i in enumerate(ids)]
        for key in sorted({key for key in keys if key not in self._conditions}):
            assert isinstance(self.prompts, ImageBook)
            number, seed = key[:2]
            drawn = noise.normal([number if seed < 0 else seed], noise.CONDITIONING, (3, *size)).to(self.device)
            with torch.no_grad():  # one by one: rounding must not depend on which others happen to be new
                condition = self.model.encode_images([self.prompts.image(number)], drawn)  # type: ignore[attr-defined]
            self._conditions[key] = {name: values[0].to(self.device) for name, values in condition.items()}
        found = self._gather(keys)
        for key in keys:  # the latest used come last, so that the longest unused are forgotten first
            self._conditions[key] = self._conditions.pop(key)
        kept = [key for key in self._conditions if isinstance(key, tuple)]
        for key in kept[: max(0, len(kept) - max(MAX_IMAGE_CONDITIONS, len(keys)))]:
            del self._conditions[key]
        return found

    def _embed(self, number: int, text: str) -> None:
        """One text at a time: rounding must not depend on which others happen to be new, as after a restart."""
        with torch.no_grad():
            condition = self.model.encode_prompts([text])
        self._conditions[number] = {name: values[0].to(self.device) for name, values in condition.items()}

    def _gather(self, keys: Sequence[Any]) -> Condition:
        rows = [self._conditions[key] for key in keys]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _numbers(given: Tensor | Sequence[int]) -> list[int]:
    return on_host(given).tolist() if isinstance(given, Tensor) else [int(number) for number in given]


def _edits(video: Tensor) -> int:
    """How often a tensor was changed in place, as far as torch counts it (not under `torch.inference_mode`)."""
    return 0 if video.is_inference() else video._version


def check_prompts(model: VideoModel, prompts: PromptBook) -> bool:
    """Whether the model animates images.

    Raises:
        ValueError: the prompts are of the other kind.
    """
    spec = model.spec
    on_images = getattr(spec, "conditioned_on", "text") == "image"
    if on_images and not isinstance(prompts, ImageBook):
        raise ValueError(
            f"{spec.name} animates images, but was given text prompts; give images=..., a folder or a list of files, "
            "PIL images or tensors [3,H,W] in [0,1]"
        )
    if not on_images and isinstance(prompts, ImageBook):
        raise ValueError(
            f"{spec.name} is conditioned on text alone, but was given images; give prompts=[...] (the texts of a "
            "set of images are list(images)), or take a model that animates images, such as 'SVD'"
        )
    return on_images
