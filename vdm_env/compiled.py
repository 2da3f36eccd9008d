"""Compiled blocks: `make(..., compile=True)` runs the repeated blocks of a network through `torch.compile`.

Only blocks are compiled (regional compilation), never the whole network: a graph that serves thirty layers is made
once, and what lies between them stays as it is. Blocks of one kind (class and shapes of weights) share their graphs.
Adapters that are injected later are inside the graphs, which are guarded: switching an adapter, or gradients, on or
off takes another graph and not a wrong one. Text encoders, the autoencoder and rewards are left alone.

Graphs are made for exact sizes. Graphs for any size would save some compilations, but which one serves a call would
then depend on the calls before: a run that was resumed could differ in rounding, and a gradient checkpoint could be
recomputed by another graph than the one it was made with.

CUDA graphs are refused: they write outputs to the same memory again at the next call, while rollouts, checkpoints and
reward back-propagation hold outputs of many calls. Speed on a GPU, and blocks that FSDP dealt out, are not tested.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

RECOMPILE_LIMIT = 32
"""Graphs of a kind of block, by default. One is made for each batch size, with and without gradients, and with each
adapter or none; a further policy on the network makes those anew."""
UNET_LAYERS = (
    "ResnetBlock2D",
    "SpatioTemporalResBlock",
    "TemporalConvLayer",
    "Transformer2DModel",
    "TransformerTemporalModel",
    "TransformerSpatioTemporalModel",
    "AnimateDiffTransformer3D",
)
BLOCKS: Mapping[str, tuple[str, ...]] = {
    "UNet3DConditionModel": UNET_LAYERS,
    "UNetSpatioTemporalConditionModel": UNET_LAYERS,
    "UNetMotionModel": UNET_LAYERS,
    "CogVideoXTransformer3DModel": ("CogVideoXBlock",),
    "MochiTransformer3DModel": ("MochiTransformerBlock",),
    "STDiT3": ("Block",),
}
"""Classes of repeated blocks of networks that do not list them in `_repeated_blocks`, as diffusers' others do."""


_compile: Any = torch.compile
"""Its overloads leave out the limit of graphs."""
SUPPORTED = {"recompile_limit", "isolate_recompiles"} <= set(inspect.signature(torch.compile).parameters)
"""Whether this PyTorch can keep the graphs of one kind of block apart from those of others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileOptions:
    """How blocks are compiled."""

    backend: str | Callable[..., Any] = "inductor"
    """of `torch.compile`: "inductor", "aot_eager" (for tests: needs no compiler, fuses nothing), ... or a function"""
    mode: str | None = None
    """of inductor: "default" or "max-autotune-no-cudagraphs" """
    options: Mapping[str, Any] | None = None
    """further settings of inductor, instead of a mode"""
    recompile_limit: int = RECOMPILE_LIMIT
    """graphs of a kind of block, at most; calls that would need more run without compilation, with one warning"""

    def __post_init__(self) -> None:
        if not callable(self.backend) and self.backend not in torch.compiler.list_backends(exclude_tags=()):
            known = ", ".join(torch.compiler.list_backends())
            raise ValueError(f"compile: unknown backend {self.backend!r}; known: {known}")
        limit = self.recompile_limit
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"compile: recompile_limit={limit!r}; expected a whole number of at least 1")
        if self.mode is not None and self.options is not None:
            raise ValueError("compile: a mode is a set of options; give one of the two")
        graphs = bool((self.options or {}).get("triton.cudagraphs")) or "cudagraphs" in str(self.backend)
        if graphs or self.mode in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"compile: {self.mode or self.options or self.backend!r} uses CUDA graphs, which write outputs of "
                "later calls over those that a rollout still holds; take mode='max-autotune-no-cudagraphs', or none"
            )
        if self.mode not in (None, "default", "max-autotune-no-cudagraphs"):
            raise ValueError(
                f"compile: unknown mode {self.mode!r}; expected 'default', 'max-autotune-no-cudagraphs' or None"
            )


def as_options(given: bool | str | Mapping[str, Any] | CompileOptions | None) -> CompileOptions | None:
    """`compile` of `make`: False is None, True the defaults, a text the backend, a mapping fields of `CompileOptions`.

    Raises:
        ValueError: an unknown backend, mode or field, or one that asks for CUDA graphs.
        TypeError: something else.
    """
    if given is None or given is False:
        return None
    if isinstance(given, CompileOptions):
        return given
    if given is True:
        return CompileOptions()
    if isinstance(given, str):
        return CompileOptions(backend=given)
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(CompileOptions.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"compile: unknown {unknown}; expected some of {sorted(CompileOptions.__dataclass_fields__)}"
            )
        return replace(CompileOptions(), **given)
    raise TypeError(f"compile={given!r}: expected True, False, the name of a backend, or a mapping of options")


def compile_blocks(network: nn.Module, options: CompileOptions, device: torch.device | str = "cpu") -> None:
    """Compiles the repeated blocks of a network in place, each when it is first called.

    A copy of the network (`copy.deepcopy`) is not compiled: see `compile_copy`.

    Args:
        network: a model's denoiser.
        options: how; they win over those of an earlier call.
        device: where it runs.

    Raises:
        ValueError: no class of repeated blocks is known, or the backend cannot compile on this machine, or PyTorch is
            too old.
    """
    blocks = list(repeated_blocks(network))
    if not SUPPORTED:
        raise ValueError(
            "compile needs torch.compile with recompile_limit and isolate_recompiles, which PyTorch "
            f"{torch.__version__} does not have (2.15 does); install a newer one, or leave compile out"
        )
    try_backend(options, torch.device(device))
    _put_in(network, blocks, options)


def compile_copy(original: nn.Module, copied: nn.Module) -> None:
    """Compiles the blocks of a network's copy like those of the original; nothing if these are not compiled."""
    options = getattr(original, "_compile_options", None)
    if options is not None:
        _put_in(copied, list(repeated_blocks(copied)), options)


