"""A CUDA device that is not there: tensors that say they lie on `cuda:0`, and refuse what a real one refuses.

Each holds its numbers in a CPU tensor, and every operation runs on those. Autograd, gradient checkpoints, optimisers,
PEFT and the networks of diffusers work as they do everywhere, so that a whole algorithm can be trained. What is held:

- operations that mix devices raise RuntimeError, but for those that CUDA allows: CPU tensors without dimensions in
  pointwise operations, CPU indices into a CUDA tensor, and copies;
- generators and global random states belong to a device: a CPU generator cannot fill a CUDA tensor;
- every wait of the host for the device is noted with the line of the package that caused it: `.item()`, `.cpu()`,
  `nonzero` and the like, and copies to the device that are not `non_blocking`.

What it cannot show: kernels (precision, speed, determinism, missing ones), streams, autocast, memory.

PyTorch calls these tensors by a device type that has no backend ("lazy", `_CARRIER`): autograd runs it on the calling
thread and asks no driver for streams, which it does for "cuda".
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # it reads torch.cuda once, which must not be while functions of it are replaced
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_CARRIER = "lazy"
_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = tuple(str(_ROOT / name) for name in ("vdm_env", "algos", "benchmarks"))
_ATEN = torch.ops.aten

COPIES = {_ATEN._to_copy.default, _ATEN.copy_.default}
"""What may carry numbers from one device to another."""
INDEXING = {
    _ATEN.index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
    _ATEN._index_put_impl_.default,
    _ATEN._unsafe_index.Tensor,
    _ATEN._unsafe_index_put.default,
}
"""Whose indices may lie on the CPU."""
POINTWISE = {"where", "masked_fill", "masked_fill_", "lerp", "lerp_", "addcmul", "addcdiv"}
"""Names of operations that take CPU numbers as pointwise ones do, whether torch tags them so or not."""
WAITING = {
    "_local_scalar_dense": "item",
    "is_nonzero": "item",
    "equal": "equal",
    "nonzero": "nonzero",
    "masked_select": "nonzero",
    "bincount": "nonzero",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "_linalg_check_errors": "linalg",
    "_linalg_eigh": "linalg",
    "_linalg_svd": "linalg",
}
"""Operations whose result, or its size, the host waits for."""


@dataclass
class Waits:
    """Waits of the host for the pretended device, as (kind, "file:line" in the package)."""

    all: list[tuple[str, str]] = field(default_factory=list)

    def note(self, kind: str) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGES):
            frame = frame.f_back
        where = "elsewhere"
        if frame is not None:
            where = f"{Path(frame.f_code.co_filename).relative_to(_ROOT)}:{frame.f_lineno}"
        self.all.append((kind, where))

    @contextmanager
    def counted(self) -> Iterator[Counter[tuple[str, str]]]:
        """The waits inside, each with how often it happened; filled at the end."""
        found: Counter[tuple[str, str]] = Counter()
        before = len(self.all)
        yield found
        found.update(self.all[before:])


class PretendTensor(Tensor):
    """See the module; made by `.to("cuda")` and the like inside `pretend_cuda`."""

    _held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, index: int = 0) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(_CARRIER, index),
        )
        made._held, made._index = held, index
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self._index)

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return self._index

    def untyped_storage(self) -> Any:
        return self._held.untyped_storage()

    def data_ptr(self) -> int:
        return self._held.data_ptr()

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made: Tensor = PretendTensor(self._held.detach().clone(), self._index).requires_grad_(self.requires_grad)
            if isinstance(self, nn.Parameter):
                made = nn.Parameter(made, self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PretendTensor({self._held.tolist()}, device='{self.device}', dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


# ---------------------------------------------------------------------------------------------- one operation


_waits = Waits()
_random_states: dict[int, Tensor] = {}


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation as the pretended device does it."""
    name = func.overloadpacket.__name__
    if torch.Tag.inplace_view in func.tags and isinstance(args[0], PretendTensor):  # `unsqueeze_` and the like
        _set_data(args[0], getattr(_ATEN, name.removesuffix("_"))(*args, **kwargs))
        return args[0]
    given = tree_leaves((args, kwargs))
    pretended = [value for value in given if isinstance(value, PretendTensor)]
    asked = kwargs.get("device")
    index: int | None = pretended[0]._index if pretended else None
    if asked is not None:
        index = (asked.index or 0) if asked.type == _CARRIER else None
    elif func is _ATEN.copy_.default:
        index = args[0]._index if isinstance(args[0], PretendTensor) else None
    _check_devices(func, name, args, given, pretended)
    _check_generator(given, index)
    _note_waits(func, name, args, kwargs, pretended, index)
    if asked is not None and asked.type == _CARRIER:
        kwargs = kwargs | {"device": torch.device("cpu")}
    pinned = bool(kwargs.get("pin_memory"))
    if pinned:
        kwargs = kwargs | {"pin_memory": False}
    inner_args, inner_kwargs = tree_map(lambda v: v._held if isinstance(v, PretendTensor) else v, (args, kwargs))
    with _random_state(func, index):
        result = func(*inner_args, **inner_kwargs)
    if index is None:
        if pinned:
            result._pinned = True
        return result
    known = {id(value._held): value for value in pretended}  # what is changed in place is returned as it was given

    def wrapped(value: Any) -> Any:
        return known.get(id(value)) or PretendTensor(value, index) if isinstance(value, Tensor) else value

    return known[id(result)] if id(result) in known else tree_map(wrapped, result)


