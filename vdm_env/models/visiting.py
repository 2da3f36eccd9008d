"""Networks that rest in main memory and are on the accelerator only while they are needed: text encoders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import nn

_VISITORS: WeakSet[nn.Module] = WeakSet()
"""Encoders that are on their device for now."""


def resting_place(device: torch.device | str) -> str:
    """Where an encoder of a model on this device rests: main memory, or nowhere if the model has shapes alone."""
    return "meta" if torch.device(device).type == "meta" else "cpu"


@contextmanager
def visiting(encoder: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the encoder is on the device; afterwards it rests where it did before: in main memory.

    A visit inside a visit moves nothing.
    """
    if encoder in _VISITORS:
        yield
        return
    _VISITORS.add(encoder)
    home = next(encoder.parameters()).device
    try:
        encoder.to(device)
        yield
    finally:
        _VISITORS.discard(encoder)
        encoder.to(str(home))
