"""Running code on shapes alone: what lies in memory, and what every operation moves and computes.

Inside `Shapes` the code itself runs, with tensors on torch's meta device in place of a card's. Small tensors keep their
numbers beside them, so that steps, prompts and tables are what they are; of large ones nobody knows any. Code that asks
whether such numbers are finite hears yes, and code that wants one of them as a float gets 1.

Storages count as long as they live, each rounded up to the 512 bytes that torch's allocator of a card hands out.
Not counted, because only a card has it: workspaces inside kernels (cuDNN, cuBLAS, attention's backward), holes between
blocks, and the CUDA context.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.shapes_rules import block, copied_inside, flops_of, kind_of, moved, tensors, turned_inside, written

NUMBERS = 2**12
"""Elements up to which a tensor keeps its numbers."""
REAL = 2**20
"""Elements from which a new tensor of main memory is a shape too."""
LISTED = 2**20
"""Bytes from which a storage is told by what made it, and where."""
_LOOKS = ("aten._local_scalar_dense.default", "aten.equal.default")
_ATTENTION = F.scaled_dot_product_attention
_RMS_NORM = F.rms_norm
_TOLIST, _TENSOR = Tensor.tolist, torch.tensor
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Operation:
    """One kernel at least."""

    phase: str
    name: str
    kind: str
    """one of `shapes_rules.KINDS`"""
    flops: int
    bytes: int
    """read and written, each tensor once"""
    inside: int
    """bytes of copies that it makes inside, of inputs whose layout it cannot take"""
    turned: int
    """bytes that cuDNN turns to channels last and back, see `shapes_rules.turned_inside`"""
    where: str
    """the code that called it"""


@dataclass(slots=True)
class _Block:
    size: int
    made: str
    on_card: bool = True


@dataclass(kw_only=True)
class Memory:
    """Bytes that live on the card: now, and at the peak of each phase."""

    now: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    live: Counter[str] = field(default_factory=Counter)
    """{what made it: bytes}, now"""
    at_peak: dict[str, Counter[str]] = field(default_factory=dict)
    """{phase: the same at its peak}"""
    _blocks: dict[int, _Block] = field(default_factory=dict)
    _refs: dict[int, Any] = field(default_factory=dict)
    _risen: str | None = None

    def see(self, tensor: Tensor, phase: str, made: Callable[[], str], on_card: bool = True) -> None:
        """Counts a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return
        size = block(storage.nbytes())
        one = self._blocks[key] = _Block(size, made() if size >= LISTED else "small tensors", on_card)
        self._refs[key] = weakref.ref(storage, lambda _: self._gone(key))
        self._add(one, size if on_card else 0, phase)

    def lie(self, some: Iterable[Tensor], on_card: bool, phase: str, made: str = "") -> None:
        """Says where tensors lie from now on, on the card or in main memory, and what they are."""
        for tensor in some:
            if tensor.device.type != "meta":
                continue
            self.see(tensor, phase, lambda: made)
            one = self._blocks[tensor.untyped_storage()._cdata]
            if one.on_card:
                self._add(one, -one.size, phase)
            one.on_card, one.made = on_card, made or one.made
            if on_card:
                self._add(one, one.size, phase)

    def size_of(self, some: Iterable[Tensor]) -> int:
        """Bytes of the storages of some tensors, each once."""
        return sum({t.untyped_storage()._cdata: block(t.untyped_storage().nbytes()) for t in some}.values())

    def forget_peaks(self) -> None:
        """From here on peaks are those of what comes."""
        self.peaks, self.at_peak, self._risen = {}, {}, None

    def settle(self) -> None:
        """Writes down what lies there at a peak that was reached just now."""
        if self._risen is not None:
            self.at_peak[self._risen], self._risen = self.live.copy(), None

    def _add(self, one: _Block, size: int, phase: str) -> None:
        if size < 0:
            self.settle()
        self.now += size
        self.live[one.made] += size
        if size > 0 and self.now > self.peaks.get(phase, -1):
            if self._risen not in (None, phase):
                self.settle()
            self.peaks[phase], self._risen = self.now, phase

    def _gone(self, key: int) -> None:
        self._refs.pop(key, None)
        one = self._blocks.pop(key)
        if one.on_card:
            self._add(one, -one.size, "")


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as the kernels of a card have it: torch chooses others for shapes."""
    if query.device.type != "meta":
        return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
    if attn_mask is None and query.dtype in _HALF and query.shape[-1] <= 256:
        width, scale = query.shape[-1], query.shape[-1] ** -0.5 if scale is None else scale
        if width % 8:
            query, key, value = (F.pad(part, (0, -width % 8)) for part in (query, key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0][..., :width]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    logsumexp = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return efficient(query, key, value, attn_mask, logsumexp, dropout_p, is_causal, scale=scale)[0]


def _normed(x: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`rms_norm` as a card has it, one kernel where types agree: for shapes and on CPUs torch takes it to pieces.

    Layer norm stands in, which moves the same bytes and one number for each row more.
    """
    if x.device.type != "meta" or x.numel() <= NUMBERS or (weight is not None and weight.dtype != x.dtype):
        return _RMS_NORM(x, normalized_shape, weight, eps)
    return F.layer_norm(x.contiguous(), normalized_shape, weight, None, eps or 1e-6)  # the kernel wants its input dense