def _check_devices(func: Any, name: str, args: Any, given: list[Any], pretended: list[PretendTensor]) -> None:
    if not pretended or func in COPIES:
        return
    here = {value._index for value in pretended}
    plain = [value for value in given if isinstance(value, Tensor) and not isinstance(value, PretendTensor)]
    if func in INDEXING:
        base, indices, *values = args[:3]
        if not isinstance(base, PretendTensor) and any(isinstance(i, PretendTensor) for i in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        among = {v._index if isinstance(v, PretendTensor) else "cpu" for v in (base, *values) if v.ndim or v is base}
        among |= {i._index for i in indices if isinstance(i, PretendTensor)}
        if len(among) > 1:
            raise _mixed(func, among)
        return
    if len(here) > 1:
        raise _mixed(func, here)
    pointwise = torch.Tag.pointwise in func.tags or name in POINTWISE or name.startswith("_foreach")
    changed = args[0] if args and func._schema.is_mutable and isinstance(args[0], Tensor) else None
    if any(value is changed or value.ndim or not pointwise for value in plain):
        raise _mixed(func, {*here, "cpu"})


def _mixed(func: Any, devices: set[Any]) -> RuntimeError:
    found = " and ".join(sorted(d if isinstance(d, str) else f"cuda:{d}" for d in devices))
    return RuntimeError(f"Expected all tensors to be on the same device, but found {found}! (in {func})")


def _check_generator(given: list[Any], index: int | None) -> None:
    """Generators of a CUDA device cannot be made here, so any that is given is one of the CPU."""
    if index is not None and any(isinstance(value, torch.Generator) for value in given):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _note_waits(func: Any, name: str, args: Any, kwargs: Any, pretended: list[PretendTensor], index: Any) -> None:
    if func in COPIES:
        target, source = (args[0], args[1]) if func is _ATEN.copy_.default else (None, args[0])
        free = kwargs.get("non_blocking") or (target is not None and len(args) > 2 and args[2])
        if isinstance(source, PretendTensor) and index is None:
            if not (free and target is not None and getattr(target, "_pinned", False)):
                _waits.note("to cpu")
        elif not isinstance(source, PretendTensor) and index is not None:
            if not free:  # pageable memory is read before the call returns, but nothing is waited for
                _waits.note("from cpu")
    elif pretended and name in WAITING:
        _waits.note(WAITING[name])
    elif func in INDEXING and isinstance(args[0], PretendTensor):
        for i in args[1]:
            if i is not None and not isinstance(i, PretendTensor):
                _waits.note("from cpu")
            if i is not None and i.dtype in (torch.bool, torch.uint8):
                _waits.note("nonzero")
    elif pretended and name == "repeat_interleave" and kwargs.get("output_size") is None:
        _waits.note("nonzero")


@contextmanager
def _random_state(func: Any, index: int | None) -> Iterator[None]:
    """Draws for a pretended device come from a state of its own."""
    if index is None or torch.Tag.nondeterministic_seeded not in func.tags:
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(_state_of(index))
    try:
        yield
    finally:
        _random_states[index] = torch.get_rng_state()
        torch.set_rng_state(before)


def _state_of(index: int) -> Tensor:
    if index not in _random_states:
        _random_states[index] = torch.Generator().manual_seed(index + 1000).get_state()
    return _random_states[index]


class _Operations(TorchDispatchMode):
    """Sees operations without a pretended tensor too: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


# ---------------------------------------------------------------------------------------------- names of devices


def _carried(value: Any) -> Any:
    """The carrier's device for one of CUDA."""
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        value = torch.device(value)
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device(_CARRIER, value.index or 0)
    return value


class _Names(TorchFunctionMode):
    """Calls that name a CUDA device, or concern one, before PyTorch looks for its driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.data.__set__:
            return _set_data(*args)
        if func is Tensor.pin_memory:
            copied = args[0].clone()
            copied._pinned = True
            return copied
        if func is Tensor.is_pinned:
            return getattr(args[0], "_pinned", False)
        if func is Tensor.cuda:
            tensor, device = args[0], (*args[1:], kwargs.pop("device", None), None)[0]
            return tensor.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda", **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _with_tensors(args[1]), *args[2:])
        if func is Tensor.new_tensor:
            func, kwargs = torch.tensor, {"dtype": args[0].dtype, "device": args[0].device} | kwargs
            args = args[1:]
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and "device" in kwargs:  # no mode sees inside of them
            device, wanted = _carried(kwargs["device"]), kwargs.get("requires_grad", False)
            rest = {name: value for name, value in kwargs.items() if name not in ("device", "requires_grad")}
            numbers = tree_map(lambda v: v.item() if isinstance(v, PretendTensor) and not v.ndim else v, args)
            made = func(*numbers, **rest)
            return (made if device is None else made.to(device)).requires_grad_(wanted)
        if func in (Tensor.to, torch.empty_like, torch.zeros_like, torch.ones_like) or "device" in kwargs:
            args = tuple(map(_carried, args))
            if "device" in kwargs:
                kwargs = kwargs | {"device": _carried(kwargs["device"])}
        return func(*args, **kwargs)


def _with_tensors(index: Any) -> Any:
    """An index whose lists are tensors: PyTorch makes them of lists where no mode sees it."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index, dtype=None if index else torch.int64) if isinstance(index, list) else index


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """`tensor.data = value`, which may move a parameter to another device: it stays the same object."""
    if isinstance(tensor, PretendTensor) and isinstance(value, PretendTensor):
        tensor._held, tensor._index = value._held, value._index
    if isinstance(tensor, PretendTensor) == isinstance(value, PretendTensor):
        Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
        return
    made: Tensor = value.detach()
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, made)


