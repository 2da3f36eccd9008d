"""Flow-matching transformers over five-dimensional latents (Wan and its relatives).

These networks emit the flow eps - x0 and are told t = 1000 sigma, which are this package's conventions already.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vdm_env.models.base import Condition


def call_wan(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Wan 2.1's `WanTransformer3DModel`; latents [B,C,F,H,W], t [B] in [0, 1000]."""
    dtype: Any = denoiser.dtype  # of the network as a whole: diffusers keeps norms and time embedding in float32
    output = denoiser(
        hidden_states=x_t.to(dtype), timestep=t, encoder_hidden_states=condition["text"].to(dtype), return_dict=False
    )[0]
    return output.to(x_t.dtype)
