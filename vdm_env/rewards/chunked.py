"""Any reward, a few videos at a time: less memory, the same scores.

Under gradients the graphs of all chunks are kept together, and chunks alone save nothing; with `recompute` each chunk
is scored anew on the way back, and memory is that of one chunk, for about a third more time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vdm_env.rewards.base import FramePolicy, Reward, ScoreFunction, as_reward, check_inputs, score_parts


class Chunked:
    """A reward that sees `chunk` videos at a time.

    The scores are those of the reward itself, up to rounding. Name, frames, range and gradients are the reward's.

    Args:
        reward: the reward, or a plain function.
        chunk: videos at a time.
        recompute: under gradients, score every chunk again on the way back instead of keeping its graph.

    Raises:
        ValueError: chunk is below 1, or recomputing is asked of a reward without gradients.
    """

    def __init__(self, reward: Reward | ScoreFunction, chunk: int, *, recompute: bool = False) -> None:
        reward = as_reward(reward)
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk={chunk!r}: expected a number of videos, at least 1")
        if recompute and not reward.differentiable:
            raise ValueError(f"reward {reward.name!r} has no gradients, so recompute=True saves nothing; leave it out")
        self.reward, self.chunk, self.recompute = reward, chunk, recompute
        self.name, self.differentiable = reward.name, reward.differentiable
        self.frames: FramePolicy = reward.frames
        self.range = reward.range

    def check_num_frames(self, count: int) -> None:
        """Raises ValueError where the reward cannot score a video of that many frames."""
        if hasattr(self.reward, "check_num_frames"):
            self.reward.check_num_frames(count)

    def _scored(self, video: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.recompute and torch.is_grad_enabled() and video.requires_grad:
            scored: Any = checkpoint(score_parts, self.reward, video, prompts, use_reentrant=False)
            return scored
        return score_parts(self.reward, video, prompts)

    def score_parts(self, video: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The scores [B] and what they are made of, {name: [B]}, as the reward gives them."""
        check_inputs(video, prompts, self.name)
        starts: Iterable[int] = range(0, len(video), self.chunk)
        chunks = [self._scored(video[i : i + self.chunk], prompts[i : i + self.chunk]) for i in starts]
        names = chunks[0][1]
        return torch.cat([c[0] for c in chunks]), {name: torch.cat([c[1][name] for c in chunks]) for name in names}

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        return self.score_parts(video, prompts)[0]