def repeated_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules of the classes that the network, or networks within it, name as repeated.

    Raises:
        ValueError: there are none.
    """
    found = list(_within(network, frozenset()))
    if not found:
        raise ValueError(
            f"compile: {type(network).__name__} does not say which blocks it repeats; give its class an attribute "
            "_repeated_blocks, a list of the names of the blocks' classes, or leave compile out"
        )
    return iter(found)


def _within(module: nn.Module, names: frozenset[str]) -> Iterator[nn.Module]:
    known = next((BLOCKS[name] for name in _class_names(module) if name in BLOCKS), names)
    names = frozenset(getattr(module, "_repeated_blocks", None) or known)
    for child in module.children():
        if names.isdisjoint(_class_names(child)):
            yield from _within(child, names)
        else:
            yield child


def _class_names(module: nn.Module) -> list[str]:
    """Of the class and its bases: a layer may have been given a subclass, which is still that layer."""
    return [kind.__name__ for kind in type(module).__mro__]


def _put_in(network: nn.Module, blocks: list[nn.Module], options: CompileOptions) -> None:
    kinds: dict[Any, _Kind] = {}
    for block in blocks:
        shapes = tuple((name, tuple(weight.shape)) for name, weight in block.named_parameters())
        key = (type(block), shapes)
        if key not in kinds:
            kinds[key] = _Kind(type(block).__name__, options)
        # Where `nn.Module.compile` keeps its function too: pickles and deep copies of a module leave it out.
        block._compiled_call_impl = partial(kinds[key], block)
    network._compile_options = options  # type: ignore[assignment]


def _plain(block: nn.Module, *arguments: Any, **named: Any) -> Any:
    return block._call_impl(*arguments, **named)


class _Kind:
    """Blocks that can share graphs: of one class, with weights of the same shapes."""

    def __init__(self, name: str, options: CompileOptions) -> None:
        self.name, self.backend, self.limit, self.full = name, options.backend, options.recompile_limit, False
        # Graphs belong to a code object. With one of their own, kinds do not use up each other's graphs.
        function = FunctionType(_plain.__code__.replace(co_name=f"compiled_{name}"), globals())
        self._compiled = _compile(
            function,
            dynamic=False,
            backend=options.backend,
            mode=options.mode,
            options=None if options.options is None else dict(options.options),
            recompile_limit=options.recompile_limit,
            isolate_recompiles=True,
        )

    def __call__(self, block: nn.Module, *arguments: Any, **named: Any) -> Any:
        if self.full:  # graphs that fit are still used
            with torch.compiler.set_stance("eager_on_recompile"):
                return self._compiled(block, *arguments, **named)
        config: Any = torch._dynamo.config
        before, config.fail_on_recompile_limit_hit = config.fail_on_recompile_limit_hit, True
        try:
            return self._compiled(block, *arguments, **named)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            self.full = True
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(f"{_explained(self.backend, error)} ({self.name})") from error
        finally:
            config.fail_on_recompile_limit_hit = before
        warnings.warn(
            f"compile: {self.name} has {self.limit} graphs, its limit, and this call would need another: from now on "
            "calls without a graph run without compilation. Use fewer different batch sizes, or give "
            f"compile={{'recompile_limit': {2 * self.limit}}}",
            stacklevel=2,
        )
        return _plain(block, *arguments, **named)


def try_backend(options: CompileOptions, device: torch.device) -> None:
    """Compiles one addition.

    Raises:
        ValueError: it did not work; the message says what is missing.
    """

    def add(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    x = torch.zeros(2, device=device)
    try:
        compiled = _compile(
            add, backend=options.backend, dynamic=False, fullgraph=True, recompile_limit=1, isolate_recompiles=True
        )
        right = bool((compiled(x) == 1).all())
    except Exception as error:
        raise ValueError(_explained(options.backend, error)) from error
    if not right:
        raise ValueError(f"compile: backend {options.backend!r} computes wrong numbers on {device}; leave compile out")


def _explained(backend: str | Callable[..., Any], error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"compile: backend {backend!r} cannot compile here ({reason}); 'inductor' needs a C++ compiler for the CPU, "
        "and Triton with a C compiler for a GPU. Install what is missing, or leave compile out"
    )
