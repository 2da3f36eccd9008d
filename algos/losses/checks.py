"""What the losses refuse: tensors whose shapes would broadcast into nonsense."""

from __future__ import annotations

from torch import Tensor


def check_vectors(**tensors: Tensor) -> None:
    """All are floating-point vectors [B] of one length, B >= 1: [B, 1] against [B] would broadcast silently."""
    expected: tuple[int, ...] | None = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} is {given}, expected a floating-point tensor [B]; convert it with .float()")
        if tensor.ndim != 1 or tensor.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [B] with B >= 1: one number per video")
        expected = expected or tuple(tensor.shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the others {expected}; pass vectors of one length"
            )


def check_videos(**tensors: Tensor) -> None:
    """All are floating-point tensors [B, ...] of one shape with at least two dimensions, B >= 1."""
    expected: tuple[int, ...] | None = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} is {given}, expected a floating-point tensor [B, ...]; convert it with .float()")
        shape = tuple(tensor.shape)
        if len(shape) < 2 or tensor.numel() == 0:
            raise ValueError(f"{name} has shape {shape}, expected [B, ...] with B >= 1, such as latents [B,C,F,H,W]")
        expected = expected or shape
        if shape != expected:
            raise ValueError(f"{name} has shape {shape}, the others {expected}; pass equal shapes")
