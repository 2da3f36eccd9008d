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
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from vdm_env.models.fast_wan import FastWanTransformerBlock, turns
from vdm_env.models.fused import turned
from vdm_env.models.low_rank import LeanLora

LARGE_PRODUCT = 2**21
"""Multiplications from which a linear layer on a CPU goes to oneDNN; below, calling it costs what it saves."""
LARGE_ADAPTED = 2**23
"""Multiplications from which the weights of a layer and of its adapter are added before the product."""
WIDE_AT_ONCE = 2**20
"""Numbers inside a feed-forward layer that a CPU computes together: 4 MB of float32, which stay in its caches."""
SCORES_AT_ONCE = 2**18
"""Scores of a short attention that are computed together: 1 MB, as a core's own cache."""
FEW_KEYS = 16
"""Keys from which a CPU's softmax is vector code: the floats of an AVX-512 register."""


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
        return product(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear layer x W^T + b, by oneDNN where that is faster."""
    large = x.ndim > 1 and x.numel() * len(weight) >= LARGE_PRODUCT
    if not large or not _goes_to_onednn(x, weight):
        return functional.linear(x, weight, bias)
    return _OneDnnProduct.apply(x, weight, bias)


def _goes_to_onednn(*tensors: Tensor) -> bool:
    if not HAS_ONEDNN or not _is_plain_float32_on_cpu(*tensors):
        return False  # and the products have no rules for `torch.func` and for forward mode:
    return not torch._C._are_functorch_transforms_active() and torch.autograd.forward_ad._current_level < 0


def _is_plain_float32_on_cpu(*tensors: Tensor) -> bool:
    """Whether this module's CPU paths may act; a compiler and autocast choose kernels of their own."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


class _AdaptedProduct(torch.autograd.Function):
    """x (W + U D)^T + b by oneDNN. Backwards U and D take thin products, and W + U D is made again, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, up, down)
        return torch.ops.mkldnn._linear_pointwise(x, torch.addmm(weight, up, down), bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight, up, down), wanted = gradients, ctx.saved_tensors, ctx.needs_input_grad
        rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        return (
            _OneDnnProduct.apply(gradient, torch.addmm(weight, up, down).t(), None) if wanted[0] else None,
            rows.t() @ inputs if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
            rows.t() @ (inputs @ down.t()) if wanted[3] else None,
            (rows @ up).t() @ inputs if wanted[4] else None,
        )


class FastLora(LeanLora):
    """A large adapted layer on a CPU: x (W + s B A)^T, one product instead of three and two passes over the output.

    Where there are rows enough that adding the weights costs less than it saves; which way a layer goes depends on
    shapes alone. Only in float32: in half precision a small s B A would be rounded away when it is added to W. Hooks
    of the layers inside are not called.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base, names = self.get_base_layer(), [name for name in self.active_adapters if name in self.lora_A]
        acts = bool(names) and not (self.disable_adapters or self.merged or args or kwargs)
        if not (acts and self._is_simple(names) and self._pays(x)):
            return super().forward(x, *args, **kwargs)
        weights = (each[name].weight for name in names for each in (self.lora_A, self.lora_B))
        if not _goes_to_onednn(x, base.weight, *weights):
            return super().forward(x)
        # One adapter of all that act, side by side: s B A + s' B' A' = (s B, s' B') (A, A')^T.
        up = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in names], dim=1)
        down = torch.cat([self.lora_A[name].weight for name in names])
        return _AdaptedProduct.apply(x, base.weight, base.bias, up, down)

    def _pays(self, x: Tensor) -> bool:
        large = x.ndim > 1 and x.numel() * self.out_features >= LARGE_ADAPTED
        wide = self.in_features * self.out_features
        return large and x.numel() // self.in_features * (self.in_features + self.out_features) >= wide


