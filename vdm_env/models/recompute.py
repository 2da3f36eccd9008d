"""Gradient checkpointing, layer by layer, of diffusers' `UNet3DConditionModel`, whose class has none, and of decoders.

With the switch on, each layer keeps its input alone and is computed anew in the backward pass, so that this holds the
activations of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def make_recomputable(unet: Any) -> None:
    """Gives a UNet3D the switch that diffusers' other networks have: `enable_gradient_checkpointing`, and `disable_`.

    Outputs and gradients stay what they were, dropout included: the recomputation draws the same numbers. The instance
    is changed, not its class, because pipelines and PEFT know it by that.
    """
    unet._supports_gradient_checkpointing = True
    unet.gradient_checkpointing = False
    unet.enable_gradient_checkpointing = MethodType(_enable, unet)
    unet.disable_gradient_checkpointing = MethodType(_disable, unet)


def _layers(network: nn.Module) -> Iterator[nn.Module]:
    # Late: the frame codec is imported with the package, and diffusers takes seconds.
    from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    layers = (ResnetBlock2D, TemporalConvLayer, Transformer2DModel, TransformerTemporalModel)
    return (module for module in network.modules() if isinstance(module, layers))


@contextmanager
def layers_recomputed(network: nn.Module, on: bool = True) -> Iterator[None]:
    """Calls of the network inside keep the inputs of its layers for the backward pass, and compute the rest anew."""
    if on:
        _switch_on(network)
    try:
        yield
    finally:
        if on:
            _switch_off(network)


def _enable(unet: Any) -> None:
    unet.gradient_checkpointing = True
    _switch_on(unet)


def _disable(unet: Any) -> None:
    unet.gradient_checkpointing = False
    _switch_off(unet)


def _switch_on(network: nn.Module) -> None:
    for layer in _layers(network):
        # The method is bound to the layer, so that a deep copy of the network is recomputed with its own weights.
        layer.forward = partial(_recomputed, MethodType(type(layer).forward, layer))  # type: ignore[method-assign]


def _switch_off(network: nn.Module) -> None:
    for layer in _layers(network):
        vars(layer).pop("forward", None)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if torch.is_grad_enabled():
        return checkpoint(forward, *arguments, use_reentrant=False, **options)
    return forward(*arguments, **options)
