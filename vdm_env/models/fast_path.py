"""The same networks in fewer and larger operations: a switch for diffusers' UNet3D and Wan transformers.

`fast(network)` changes how some layers compute and `plain(network)` takes that back; weights, names and numbers stay
(float64 to 1e-12, lower types to their rounding, because sums are taken in another order). A layer is changed by
giving it a subclass of its own class: pipelines, PEFT, deep copies and `vdm_env.models.recompute` know it as what it
was. What was measured, on one core of an AMD EPYC in float32, stands with each change; on a GPU nothing was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet3DConditionModel, WanTransformer3DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel, TransformerTemporalModelOutput
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

LARGE_PRODUCT = 2**21
"""Multiplications from which a linear layer on a CPU goes to oneDNN; below, calling it costs what it saves."""
WIDE_AT_ONCE = 2**20
"""Numbers inside a feed-forward layer that a CPU computes together: 4 MB of float32, which stay in its caches."""


# ------------------------------------------------------------------------------------------------------ linear layers


class _OneDnnProduct(torch.autograd.Function):
    """x W^T + b by oneDNN, which takes 0.4 times as long as MKL on an AMD processor (4096 x 128 x 128: 0.6 ms to 1.6).

    PyTorch's own linear layer has that only for lower precisions. Forward and backward take the same kernel with and
    without gradients, so that a policy's log-probabilities are the same in rollout and update.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # frozen layers do not keep their input
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        return (
            _OneDnnProduct.apply(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None,
            rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _product_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * int(torch.Size(x).numel()) * int(weight[0])


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
if HAS_ONEDNN:  # `FlopCounterMode` would count nothing for an operation it does not know
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_product_flops)


class FastLinear(nn.Linear):
    """A linear layer whose large float32 products on a CPU are oneDNN's."""

    def forward(self, x: Tensor) -> Tensor:
        if not (HAS_ONEDNN and x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32):
            return super().forward(x)
        if x.numel() * self.out_features < LARGE_PRODUCT or x.ndim < 2:
            return super().forward(x)
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):  # both choose kernels of their own
            return super().forward(x)
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            return super().forward(x)  # the product has no rule for `torch.func` and for forward mode
        return _OneDnnProduct.apply(x, self.weight, self.bias)


class FastFeedForward(FeedForward):
    """On a CPU outside training, some rows at a time: inner activations stay in the caches (0.3 times the time)."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = hidden_states.flatten(0, -2)
        at_once = max(1, WIDE_AT_ONCE // self.net[0].proj.out_features)
        if self.training or hidden_states.device.type != "cpu" or len(rows) <= at_once:
            return super().forward(hidden_states, *args, **kwargs)
        parts = [super(FastFeedForward, self).forward(part) for part in rows.split(at_once)]
        return torch.cat(parts).unflatten(0, hidden_states.shape[:-1])


# --------------------------------------------------------------------------------------------------- Wan's attention


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: pairs of neighbours of x [B,L,heads,D] as complex numbers times cos + i sin, [1,L,1,D] each.

    One pass over x instead of eight over halves of it; the same products and sums.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)  # no complex numbers below
    angles = torch.complex(cos[..., 0::2].to(wide), sin[..., 1::2].to(wide))
    turned = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2))) * angles
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class FastWanAttention(WanAttnProcessor):
    """Wan's attention with `rotate`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if rotary_emb is None or encoder_hidden_states is not None or attn.fused_projections:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query, key, value = (
            projected.unflatten(2, (attn.heads, -1))
            for projected in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(hidden_states)),
                attn.to_v(hidden_states),
            )
        )
        attended = dispatch_attention_fn(
            rotate(query, *rotary_emb),
            rotate(key, *rotary_emb),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))


# ------------------------------------------------------------------------------------------------ UNet3D's layers


class FastAttention(AttnProcessor2_0):
    """Attention to a text that is the same for all frames of a video: its keys and values are made once for a video.

    UNet3D repeats the text for every frame; `num_frames`, which arrives by `cross_attention_kwargs`, says how often.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        num_frames: int = 1,
    ) -> Tensor:
        if encoder_hidden_states is None or num_frames == 1 or attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        videos = hidden_states.unflatten(0, (-1, num_frames)).flatten(1, 2)  # [B, F H W, C]
        attended = super().__call__(attn, videos, encoder_hidden_states[::num_frames])
        return attended.reshape(hidden_states.shape)


class FastTransformer2D(Transformer2DModel):
    """Adds its residual to a view instead of a copy in another layout."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        linear = self.use_linear_projection
        hidden_states = self.proj_out(hidden_states) if linear else hidden_states
        pictures = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return residual + (pictures if linear else self.proj_out(pictures))  # in the layout of the first, the residual


class FastTransformerTemporal(TransformerTemporalModel):
    """Adds its residual to a view instead of a copy in another layout."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        frames = hidden_states.unflatten(0, (-1, num_frames))  # [B,F,C,H,W]
        batch, _, _, height, width = frames.shape
        tokens = self.norm(frames.transpose(1, 2)).permute(0, 3, 4, 2, 1).flatten(0, 2)  # [B H W, F, C]
        tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(
                tokens,
                encoder_hidden_states=encoder_hidden_states,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )
        tokens = self.proj_out(tokens).unflatten(0, (batch, height, width))
        output = (frames + tokens.permute(0, 3, 4, 1, 2)).flatten(0, 1)
        return TransformerTemporalModelOutput(sample=output) if return_dict else (output,)


# --------------------------------------------------------------------------------------------------------- the switch

_FAST: dict[type, type] = {
    nn.Linear: FastLinear,
    FeedForward: FastFeedForward,
    WanAttnProcessor: FastWanAttention,
    AttnProcessor2_0: FastAttention,
    Transformer2DModel: FastTransformer2D,
    TransformerTemporalModel: FastTransformerTemporal,
}
_PLAIN = {changed: original for original, changed in _FAST.items()}


def _parts(network: nn.Module) -> Iterator[Any]:
    for module in network.modules():
        yield module
        if hasattr(module, "processor"):
            yield module.processor


def fast(network: nn.Module) -> nn.Module:
    """Switches the fast path of a `UNet3DConditionModel` or `WanTransformer3DModel` on, in place; twice does no harm.

    Adapters that were added since the last call have plain linear layers until the next one.

    Returns:
        the same network.

    Raises:
        TypeError: a network of another class.
    """
    if not isinstance(network, UNet3DConditionModel | WanTransformer3DModel):
        raise TypeError(
            f"no fast path for {type(network).__name__}, only for UNet3DConditionModel and WanTransformer3DModel; "
            "use it as it is"
        )
    for part in _parts(network):
        part.__class__ = _FAST.get(type(part), type(part))
    return network


def plain(network: nn.Module) -> nn.Module:
    """Takes `fast` back, in place: every layer is diffusers' again. Returns the same network."""
    for part in _parts(network):
        part.__class__ = _PLAIN.get(type(part), type(part))
    return network


def shares_text(network: Any) -> bool:
    """Whether the network takes `num_frames` among its `cross_attention_kwargs`, see `FastAttention`."""
    return isinstance(network, UNet3DConditionModel) and type(network.transformer_in) is FastTransformerTemporal
