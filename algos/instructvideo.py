"""InstructVideo: reward gradients while editing given videos (Yuan et al. 2023, arXiv:2312.12490).

    x_tau = add_noise(encode(video), eps + 0.1 eps_frame, t_tau)        the 12th step from the end of 20
    x_0   = steps tau..S-1 of the sampler, the last one with a graph
    L     = mean_B ( 1 - mean_n c_f r(frame_f of x_0, prompt) ),   c_f = exp(-lambda |f - F//2|)

Videos are not made from noise but from videos, noised part of the way: cheaper than a whole chain, and close to real
ones. The reward looks at single frames, one random frame from each of n equal segments (segmental video reward), and
frames far from the middle count less (temporally attenuated reward), because a frame-wise reward pulls all frames alike
and would stop their motion. The reward must be one that can score a video of one frame: HPS, PickScore, Aesthetic.

The videos are the user's (`algos.video_set`); without any, the untrained model's own samples of the env's prompts.

Settings are those of the released configuration (ali-vilab/VGen). Published sampling is DDIM with 20 steps and eta 0,
guidance 3: make the env with `num_steps=20, noise_level=0.0`. The env's `decode_frames` is not used.

Differences from the released code: where n does not divide F, its segments are F // n frames long and the last frames
are never seen; here the segments are equal and cover the video (`selection="first"` is its other choice, the first
frame of each, and keeps that). Its coefficients are not normalised and the reward therefore shrinks as lambda
grows; that is published and the default, `normalise=True` mends it. Its fp16 and gradient scaler are not here.

Legend: B = env.num_envs videos of one batch, S = env.num_steps, F frames of a video, n = segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from algos import distributed, losses
from algos.reward_checks import check_differentiable, check_graph, check_one_clip
from algos.training import (
    adamw,
    check_choice,
    check_not_negative,
    check_positive,
    num_batches,
    optimiser_step,
    pick_preset,
    reward_metrics,
    start_stream,
)
from algos.video_set import VideoSet, order
from vdm_env import noise
from vdm_env.rewards.base import Reward, score_parts, select_frames

Selection = Literal["tsn", "first"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructVideoConfig:
    """Defaults: the released configuration's, for ModelScope with LoRA of rank 4 (betas, eps and clipping: torch's)."""

    learning_rate: float = 1e-5
    """of AdamW, constant"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 0.0
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    max_grad_norm: float = 1.0
    """L2 norm the gradient is clipped to"""
    start_fraction: float = 0.6
    """part of the chain that is run, in (0, 1]; rounded to whole steps"""
    backprop_steps: int = 1
    """last steps with a graph"""
    offset_noise: float = 0.1
    """strength of the noise that all cells of a latent frame and channel share; 0: plain noise"""
    segments: int = 4
    """n, frames that are scored, 1..F"""
    selection: Selection = "tsn"
    """a random frame of each segment, or the "first" """
    attenuation: float = 1.0
    """lambda of c_f; 0: all frames count alike"""
    normalise: bool = False
    """divide the c_f of a video by their mean"""
    videos_per_update: int = 2
    """videos whose gradients are accumulated for one optimiser step (released: 2 a GPU); a multiple of env.num_envs"""
    seed: int = 0
    """of the env's stream, of the order of the given videos, of frames and noise"""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps", "max_grad_norm", "start_fraction")
        check_positive(self, "backprop_steps", "segments", "videos_per_update")
        check_not_negative(self, "weight_decay", "offset_noise", "attenuation")
        check_choice(self, "selection", Selection)
        if self.start_fraction > 1:
            raise ValueError(f"InstructVideoConfig.start_fraction is {self.start_fraction}, expected at most 1")

    @classmethod
    def preset(cls, model: str) -> InstructVideoConfig:
        """Settings for a model by name; a starting point that was not tuned.

        Raises:
            ValueError: there are none for this model.
        """
        settings = cls(learning_rate=1e-3, videos_per_update=64)
        presets = {"MovingShapes": settings, "MovingShapesUNet": settings}
        return pick_preset(presets, model)


