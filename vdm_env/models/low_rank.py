"""LoRA layers in the network's own half precision: two small products, and no copy of anything in float32.

PEFT keeps LoRA weights in float32 and takes the layer's input there too: y + s B(A(x)) is then a float32 copy of x for
each adapted layer, which autograd keeps, and four passes over float32 copies of y. Here A and B are rounded to the
network's type for the products, as autocast does, while the weights that are trained stay float32:

    y' = y + s (x A^T) B^T        x, y, A, B in the network's type, sums inside the products in float32

What is kept for the backward pass is x itself, once for all layers that read it, and x A^T. Results differ from PEFT's
in the rounding of A, B and x A^T; gradients reach A and B in their own type.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional

_HALF = (torch.float16, torch.bfloat16)


class LeanLora(LoraLinear):
    """PEFT's layer, computed as the module says where its input is in half precision and its weights are not."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or kwargs or x.dtype not in _HALF or not self._is_simple(names):
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x, *args)
        if y.dtype != x.dtype:
            return super().forward(x, *args)
        for name in names:
            low = functional.linear(x, self.lora_A[name].weight.to(x.dtype))
            up = self.lora_B[name].weight.to(x.dtype).t()
            y = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), up, alpha=self.scaling[name]).view(y.shape)
        return y

    def _is_simple(self, names: list[str]) -> bool:
        """Whether these adapters are a product of two matrices each, and nothing else."""
        return not any(
            name in self.lora_variant or self.lora_bias[name] or not isinstance(self.lora_dropout[name], nn.Identity)
            for name in names
        )


def lean(network: nn.Module) -> nn.Module:
    """Switches all LoRA layers of linear layers that a network has, in place; returns it. Names and weights stay."""
    for module in network.modules():
        if type(module) is LoraLinear:
            module.__class__ = LeanLora
    return network
