"""A policy's LoRA as the pipelines of diffusers load it: `pipeline.load_lora_weights(folder)`.

They do so for the transformers (CogVideoX, Wan, HunyuanVideo, LTX-Video, Mochi) and for AnimateDiff. Into the networks
of VideoCrafter2, ModelScope (`UNet3DConditionModel`) and Stable Video Diffusion diffusers loads none: PEFT does, from
what `policy.save` writes.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vdm_env.policy import DenoisingPolicy

FILES = {
    "unet": "pytorch_lora_weights.safetensors",
    "transformer": "pytorch_lora_weights.safetensors",
    "transformer_2": "pytorch_lora_weights_2.safetensors",
}
"""File of each network of a pipeline. The second one is read by naming it, see `save_diffusers_lora`."""
_EXPERTS = {"high.": "transformer", "low.": "transformer_2"}


def diffusers_lora(policy: DenoisingPolicy) -> dict[str, dict[str, Tensor]]:
    """{network of the pipeline: {name: weight}}, the scale alpha / rank multiplied into the second matrices.

    A model with two networks (Wan 2.2 A14B) has two entries, every other one.

    Raises:
        ValueError: the policy has no LoRA, or no pipeline of diffusers loads one for its network.
    """
    denoiser = policy._model.denoiser
    experts = hasattr(denoiser, "high") and hasattr(denoiser, "low")
    if not policy.lora_rank:
        raise ValueError("this policy trains all weights (lora_rank=0) and has no LoRA; policy.save writes the network")
    if not experts and not type(denoiser).__module__.startswith("diffusers."):
        raise ValueError(
            f"no pipeline of diffusers runs {type(denoiser).__name__}; policy.save writes the LoRA in PEFT's format"
        )
    if not all(hasattr(network, "load_lora_adapter") for network in (denoiser.children() if experts else [denoiser])):
        raise ValueError(
            f"diffusers loads no LoRA into {type(denoiser).__name__} (that class has no load_lora_adapter), so there "
            "is no file a pipeline could read; policy.save writes the LoRA in PEFT's format: "
            "peft.PeftModel.from_pretrained(pipeline.unet, folder)"
        )
    scale = policy._config.lora_alpha / policy._config.r
    whole = "unet" if "UNet" in type(denoiser).__name__ else "transformer"
    networks: dict[str, dict[str, Tensor]] = {}
    for name, value in policy.lora_state_dict().items():
        start = next((prefix for prefix in _EXPERTS if experts and name.startswith(prefix)), "")
        part = _EXPERTS.get(start, whole)
        key = name.removeprefix(start)
        networks.setdefault(part, {})[key] = value * scale if ".lora_B." in key else value
    return networks


def save_diffusers_lora(policy: DenoisingPolicy, folder: str | Path) -> list[Path]:
    """Writes `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(folder)` reads; returns the files.

    For Wan 2.2 A14B there is a second one, to be read with `pipeline.load_lora_weights(folder,
    weight_name="pytorch_lora_weights_2.safetensors", load_into_transformer_2=True)`.

    Raises:
        ValueError: see `diffusers_lora`.
    """
    networks = diffusers_lora(policy)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for part, weights in networks.items():
        prefix = part.removesuffix("_2")  # the second network's keys carry the first one's name
        files.append(folder / FILES[part])
        save_file({f"{prefix}.{name}": value.contiguous() for name, value in weights.items()}, files[-1])
    return files
