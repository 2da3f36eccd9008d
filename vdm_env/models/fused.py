"""Element-wise work of transformer blocks in as few passes over memory as torch's own kernels allow.

On a GPU such work costs the bytes it moves. Numbers are those of the plain expressions but for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def turned(x: Tensor, by: Tensor) -> Tensor:
    """Rotary positions: neighbouring pairs of x [..., D] as complex numbers times `by` [..., D/2], in x's type.

    One product in the precision of `by` instead of four over halves of x, two sums and their interleaving.
    """
    pairs = x.to(by.dtype.to_real()).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * by).flatten(-2).to(x.dtype)


def plus_product(base: Tensor, x: Tensor, factor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum base + x factor, broadcast, computed in the widest of the three types and rounded once.

    Args:
        base, x, factor: real, of shapes that go together.
        dtype: of the result; None: the widest of the three.
    """
    three = (base, x, factor)
    wide = torch.promote_types(torch.promote_types(base.dtype, x.dtype), factor.dtype)
    if dtype in (None, wide):
        return torch.addcmul(*three)
    tracked = torch.is_grad_enabled() and any(one.requires_grad for one in three)
    if tracked or torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return torch.addcmul(*three).to(dtype)
    shape = torch.broadcast_shapes(*(one.shape for one in three))
    return torch.addcmul(*three, out=torch.empty(shape, dtype=dtype, device=base.device))  # rounds as it writes
