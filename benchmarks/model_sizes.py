"""How large the published models are: parameters, operations of a guided step, memory of the weights.

    python -m benchmarks.model_sizes                                     # all models at their papers' sizes
    python -m benchmarks.model_sizes --models VideoCrafter2 Wan2.1_1.3B --out runs/sizes.csv
    python -m benchmarks.model_sizes --models VideoCrafter2 --num-frames 12 --rate 790

Networks are built at full size on torch's meta device: they have shapes and no numbers, so that this takes seconds and
little memory. Counts are exact, of the network as the environment calls it; operations are those of torch's counter
(matrix products, convolutions, attention). `shortest_s_per_step` is no measurement but a bound: those operations at a
rate that is given, as if nothing else took time. Of two experts that the timestep chooses from, one is counted: they
are alike, and a step runs one. Prompts count at their full length. A network that looks at numbers on its way has no
count, and a note instead. What a step takes on a device, `benchmarks.throughput` measures.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.arguments import one_line, parse

COLUMNS = (
    "model", "frames", "height", "width", "latent_shape", "denoiser_parameters", "other_parameters", "denoiser_gib",
    "passes_per_step", "tflop_per_step", "num_steps", "tflop_per_video", "shortest_s_per_step", "dtype", "torch",
    "note",
)  # fmt: skip
_TRAINED = ("MovingShapes", "MovingShapesUNet")


@dataclass(frozen=True, kw_only=True, slots=True)
class SizesConfig:
    """Count parameters and operations of models at full size."""

    models: tuple[str, ...] = ()
    """names; none: all published ones"""
    num_frames: int | None = None
    """frames of the video; the model's own if not given"""
    height: int | None = None
    """pixels; the model's own if not given"""
    width: int | None = None
    """pixels; the model's own if not given"""
    rate: float | None = None
    """TFLOP/s of a device, for the bound on a step's seconds"""
    out: Path | None = None
    """CSV file to write; one that is there is replaced"""


def networks(part: Any) -> Iterator[Any]:
    """Every torch module that a model object holds, the denoiser among them."""
    from torch import nn

    if isinstance(part, nn.Module):
        yield part
    elif is_dataclass(part):
        for field in fields(part):
            yield from networks(getattr(part, field.name))
    elif isinstance(part, dict):
        for value in part.values():
            yield from networks(value)


def parameters(modules: Sequence[Any]) -> int:
    """Of all of them together, each counted once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _not_looking(encoder: Any) -> None:
    """Text encoders look into masks to leave them out, and without numbers there is nothing to look at.

    They are not counted, so those of the T5 kind, which always look, may as well give zeros of their shape.
    """
    import torch
    from transformers import T5EncoderModel, UMT5EncoderModel
    from transformers.modeling_outputs import BaseModelOutput

    if isinstance(encoder, T5EncoderModel | UMT5EncoderModel):
        width, dtype = encoder.config.d_model, encoder.dtype

        def forward(input_ids: Any, **_: Any) -> BaseModelOutput:
            states = torch.zeros(*input_ids.shape, width, dtype=dtype, device=input_ids.device)
            return BaseModelOutput(last_hidden_state=states)

        encoder.forward = forward
    elif hasattr(encoder, "set_attn_implementation"):
        encoder.set_attn_implementation("eager")


def _one_expert(model: Any) -> Any:
    """The model with one network where a step runs one of two; shapes alone do not say which."""
    from vdm_env.models.dit import call_wan
    from vdm_env.models.wan import WanExperts

    if isinstance(model.denoiser, WanExperts):
        return replace(model, denoiser=model.denoiser.low, call=call_wan)
    return model


def operations(model: Any, size: tuple[int, int, int], prompt: str = "") -> int:
    """Operations of one pass of a model's network over one video; text encoders are changed so that they can be asked.

    Args:
        model: on the meta device or any other.
        size: frames, height and width of the video.
        prompt: its length counts where numbers are at hand; shapes alone stand for one that fills all tokens.

    Raises:
        RuntimeError: what is computed depends on numbers, and there are none.
    """
    import torch
    import torch.fx.experimental._config

    from algos.flops import count_flops

    for part in networks(model):
        if part is not model.denoiser:
            _not_looking(part)
    condition, model = model.encode_prompts([prompt]), _one_expert(model)
    device = next(model.denoiser.parameters()).device
    x, t = torch.zeros(1, *model.latent_shape(*size), device=device), torch.full((1,), 500.0, device=device)
    # Both for Mochi: torch has no autocast of shapes, and no number of the tokens that a mask leaves.
    all_tokens = torch.fx.experimental._config.patch(  # type: ignore[attr-defined]
        meta_nonzero_assume_all_nonzero=True
    )
    with torch.no_grad(), patch("torch.autocast", lambda *_, **__: nullcontext()), all_tokens:
        return count_flops(lambda: model.predict(x, t, condition))


def measure(name: str, config: SizesConfig) -> dict[str, object]:
    """One model's row, {column: value}.

    Raises:
        ValueError: an unknown name, or a size that the model cannot make.
    """
    import torch

    from vdm_env.registry import load_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that random weights mean nothing
        model: Any = load_model(name, weights="random", device="meta", dtype=torch.bfloat16)
    spec = model.spec
    size = (config.num_frames or spec.num_frames, config.height or spec.height, config.width or spec.width)
    shape = model.latent_shape(*size)
    if hasattr(model, "with_size"):
        model = model.with_size(*size)
    passes = 1 if spec.guidance_scale == 1.0 else 2
    counted: dict[str, object] = {}
    try:
        step = passes * operations(model, size) / 1e12
        counted = {"tflop_per_step": round(step, 3), "tflop_per_video": round(spec.num_steps * step, 1)}
        counted["shortest_s_per_step"] = "" if config.rate is None else round(step / config.rate, 4)
    except RuntimeError as error:  # torch says so where what is computed depends on numbers
        counted["note"] = f"operations not counted: {str(error).splitlines()[0][:100]}"
    own = parameters([model.denoiser])
    of_bytes = sum({id(p): p.numel() * p.element_size() for p in model.denoiser.parameters()}.values())
    return {
        "model": name,
        "frames": size[0],
        "height": size[1],
        "width": size[2],
        "latent_shape": "x".join(map(str, shape)),
        "denoiser_parameters": own,
        "other_parameters": parameters(list(networks(model))) - own,
        "denoiser_gib": round(of_bytes / 2**30, 2),
        "passes_per_step": passes,
        "num_steps": spec.num_steps,
        "dtype": "bfloat16",
        "torch": torch.__version__,
        **counted,
    }


def sizes(config: SizesConfig) -> int:
    """Prints (and writes) one row a model.

    Returns:
        The exit code: 0; 2 for an unknown name or a size that a model cannot make, before anything is written.
    """
    from vdm_env import list_models

    try:
        if config.rate is not None and not 0 < config.rate < float("inf"):
            raise ValueError(f"--rate must be a positive number of TFLOP/s, got {config.rate}")
        names = config.models or [name for name in list_models() if name not in _TRAINED]
        rows = []
        for name in names:
            rows.append(measure(name, config))
            print(", ".join(f"{key}={value}" for key, value in rows[-1].items() if value != ""), flush=True)
        if config.out is not None:
            config.out.parent.mkdir(parents=True, exist_ok=True)
            with config.out.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    except (ValueError, OSError) as error:
        print(f"model_sizes: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.model_sizes`."""
    return sizes(parse(SizesConfig, arguments, "model_sizes"))


if __name__ == "__main__":
    sys.exit(main())