def choose_frames(video_seeds: Tensor, num_frames: int, segments: int, selection: Selection = "tsn") -> Tensor:
    """Frames [B,n] that are scored, int64 on the CPU, ascending.

    Args:
        video_seeds: [B], keys of the random choice.
        num_frames: F.
        segments: n, 1..F.
        selection: "tsn" draws one frame of each of n equal segments (Wang et al. 2016, arXiv:1608.00859); "first" is
            frames 0, F//n, 2 (F//n), ...
    """
    if selection == "first":
        return (torch.arange(segments) * (num_frames // segments)).expand(len(video_seeds), segments)
    seeds = video_seeds.tolist()
    chosen = [select_frames(f"tsn{segments}", num_frames, noise.generator_for(s, noise.FRAMES)) for s in seeds]
    return torch.stack(chosen)


def score_frames(reward: Reward, video: Tensor, prompts: list[str]) -> Tensor:
    """Scores [B,n] of the frames of video [B,n,3,H,W], each taken as a video of one frame with its video's prompt."""
    count = video.shape[1]
    texts = [text for text in prompts for _ in range(count)]
    return score_parts(reward, video.flatten(0, 1).unsqueeze(1), texts)[0].unflatten(0, (len(video), count))


def _check_frame_wise(env: Any) -> None:
    """Scores one grey frame, not counted as a query; raises ValueError if the reward cannot."""
    mdp = env.mdp
    frame = torch.full((1, 1, 3, mdp.height, mdp.width), 0.5, device=mdp.device, dtype=mdp.dtype)
    try:
        with torch.no_grad():
            score_frames(mdp.reward, frame, [mdp.prompts[0]])
    except ValueError as error:
        raise ValueError(
            f"InstructVideo scores single frames, and the reward {mdp.reward.name!r} cannot ({error}); choose HPS, "
            f"PickScore or Aesthetic, or VADER, which scores whole videos"
        ) from error


class InstructVideo:
    """Reward fine-tuning by partial denoising of given videos.

    Args:
        env: vector env with a differentiable reward. With groups, the videos of a group start from the same given
            video and differ in their noise.
        policy: from `env.make_policy`; its trainable parameters are the ones that move.
        config: see `InstructVideoConfig`.
        videos: to start from, of the env's size; their texts join `env.prompts`. None: the untrained model's samples,
            made anew for each batch.

    Raises:
        ValueError: a reward without gradients or that cannot score one frame, an env of several clips, a part of the
            chain without steps or shorter than backprop_steps, more segments than frames, videos of another size or for
            a model that animates images, or videos_per_update that the env's batch does not divide.
    """

    def __init__(self, env: Any, policy: Any, config: InstructVideoConfig, videos: VideoSet | None = None) -> None:
        check_differentiable(env, "InstructVideo")
        check_one_clip(env, "InstructVideo")
        steps = round(config.start_fraction * env.num_steps)
        if steps < 1:
            raise ValueError(
                f"start_fraction={config.start_fraction:g} of {env.num_steps} denoising steps is less than one step; "
                f"set start_fraction to at least {1 / env.num_steps:.3g}"
            )
        if config.backprop_steps > steps:
            raise ValueError(
                f"backprop_steps is {config.backprop_steps}, but only the last {steps} of {env.num_steps} denoising "
                f"steps are run; set backprop_steps to at most {steps}, or a larger start_fraction"
            )
        if config.segments > env.mdp.num_frames:
            raise ValueError(
                f"segments is {config.segments}, but the videos have {env.mdp.num_frames} frames; set segments to at "
                f"most that many"
            )
        if videos is not None and getattr(env.mdp, "on_images", False):
            raise ValueError(
                "this env's model animates images, and the given videos come with texts; leave videos out, to start "
                "from the untrained model's own samples"
            )
        size = (env.mdp.num_frames, 3, env.mdp.height, env.mdp.width)
        if videos is not None and tuple(videos.videos.shape[1:]) != size:
            raise ValueError(
                f"the given videos are {tuple(videos.videos.shape[1:])} (frames, 3, height, width), the env's {size}; "
                f"bring them to that size, as algos.video_set.from_folder does"
            )
        _check_frame_wise(env)
        self.env, self.policy, self.config, self.videos = env, policy, config, videos
        self.start_step = env.num_steps - steps
        self.batches = num_batches(config.videos_per_update, env, "videos_per_update")
        self.parameters = policy.trainable_parameters()
        self.optimizer = adamw(self.parameters, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.videos_taken = 0
        start_stream(env, config.seed)  # from here on the env belongs to this algorithm

    def update(self) -> dict[str, float]:
        """Edits `videos_per_update` videos and takes one optimiser step.

        Returns:
            reward_mean, reward_std, reward_group_std_mean, zero_std_fraction (of the mean of a video's frame scores,
            not attenuated), attenuated_reward_mean, loss, grad_norm (before clipping), learning_rate.

        Raises:
            FloatingPointError: the gradient is not finite; nothing was changed.
            ValueError: the reward has no graph although it says that it is differentiable.
        """
        ranks = distributed.current()
        rewards, loss_sum = [], 0.0
        for _ in range(self.batches):
            score, coefficient = self._edit(self._start())
            check_graph(score, self.env)
            loss = losses.attenuated_one_minus(score, coefficient) / (self.batches * ranks.world)
            loss.backward()
            rewards.append(ranks.gather(score.detach().mean(1)))
            loss_sum += float(loss.detach())
        loss_sum = ranks.total(loss_sum)
        norm = optimiser_step(self.optimizer, self.parameters, self.config.max_grad_norm)
        return {
            **reward_metrics(torch.cat(rewards), self.env.group_size),
            "attenuated_reward_mean": 1 - loss_sum,
            "loss": loss_sum,
            "grad_norm": float(norm),
            "learning_rate": self.config.learning_rate,
        }

    @torch.no_grad()
    def _start(self) -> dict[str, Tensor]:
        """Observation of noised videos at the start step."""
        mdp, step, randn = self.env.mdp, self.start_step, distributed.current().randn
        clean, prompts = self._own() if self.videos is None else self._given(self.videos)
        eps, shared = (randn(clean.shape, self.generator) for _ in range(2))
        eps = eps + self.config.offset_noise * shared[..., :1, :1]
        t = mdp.base_table.timesteps[step].expand(len(clean))
        noised = mdp.add_noise(clean, eps.to(clean), t)
        return self.env.reset(options={"latents": noised, "step": step, **prompts})[0]

    def _given(self, videos: VideoSet) -> tuple[Tensor, dict[str, Any]]:
        """Clean latents [B,C,F,H,W] of the next given videos, and their texts, as a reset option."""
        ranks, size = distributed.current(), self.env.group_size
        count = self.env.num_envs // size * ranks.world
        index = order(len(videos), self.config.seed, self.videos_taken, count)
        self.videos_taken += count
        self.env.prompts.add([videos.prompts[i] for i in index])  # all of them: numbers are the same in all processes
        video, texts = videos.take(index[ranks.rows(count)])
        latents = self.env.mdp.encode(video.to(self.env.mdp.dtype)).to(self.env.mdp.dtype)
        return latents.repeat_interleave(size, dim=0), {"prompts": texts}

    def _own(self) -> tuple[Tensor, dict[str, Any]]:
        """Clean latents [B,C,F,H,W] that the untrained model makes, and their prompts, as a reset option."""
        mdp = self.env.mdp
        started = mdp.clock()
        with self.policy.reference():
            obs, _ = self.env.reset()
            for _ in range(self.env.num_steps - 1):
                obs, *_ = self.env.step(self.policy(obs))
            clean = mdp.step(obs["latents"], self.policy(obs), obs["step"])  # not env.step: nothing is to be scored
        mdp.counters.rollout_s += mdp.clock() - started
        return clean, {"prompt_ids": obs["prompt_id"].tolist()}

    def _edit(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Runs the rest of the chain: scores [B,n] of the chosen frames with their graph, and coefficients [B,n]."""
        c, mdp, steps = self.config, self.env.mdp, self.env.num_steps
        started = mdp.clock()
        for _ in range(self.start_step, steps - 1):
            with torch.set_grad_enabled(int(obs["step"][0]) >= steps - c.backprop_steps):
                obs, *_ = self.env.step(self.policy(obs))
        clean = mdp.step(obs["latents"], self.policy(obs), obs["step"])
        rolled_out = mdp.clock()
        frames = choose_frames(obs["video_seed"].cpu(), mdp.num_frames, c.segments, c.selection)
        video = mdp.decode(clean, frames)
        decoded = mdp.clock()
        score = score_frames(mdp.reward, video, [mdp.prompts[i] for i in obs["prompt_id"].tolist()])
        # The frames are scored one by one, so the env cannot do it; a video still counts as one query.
        counters = mdp.counters
        counters.rollout_s += rolled_out - started
        counters.decode_s += decoded - rolled_out
        counters.reward_s += mdp.clock() - decoded
        counters.videos_sampled += len(video)
        counters.reward_queries += len(video)
        counters.reward_backward_queries += len(video) if score.requires_grad else 0
        coefficient = losses.temporal_attenuation(frames, mdp.num_frames, c.attenuation, normalised=c.normalise)
        return score, coefficient.to(score)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, generator, given videos taken so far and the env's stream; the policy's weights apart."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "videos_taken": self.videos_taken,
            "env": self.env.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken, given the policy's weights of that moment and the videos."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.videos_taken = int(state["videos_taken"])
        self.env.load_state_dict(state["env"])
