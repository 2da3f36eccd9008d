"""Gradient checkpointing for diffusers' `UNet3DConditionModel`, whose class has none.

With the switch on, each layer keeps its input alone and is computed anew in the backward pass, so that this holds the
activations of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import nn
from torch.utils.checkpoint import checkpoint

_LAYERS = (ResnetBlock2D, TemporalConvLayer, Transformer2DModel, TransformerTemporalModel)


def make_recomputable(unet: Any) -> None:
    """Gives a UNet3D the switch that diffusers' other networks have: `enable_gradient_checkpointing`, and `disable_`.

    Outputs and gradients stay what they were, dropout included: the recomputation draws the same numbers. The instance
    is changed, not its class, because pipelines and PEFT know it by that.
    """
    unet._supports_gradient_checkpointing = True
    unet.gradient_checkpointing = False
    unet.enable_gradient_checkpointing = MethodType(_enable, unet)
    unet.disable_gradient_checkpointing = MethodType(_disable, unet)


def _layers(unet: nn.Module) -> Iterator[nn.Module]:
    return (module for module in unet.modules() if isinstance(module, _LAYERS))


def _enable(unet: Any) -> None:
    unet.gradient_checkpointing = True
    for layer in _layers(unet):
        # The method is bound to the layer, so that a deep copy of the network is recomputed with its own weights.
        layer.forward = partial(_recomputed, MethodType(type(layer).forward, layer))  # type: ignore[method-assign]


def _disable(unet: Any) -> None:
    unet.gradient_checkpointing = False
    for layer in _layers(unet):
        vars(layer).pop("forward", None)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if torch.is_grad_enabled():
        return checkpoint(forward, *arguments, use_reentrant=False, **options)
    return forward(*arguments, **options)
