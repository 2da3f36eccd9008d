"""Wan's blocks with fewer passes over their tokens; `vdm_env.models.fast_path` switches them on and off.

diffusers norms, modulates and gates in float32, one operation after the other, each of which reads and writes all
tokens in four bytes. Here a product and the sum after it are one operation. The numbers inside stay float32. Counted on
shapes, that is 52 bytes for 140 in bfloat16; on one core, in float32, a small network takes 0.98 of the time.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from vdm_env.models.fused import plus_product


def turns(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotary positions of tokens of that type as complex numbers [1,L,1,D/2], see `turned`.

    Of diffusers' cos and sin [1,L,1,D], which hold every number twice.
    """
    wide = torch.promote_types(torch.promote_types(dtype, cos.dtype), torch.float32)  # no complex numbers below
    return torch.complex(cos[..., 0::2].to(wide), sin[..., 1::2].to(wide))


class FastWanTransformerBlock(WanTransformerBlock):
    """Modulates and gates with `plus_product`.

    diffusers' own computes blocks whose images or timesteps come one for a token, and those of float64 networks, in
    which it rounds to float32 at places of its own.
    """

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Tokens [B,L,D] after the block, as in diffusers: text [B,T,D], temb [B,6,D]."""
        x, dtype = hidden_states, hidden_states.dtype
        if temb.ndim == 4 or self.attn2.add_k_proj is not None or dtype == torch.float64:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        table = self.scale_shift_table + temb.float()
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.chunk(6, dim=1)
        h = plus_product(shift_a, self.norm1(x.float()), 1 + scale_a, dtype)
        x = plus_product(x, self.attn1(h, None, None, rotary_emb), gate_a, dtype)
        x = x + self.attn2(self.norm2(x.float()).to(dtype), encoder_hidden_states, None, None)
        h = plus_product(shift_f, self.norm3(x.float()), 1 + scale_f, dtype)
        return plus_product(x, self.ffn(h), gate_f, dtype)
