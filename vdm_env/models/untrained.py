"""Untrained networks, drawn from a seed: in their number format from the start, so that none exists twice.

A T5-XXL encoder takes 19 GB in float32 and 9.5 GB in bfloat16. Built in float32 and cast, it would need the former for
a moment; here every parameter is cast when its layer is made, and what is drawn into it afterwards is drawn in float32
and rounded, one tensor at a time. So the same seed gives the same weights in every format, up to rounding. Buffers
(tables of angles and positions) are made as their classes make them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

_DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
_HALF = (torch.bfloat16, torch.float16)


class _DrawnInFloat32(TorchDispatchMode):
    """Numbers drawn into a tensor of half precision are those that a float32 tensor would get, rounded."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func not in _DRAWS or args[0].dtype not in _HALF:
            return func(*args, **options)
        drawn = func(torch.empty_like(args[0], dtype=torch.float32), *args[1:], **options)
        return args[0].copy_(drawn)


@contextmanager
def seeded(seed: int, device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Networks made inside are drawn from `seed`, on `device`; the global generators are left as they were.

    In half precision that goes for modules of other threads too: torch's hook is the process's.

    Args:
        seed: of all numbers drawn inside.
        device: of what is made inside; "meta" draws nothing.
        dtype: in half precision, parameters have it from the start. In float32 and float64 they are drawn in float32;
            casting them is left to the caller.
    """
    device = torch.device(device)

    def cast(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.dtype != torch.float32:
            return None
        return nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(device)
        if dtype in _HALF:
            hook = register_module_parameter_registration_hook(cast)  # type: ignore[arg-type]
            stack.callback(hook.remove)
            stack.enter_context(_DrawnInFloat32())
        torch.manual_seed(seed)
        yield