# ---------------------------------------------------------------------------------------------- torch.cuda


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        with _Names():
            return function(*args, **kwargs)

    return called


def _number(device: Any = None) -> int:
    return device if isinstance(device, int) else (torch.device(device or "cuda").index or 0)


def _seed(seed: int) -> None:
    for index in range(torch.cuda.device_count()):
        _random_states[index] = torch.Generator().manual_seed(seed).get_state()


def _cuda(devices: int) -> dict[str, Callable[..., Any]]:
    """What stands in for functions of `torch.cuda`."""
    nothing = lambda *_, **__: None  # noqa: E731
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "device_count": lambda: devices,
        "current_device": lambda: 0,
        "set_device": nothing,
        "synchronize": lambda device=None: _waits.note("synchronize"),
        "empty_cache": nothing,
        "memory_allocated": lambda device=None: 3 << 30,
        "memory_reserved": lambda device=None: 4 << 30,
        "max_memory_allocated": lambda device=None: 3 << 30,
        "max_memory_reserved": lambda device=None: 4 << 30,
        "reset_peak_memory_stats": nothing,
        "get_device_name": lambda device=None: f"Pretended {_number(device)}",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device="cuda": _state_of(_number(device)).clone(),
        "set_rng_state": lambda state, device="cuda": _random_states.update({_number(device): state.clone()}),
        "manual_seed": lambda seed: _seed(seed),
        "manual_seed_all": lambda seed: _seed(seed),
    }


@contextmanager
def pretend_cuda(devices: int = 1) -> Iterator[Waits]:
    """Inside, `cuda` (so many devices of it) can be used, and the host's waits for it are noted.

    Tensors of it must not be used afterwards.
    """
    from torch.optim import optimizer

    compatible = torch._has_compatible_shallow_copy_type

    def like_cuda(a: Tensor, b: Tensor) -> bool:
        return compatible(a, b) or isinstance(a, PretendTensor) != isinstance(b, PretendTensor)

    _waits.all.clear()
    _random_states.clear()
    with ExitStack() as stack:
        for name, function in _cuda(devices).items():
            stack.enter_context(patch.object(torch.cuda, name, function))
        stream = SimpleNamespace(is_capturing=lambda: False)
        stack.enter_context(patch.object(torch.accelerator, "current_stream", lambda device=None: stream))
        stack.enter_context(patch.object(torch, "_has_compatible_shallow_copy_type", like_cuda))
        backward = torch.autograd._engine_run_backward
        # A mode is off inside the call it sees, here that of `backward`, in which checkpoints are computed again.
        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", _named(backward)))
        kinds = [*optimizer._foreach_supported_types, PretendTensor]
        stack.enter_context(patch.object(optimizer, "_foreach_supported_types", kinds))
        stack.enter_context(_Names())
        stack.enter_context(_Operations())
        yield _waits