class FastFeedForward(FeedForward):
    """On a CPU outside training, some rows at a time: inner activations stay in the caches (0.3 times the time)."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = hidden_states.flatten(0, -2)
        at_once = max(1, WIDE_AT_ONCE // self.net[0].proj.out_features)
        if self.training or hidden_states.device.type != "cpu" or len(rows) <= at_once:
            return super().forward(hidden_states, *args, **kwargs)
        parts = [super(FastFeedForward, self).forward(part) for part in rows.split(at_once)]
        return torch.cat(parts).unflatten(0, hidden_states.shape[:-1])


# ---------------------------------------------------------------------------------------------------- short attention


def short_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention [B,heads,L,D] to few keys [B,heads,S,D] on a CPU, by plain products of some sequences at a time.

    PyTorch's softmax is scalar code for rows shorter than a vector register, also inside its fused attention: 8 ms of
    14 for 2048 x 8 heads of 8 frames. As maximum, exponential and sum it takes 2 ms; the whole attention takes 0.6 of
    the time, and 0.3 where 128 places look at 8 words.
    """
    at_once = max(1, SCORES_AT_ONCE // max(1, query.shape[1] * query.shape[2] * key.shape[2]))
    if len(query) > at_once:
        parts = zip(*(part.split(at_once) for part in (query, key, value)), strict=True)
        return torch.cat([short_attention(*part) for part in parts])
    rows, keys, values = (part.flatten(0, 1) for part in (query, key, value))
    scores = torch.baddbmm(rows.new_zeros(()), rows, keys.transpose(1, 2), beta=0, alpha=query.shape[-1] ** -0.5)
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return (torch.bmm(weights, values) / weights.sum(-1, keepdim=True)).unflatten(0, query.shape[:2])


def _is_short(query: Tensor, key: Tensor, value: Tensor) -> bool:
    few = 0 < key.shape[-2] < FEW_KEYS and query.shape[-2] > 0
    return few and _is_plain_float32_on_cpu(query, key, value)


# --------------------------------------------------------------------------------------------------- Wan's attention


class FastWanAttention(WanAttnProcessor):
    """Wan's attention with `turned`, and with `short_attention` to a short text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attn.add_k_proj is not None or attention_mask is not None or attn.fused_projections:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.unflatten(2, (attn.heads, -1))
            for projected in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(source)),
                attn.to_v(source),
            )
        )
        if rotary_emb is not None:
            by = turns(*rotary_emb, query.dtype)
            query, key = turned(query, by), turned(key, by)
        heads_first = [part.transpose(1, 2) for part in (query, key, value)]
        if self._attention_backend is None and _is_short(*heads_first):
            attended = short_attention(*heads_first).transpose(1, 2)
        else:
            attended = dispatch_attention_fn(
                query,
                key,
                value,
                backend=self._attention_backend,
                parallel_config=self._parallel_config if encoder_hidden_states is None else None,
            )
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))


# ------------------------------------------------------------------------------------------------ UNet3D's layers


class FastAttention(AttnProcessor2_0):
    """Attention without masks and norms of its own, short where it can be; the text's keys and values once for a video.

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
        if attention_mask is not None or not _is_simple(attn):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        queries, source = hidden_states, hidden_states
        if encoder_hidden_states is not None:
            source = encoder_hidden_states[::num_frames]
            queries = hidden_states.unflatten(0, (-1, num_frames)).flatten(1, 2)  # [B, F H W, C]
        query, key, value = (
            projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(queries), attn.to_k(source), attn.to_v(source))
        )
        attend = short_attention if _is_short(query, key, value) else functional.scaled_dot_product_attention
        attended = attend(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](attended)).reshape(hidden_states.shape)


def _is_simple(attn: Any) -> bool:
    """Whether a layer has none of the parts that diffusers' attention may have and UNet3D's has not."""
    parts = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
    return all(part is None for part in parts) and not attn.residual_connection and attn.rescale_output_factor == 1


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
    lora.Linear: FastLora,
    LeanLora: FastLora,
    FeedForward: FastFeedForward,
    WanAttnProcessor: FastWanAttention,
    WanTransformerBlock: FastWanTransformerBlock,
    AttnProcessor2_0: FastAttention,
    Transformer2DModel: FastTransformer2D,
    TransformerTemporalModel: FastTransformerTemporal,
}
_PLAIN = {changed: original for original, changed in _FAST.items()}  # of an adapter LeanLora, which stays by itself


def _parts(network: nn.Module) -> Iterator[Any]:
    for module in network.modules():
        yield module
        if hasattr(module, "processor"):
            yield module.processor


def fast(network: nn.Module) -> nn.Module:
    """Switches the fast path of a `UNet3DConditionModel` or `WanTransformer3DModel` on, in place; twice does no harm.

    Adapters that were added since the last call are plain until the next one, see `keep_fast`.

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
    _switch(network)
    return network


def _switch(network: nn.Module) -> None:
    for part in _parts(network):
        part.__class__ = _FAST.get(type(part), type(part))


def keep_fast(network: nn.Module) -> None:
    """Switches the fast path on in layers that were added since `fast`; nothing in a network without it.

    A network may hold several that `fast` knows, as `vdm_env.models.wan.WanExperts` does.
    """
    if any(type(part) in _PLAIN for part in _parts(network)):
        _switch(network)


def plain(network: nn.Module) -> nn.Module:
    """Takes `fast` back, in place: layers are diffusers' again, adapters as `lean` left them. Returns the network."""
    for part in _parts(network):
        part.__class__ = _PLAIN.get(type(part), type(part))
    return network


def shares_text(network: Any) -> bool:
    """Whether the network takes `num_frames` among its `cross_attention_kwargs`, see `FastAttention`."""
    return isinstance(network, UNet3DConditionModel) and type(network.transformer_in) is FastTransformerTemporal
