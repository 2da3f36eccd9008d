"""LoRA layers in a bfloat16 network's own precision: two small products, and no copy of anything in float32.

PEFT keeps LoRA weights in float32 and takes the layer's input there too: y + s B(A(x)) is then a float32 copy of x for
each adapted layer, which autograd keeps, and four passes over float32 copies of y. Here A and B are rounded to bfloat16
for the products, as autocast does, while the weights that are trained stay float32:

    y' = y + s (x A^T) B^T        x, y, A, B in bfloat16, sums inside the products in float32

What is kept for the backward pass is x itself, once for all layers that read it, and x A^T. Results differ from PEFT's
in the rounding of A, B and x A^T; gradients reach A and B in their own type.

float16 stays PEFT's: the gradient that goes back into x A^T is s g B, which for a young adapter is below the smallest
number of float16, and A would not learn.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional


class LeanLora(LoraLinear):
    """PEFT's layer, computed as the module says where its input is in bfloat16."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        acts = not (self.disable_adapters or self.merged or kwargs) and self._is_simple(names)
        if not acts or x.dtype != torch.bfloat16 or x.ndim < 2:
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
        return all(
            name not in self.lora_variant
            and not self.lora_bias.get(name)
            and isinstance(self.lora_dropout[name], nn.Identity)
            for name in names
        )


def lean(network: nn.Module) -> nn.Module:
    """Switches all LoRA layers of linear layers that a network has, in place; returns it. Names and weights stay."""
    for module in network.modules():
        if type(module) is LoraLinear:
            module.__class__ = LeanLora
    return network
