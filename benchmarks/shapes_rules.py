"""What one operation of torch moves and computes, from the shapes of its tensors. See `benchmarks.shapes`."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

GRAIN = 512
"""Bytes: torch's allocator of a card hands out whole multiples of it."""
KINDS = ("products", "convolutions", "attention", "norms", "copies", "element-wise")
_NAMED = (
    ("attention", ("scaled_dot_product", "flash_attn", "efficient_attention")),
    ("convolutions", ("convolution", "conv_depthwise")),
    ("norms", ("group_norm", "layer_norm", "batch_norm", "rms_norm")),
    ("products", ("addmm", "bmm", "mm", "linear", "addbmm", "baddbmm", "mv", "dot")),
    (
        "copies",
        ("clone", "copy_", "_to_copy", "cat", "stack", "repeat", "index", "constant_pad", "slice_backward", "flip")
        + ("roll", "embedding", "gather", "upsample_nearest", "select_backward", "slice_scatter", "contiguous"),
    ),
)
_FREE = ("empty", "_local_scalar_dense", "is_nonzero", "device", "set_", "resize_", "new_empty")
_PICKS = ("index.Tensor", "embedding.", "gather.", "index_select.")
_FILLS = ("copy_", "fill_", "zero_", "normal_", "uniform_", "zeros", "ones", "full")


def block(size: int) -> int:
    """Bytes that the allocator hands out for so many."""
    return -(-size // GRAIN) * GRAIN


def tensors(values: Any) -> list[Tensor]:
    """All tensors in some arguments or results."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def kind_of(name: str) -> str:
    """Which of `KINDS` an operation is, by its name such as "aten.addmm.default"."""
    base = name.partition(".")[2].partition(".")[0]
    for kind, words in _NAMED:
        exact = kind == "products"
        if base in words if exact else any(word in base for word in words):
            return kind
    return "element-wise"


def extent(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor shows; those it repeats by a stride of 0 count once."""
    shown = prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return shown * tensor.element_size()


def _storages(values: Iterable[Tensor]) -> set[int]:
    return {value.untyped_storage()._cdata for value in values}


def written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors among the arguments that the operation changes in place."""
    changed = []
    for number, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
            changed += tensors(value)
    return changed


def moved(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that have to be read and written, each tensor once; 0 for views and for memory that is only reserved."""
    name = str(function)
    base = name.partition(".")[2].partition(".")[0]
    if base.startswith(_FREE):
        return 0
    inputs, outputs, changed = tensors((args, kwargs)), tensors(result), written(function, args, kwargs)
    if not changed and outputs and _storages(outputs) <= _storages(inputs):
        return 0
    made = sum(map(extent, changed)) if changed else sum(map(extent, outputs))
    if any(pick in name for pick in _PICKS):
        return 2 * made
    outs = [kwargs.get(one.name) for one in function._schema.arguments if one.is_out]
    skipped = {id(value) for value in (changed if base.startswith(_FILLS) else tensors(outs))}
    read = {id(value): extent(value) for value in inputs if id(value) not in skipped}
    return made + sum(read.values())


def flops_of(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Floating-point operations by torch's own formulas (products, convolutions, attention); 0 for all others."""
    formula = flop_registry.get(function._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _dense(tensor: Tensor) -> bool:
    """Whether a convolution takes the layout as it is: contiguous, or channels last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    return tensor.is_contiguous() or (last is not None and tensor.is_contiguous(memory_format=last))


def copied_inside(kind: str, args: Any) -> int:
    """Bytes of copies that a convolution makes of activations in a layout that it cannot take."""
    if kind != "convolutions":
        return 0
    return sum(2 * extent(value) for value in tensors(args[:2]) if not _dense(value))


def turned_inside(kind: str, args: Any, result: Any) -> int:
    """Bytes that cuDNN moves to turn half-precision tensors to channels last and back, for its tensor cores.

    An assumption about the kernels that it picks: what lies in channels last already is not turned.
    """
    if kind != "convolutions":
        return 0
    some = [value for value in tensors((args[:3], result)) if value.ndim > 3 and value.dtype.itemsize == 2]
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    return sum(
        2 * extent(value)
        for value in some
        if value.ndim in last and not value.is_contiguous(memory_format=last[value.ndim])
    )
