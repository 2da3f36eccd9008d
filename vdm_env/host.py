"""Small numbers that the host and an accelerator both need, such as steps, seeds and prompt ids.

To read a tensor of an accelerator the host waits until everything before it is computed, and the accelerator is idle
afterwards until the host has caught up. So what the host knows already goes over without a wait, and is remembered: it
need not be read back. On the CPU `upload` and `on_host` return the tensor itself, and `shared` a copy.

Changes in place are noticed, but for those that PyTorch does not count: writes through `.data`, and what a collective
of torch.distributed receives. Make a new tensor of those (`clone`) before the environment sees it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KNOWN = WeakTensorKeyDictionary()
"""Tensors of accelerators: (how often they were changed in place, their values on the CPU)."""


def upload(values: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`values.to(device, dtype)`, without a wait where they come from the CPU."""
    # Only from there: the other way `non_blocking` returns memory that is not filled yet.
    return values.to(device, dtype or values.dtype, non_blocking=values.device.type == "cpu")


def shared(values: Tensor, device: torch.device | str) -> Tensor:
    """A copy of values on the CPU, on the device, of which `on_host` knows them. They must not be changed."""
    there = values.to(device, non_blocking=True, copy=True)
    if there.device.type != "cpu" and not there.is_inference():  # changes of those are not counted
        _KNOWN[there] = there._version, values
    return there


def on_host(values: Tensor) -> Tensor:
    """The values on the CPU, not to be changed; without a wait where `shared` or `take` made the tensor."""
    return _KNOWN[values][1] if _known(values) else values.detach().cpu()


def joined(*parts: Tensor) -> Tensor:
    """`torch.cat(parts)`, of which the host knows what it knew of all parts."""
    if parts[0].device.type == "cpu" or not all(_known(part) for part in parts):
        return torch.cat(parts)
    return shared(torch.cat([on_host(part) for part in parts]), parts[0].device)


def take(obs: Mapping[str, Tensor], rows: Tensor | slice) -> dict[str, Tensor]:
    """Rows of each tensor, so that the host goes on knowing what it knows; a tensor of rows lies on the CPU."""
    taken = {}
    for name, values in obs.items():
        if _known(values):
            taken[name] = shared(on_host(values)[rows], values.device)
        else:
            taken[name] = values[rows if isinstance(rows, slice) else upload(rows, values.device)]
    return taken


def _known(values: Tensor) -> bool:
    return values in _KNOWN and _KNOWN[values][0] == values._version