class Shapes(TorchDispatchMode):
    """Inside, tensors of the meta device are those of a card: see the module."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.operations: list[Operation] | None = None
        """the operations since a caller put an empty list here; None: nobody wants them"""
        self.phase = "other"
        """what is being done, outside of backward passes; callers say it, see `during`"""
        self.kept = 0
        """the most bytes that lay there when a backward pass began"""
        self._going_back = False
        # Not by a function mode: those are off inside of what they handle, such as a backward pass.
        self._patches = (
            patch.object(F, "scaled_dot_product_attention", _attended),
            patch.object(F, "rms_norm", _normed),
            patch.object(Tensor, "tolist", _listed),
            patch.object(torch, "tensor", _made),
        )

    def __enter__(self) -> Shapes:
        for one in self._patches:
            one.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for one in self._patches:
            one.stop()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What runs inside belongs to that phase, but for backward passes, which are one of their own."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def now(self) -> str:
        """The phase that an operation belongs to."""
        back = torch._C._current_graph_task_id() != -1
        if back and not self._going_back:
            self.kept = max(self.kept, self.memory.now)
        self._going_back = back
        return "backward" if back else self.phase

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        if not any(value.device.type == "meta" for value in given):
            return self._of_main_memory(function, args, kwargs, given)
        if str(function) in _LOOKS:
            return _look(function, args)
        numbers = _with_numbers(function, args, kwargs, given)
        if numbers is not None and torch.Tag.dynamic_output_shape in function.tags:
            result = tree_map_only(Tensor, self._on_card, function(*numbers[0], **numbers[1]))
            self._count(function, args, kwargs, result, True)
            return result
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
            if numbers is not None:
                return function(*numbers[0], **numbers[1])
            result, on_card = function(*args, **{**kwargs, "device": "meta", "pin_memory": None}), False
        elif given[0].device.type == "cpu" and any(one is given[0] for one in written(function, args, kwargs)):
            return given[0] if numbers is None else function(*numbers[0], **numbers[1])
        else:
            result, on_card = function(*args, **kwargs), True
        if numbers is not None and all(value.numel() <= NUMBERS for value in tensors(result)):
            _note_numbers(result, function(*numbers[0], **_on_cpu(numbers[1])))
        else:
            for value in written(function, args, kwargs):
                vars(value).pop("_numbers", None)
        self._count(function, args, kwargs, result, on_card)
        return result

    def _of_main_memory(self, function: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        device = kwargs.get("device")
        to_card = device is not None and torch.device(device).type == "meta"
        if to_card:
            result = function(*args, **kwargs)
            small = all(value.numel() <= NUMBERS for value in (*given, *tensors(result)))
            if small and "random" not in str(function) and torch.Tag.nondeterministic_seeded not in function.tags:
                _note_numbers(result, function(*args, **_on_cpu(kwargs)))
            self._count(function, args, kwargs, result, True)
            return result
        if not given and args and isinstance(args[0], list | tuple) and prod(_whole(args[0])) >= REAL:
            options = {**kwargs, "device": "meta", "pin_memory": None}
            result = (
                torch.empty(args[0], dtype=kwargs.get("dtype"), device="meta")
                if "generator" in kwargs
                else function(*args, **options)
            )
            for value in tensors(result):
                self.memory.see(value, self.now(), self._maker(function))
            return result
        return function(*args, **kwargs)

    def _count(self, function: Any, args: Any, kwargs: Any, result: Any, on_card: bool) -> None:
        phase = self.now()
        for value in tensors(result):
            if value.device.type == "meta":
                self.memory.see(value, phase, self._maker(function), on_card)
        if self.operations is None:
            return
        name = str(function)
        kind = kind_of(name)
        size, flops = moved(function, args, kwargs, result), flops_of(function, args, kwargs, result)
        if not size and not flops:
            return
        self.operations.append(
            Operation(
                phase,
                name,
                kind,
                flops,
                size,
                copied_inside(kind, args),
                turned_inside(kind, args, result),
                _where(),
            )
        )

    def _on_card(self, known: Tensor) -> Tensor:
        value = known.to("meta")
        value._numbers = known  # type: ignore[attr-defined]
        self.memory.see(value, self.now(), lambda: "small tensors")
        return value

    def _maker(self, function: Any) -> Callable[[], str]:
        return lambda: f"{str(function).split('.')[1]} {_where()}"


def _whole(sizes: Iterable[Any]) -> Iterable[int]:
    return (size for size in sizes if isinstance(size, int))


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs


def _with_numbers(function: Any, args: Any, kwargs: Any, given: list[Tensor]) -> tuple[Any, Any] | None:
    """The arguments with the numbers of their tensors; None where one is not known, or what comes is random."""
    if torch.Tag.nondeterministic_seeded in function.tags:
        return None
    if any(
        value.numel() > NUMBERS or (value.device.type == "meta" and not hasattr(value, "_numbers")) for value in given
    ):
        return None
    known = tree_map_only(Tensor, lambda value: getattr(value, "_numbers", value), (args, kwargs))
    return known


def _note_numbers(result: Any, numbers: Any) -> None:
    for value, known in zip(tensors(result), tensors(numbers), strict=True):
        if value.device.type == "meta":
            value._numbers = known  # type: ignore[attr-defined]


def _look(function: Any, args: Any) -> Any:
    """What code sees that looks at a number."""
    known = [getattr(value, "_numbers", None if value.device.type == "meta" else value) for value in tensors(args)]
    if all(value is not None for value in known):
        return function(*known)
    if function is torch.ops.aten.equal.default or args[0].dtype == torch.bool:
        return True
    if args[0].is_floating_point():
        return 1.0
    raise RuntimeError(
        f"a whole number of a tensor {tuple(args[0].shape)} is asked for ({_where()}), and shapes alone do not have it"
    )


def _listed(value: Tensor) -> Any:
    """`tolist`, which torch refuses for shapes before anybody can look."""
    known = getattr(value, "_numbers", None)
    if value.device.type != "meta" or known is None:
        return _TOLIST(value)
    return _TOLIST(known)


def _made(data: Any, *, device: Any = None, requires_grad: bool = False, **options: Any) -> Tensor:
    """`torch.tensor`, which would forget the numbers of shapes at once."""
    if device is None or torch.device(device).type != "meta":
        return _TENSOR(data, device=device, requires_grad=requires_grad, **options)
    return _TENSOR(data, **options).to("meta").requires_grad_(requires_grad)


def _where() -> str:
    """The code outside of torch and of this file that runs now."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("torch.", "benchmarks.shapes", "weakref")) and name != "torch":
            # Not by its locals: to look at them would keep them alive for as long as the frame is.
            return f"{name.split('.')[-1]}.{frame.f_code.co_qualname}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"
