"""A small value function of the state, for the algorithms of outside libraries that want one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PROMPT_WIDTH = 8


class StateValue(nn.Module):
    """V(x_k, k, prompt): two layers over a few numbers of the state, not another network over videos.

    It sees each latent channel's mean and standard deviation, the place k / S on the grid and an embedding of the
    prompt's number. The last layer starts at 0, so V = 0 at first: give it rewards of mean 0 and unit scale.

    Args:
        env: has `mdp.latent_shape`, `mdp.dtype`, `num_steps`, `prompts` and `device`.
        width: hidden units.
        seed: of the initial weights; the global random state is left alone.
    """

    def __init__(self, env: Any, *, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.num_steps = env.num_steps
        generator = torch.Generator().manual_seed(seed)
        inputs = 2 * env.mdp.latent_shape[0] + 1 + _PROMPT_WIDTH
        # skip_init: the layers would draw their first weights from the global random state
        self.prompt = nn.utils.skip_init(nn.Embedding, len(env.prompts), _PROMPT_WIDTH)
        self.hidden = nn.utils.skip_init(nn.Linear, inputs, width)
        self.value = nn.utils.skip_init(nn.Linear, width, 1)
        with torch.no_grad():
            self.prompt.weight.normal_(generator=generator)
            nn.init.xavier_uniform_(self.hidden.weight, generator=generator)
            for zero in (self.hidden.bias, self.value.weight, self.value.bias):
                zero.zero_()
        self.to(env.device, env.mdp.dtype)

    def forward(self, latents: Tensor, step: Tensor, prompt_id: Tensor) -> Tensor:
        """Values [..., 1] of latents [..., C, F, H, W], denoising steps [...] and prompt numbers [...]."""
        place = (step / self.num_steps).to(latents)[..., None]
        std, mean = torch.std_mean(latents.flatten(-3), dim=-1, correction=0)
        features = torch.cat([mean, std, place, self.prompt(prompt_id)], -1)
        return self.value(self.hidden(features).tanh())
