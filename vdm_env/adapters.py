"""LoRA adapters on one network, of which one acts at a time, and their files in PEFT's format."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vdm_env import noise
from vdm_env.errors import CorruptWeightsError

_numbers = count()
_PREFIX = "base_model.model."
"""What PEFT puts before the names of a network that it wraps."""


def lora_config(rank: int, alpha: float | None, targets: Sequence[str]) -> LoraConfig:
    """A LoRA without dropout, of scale alpha / rank; alpha=None is a scale of 1."""
    return LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets), lora_dropout=0.0)


def add_adapter(denoiser: nn.Module, config: LoraConfig, *, seed: int, device: torch.device, dtype: torch.dtype) -> str:
    """Puts a new adapter into the network, switched on, and returns its name.

    Args:
        denoiser: the network.
        config: of the adapter.
        seed: of its initial values; global generators stay as they are.
        device: the network's.
        dtype: of the adapter's weights.

    Raises:
        ValueError: targets that no layer's name ends with.
    """
    # They bring diffusers' networks, which nobody needs before there is a model.
    from vdm_env.models.fast_path import keep_fast
    from vdm_env.models.low_rank import lean

    name = f"policy_{next(_numbers)}"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters on a network are meant
        torch.manual_seed(noise.mix(seed))
        inject_adapter_in_model(config, denoiser, adapter_name=name)
    lean(denoiser)
    keep_fast(denoiser)
    denoiser._active_policy = "unknown"  # type: ignore[assignment]
    switch_adapter(denoiser, name)
    for _, parameter in adapter_parameters(denoiser, name):
        parameter.data = parameter.data.to(dtype)
    return name


def adapter_parameters(denoiser: nn.Module, adapter: str) -> list[tuple[str, nn.Parameter]]:
    """The weights of one adapter by their names in the network, in a fixed order."""
    return [(name, parameter) for name, parameter in denoiser.named_parameters() if f".{adapter}." in name]


def switch_adapter(denoiser: nn.Module, adapter: str | None) -> None:
    """Makes one adapter the only one that acts; None switches all off."""
    if getattr(denoiser, "_active_policy", None) == adapter:
        return
    for _, layer in _adapter_layers(denoiser):
        layer.enable_adapters(adapter is not None)
        if adapter is not None:
            layer.set_adapter(adapter)
        # PEFT freezes what it switches off, and autograd drops gradients of frozen leaves even if the graph is older
        # than the freezing: without this a reference forward between a loss and its backward would silence the policy.
        for kind in layer.adapter_layer_names:
            getattr(layer, kind).requires_grad_(True)
    denoiser._active_policy = adapter  # type: ignore[assignment]


def without_adapters(denoiser: nn.Module) -> nn.Module:
    """The network with every adapter layer replaced by the layer it wraps."""
    for name, layer in _adapter_layers(denoiser):
        parent, _, child = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, layer.get_base_layer())
    return denoiser


def _adapter_layers(denoiser: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    return [(name, layer) for name, layer in denoiser.named_modules() if isinstance(layer, BaseTunerLayer)]


def save_weights(folder: str | Path, state: Mapping[str, Tensor], config: LoraConfig | None) -> Path:
    """Writes `adapter_model.safetensors` and `adapter_config.json`, or a whole network as `model.safetensors`.

    Args:
        folder: made if need be, and returned.
        state: the weights by name.
        config: of the adapter; None: they are a whole network.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config is None:
        save_file(dict(state), folder / "model.safetensors")
        return folder
    save_file({f"{_PREFIX}{name}": value for name, value in state.items()}, folder / "adapter_model.safetensors")
    told = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (folder / "adapter_config.json").write_text(json.dumps(told, indent=1, default=str) + "\n")
    return folder


def read_weights(folder: str | Path, *, adapter: bool) -> dict[str, Tensor]:
    """What `save_weights` wrote, of an adapter or of a whole network.

    Raises:
        FileNotFoundError: no such file.
        CorruptWeightsError: a damaged file.
    """
    file = Path(folder) / ("adapter_model.safetensors" if adapter else "model.safetensors")
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {folder}; expected a folder written by policy.save")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise CorruptWeightsError(
            f"{file} is damaged or truncated ({error}); save it again or take an earlier one"
        ) from error
    return {name.removeprefix(_PREFIX): value for name, value in state.items()}
