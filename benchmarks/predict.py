r"""What an update would hold and move on a card, counted without one: memory, kernels, bytes, roofline seconds.

    python -m benchmarks.predict --env-id "VideoCrafter2-HPS+Aesthetic" --num-frames 12 --guidance-scale 12 \
        --decode-frames random1 --gradient-checkpointing --rate 790 --bandwidth 4.8
    python -m benchmarks.predict --env-id Wan2.1_1.3B-Brightness --num-frames 33 --algo ""    # sampling alone

The code itself runs (`vdm_env.make`, the policy, the algorithm's own `update`), with random weights, on tensors that
have shapes and no numbers; a full-size update takes seconds and little memory. **Nothing here is measured on a card.**

Memory is what torch's allocator would have handed out, each block rounded up to 512 bytes. What a card holds besides is
not in it: workspaces of kernels, holes between blocks, the CUDA context. The optimiser's temporaries are those of its
plain loop.

Traffic: every operation reads its inputs and writes its outputs once, views are free, and a copy that a convolution
makes of an input in another layout counts. Operations are those of torch's counter. The roofline second is the sum over
operations of max(operations / rate, bytes / bandwidth): no cache between operations, no launch and no gap, full rate
whatever the size. A card needs longer, unless caches serve much of the traffic. `launch_bound_s` lets no kernel take
less than `--launch-us`.

Only `--run-steps` denoising steps are run: what they hold does not grow with their number, unless the algorithm keeps
trajectories, and then the video's whole number is to be given. Seconds are those of all `--num-steps`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arguments import one_line, parse
from benchmarks.options import PolicyOptions, ProcessOptions

PROGRAM = "predict"
GIB = 2**30
_SHOWN = 8
"""Lines of what lies at the peak, and of copies"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig:
    """Count what an update holds and moves, on shapes alone."""

    env_id: str = "VideoCrafter2-HPS+Aesthetic"
    """environment, <Model>-<Reward>"""
    algo: str = "vader"
    """of the zoo, or package.module:Class; "": sampling, decoding and scoring alone"""
    set: tuple[str, ...] = ()
    """settings of the algorithm, such as vader.backprop_steps=2"""
    batch: int = 1
    """videos side by side; an update is of one batch, unless a setting says otherwise"""
    process: ProcessOptions = field(
        default_factory=lambda: ProcessOptions(device="meta", weights="random", dtype="bfloat16")
    )
    decode_frames: str | None = None
    """frames decoded for the reward: all, random1, alternate, a number of evenly spread ones, or indices as in 0,4;
    None: what the reward or the algorithm wants"""
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    plain: bool = False
    """the network's layers as diffusers has them, instead of the faster ones of vdm_env.models.fast_path"""
    run_steps: int = 2
    """denoising steps that are run"""
    rate: float | None = None
    """TFLOP/s of the device in large products of this number format; needed for seconds"""
    bandwidth: float | None = None
    """TB/s to and from its memory; needed for seconds"""
    launch_us: float = 0.0
    """microseconds that no kernel takes less of"""
    out: Path | None = None
    """CSV file that the row is added to; it is made if it is not there"""


def row(config: PredictConfig) -> tuple[dict[str, object], Any]:
    """The figures by column, and the whole prediction.

    Raises:
        ValueError, TypeError, OSError: an unknown name, or a value that cannot be.
    """
    _check(config)
    import torch

    from benchmarks.predict_run import Rates, predict

    rates = None
    if config.rate is not None and config.bandwidth is not None:
        rates = Rates(flops=config.rate * 1e12, bytes=config.bandwidth * 1e12, launch_s=config.launch_us / 1e6)
    found = predict(config, rates)
    env, step = found.env, found.step
    mdp, num_steps = env.mdp, config.process.num_steps or env.model.spec.num_steps
    switches = [name for name in ("gradient_checkpointing", "offload_activations") if getattr(config.policy, name)]
    switches += [name for name in ("free_text_encoder", "tile_decoding") if getattr(config.process, name)]
    switches += ["plain"] if config.plain else []
    figures: dict[str, object] = {
        "env_id": config.env_id,
        "algo": config.algo or "sampling",
        "batch": config.batch,
        "size": f"{mdp.num_frames}x{mdp.height}x{mdp.width}",
        "latent_shape": "x".join(map(str, mdp.latent_shape)),
        "decode_frames": mdp.decode_frames,
        "dtype": config.process.dtype,
        "lora_rank": config.policy.lora_rank,
        "options": " ".join(switches),
        **{f"{part.replace(' ', '_')}_gib": _gib(size) for part, size in found.weights.items()},
        "trained_gib": _gib(found.trained),
        "kept_gib": _gib(found.kept),
        **{f"peak_{phase.replace(' ', '_')}_gib": _gib(size) for phase, size in found.peaks.items()},
        "peak_gib": _gib(found.peak),
        "kernels_per_step": step.kernels,
        "tflop_per_step": _digits(step.tflop),
        **{f"{kind}_gb".replace("-", "_"): _digits(size) for kind, size in step.gb.items()},
        "gb_per_step": _digits(sum(step.gb.values())),
        "turned_gb": _digits(step.turned_gb),
    }
    if rates is not None:
        total = sum(step.seconds.values())
        figures |= {f"{kind}_s".replace("-", "_"): _digits(value) for kind, value in step.seconds.items()}
        figures |= {
            "rate": config.rate,
            "bandwidth": config.bandwidth,
            "roofline_s_per_step": _digits(total),
            "highest_share": _digits(step.tflop * 1e12 / rates.flops / total),
            "turned_s": _digits(step.turned_gb * 1e9 / rates.bytes),
            "launch_bound_s": _digits(step.launch_bound_s) if config.launch_us else "",
            "num_steps": num_steps,
            "roofline_s_per_video": _digits(found.seconds(num_steps) / config.batch),
        }
    return figures | {"note": found.note, "torch": torch.__version__}, found


def _check(config: PredictConfig) -> None:
    """Raises ValueError for values that cannot be."""
    for name, value in (("--batch", config.batch), ("--run-steps", config.run_steps)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    for name, rate in (("--rate", config.rate), ("--bandwidth", config.bandwidth)):
        if rate is not None and not 0 < rate < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {rate}")
    if (config.rate is None) != (config.bandwidth is None):
        raise ValueError("seconds need both --rate (TFLOP/s) and --bandwidth (TB/s); give both or neither")
    if not 0 <= config.launch_us < float("inf"):
        raise ValueError(f"--launch-us must be 0 or more, got {config.launch_us}")
    if config.process.device != "meta" or config.process.weights != "random":
        raise ValueError("what is counted are shapes, which have no device and no weights; leave both options out")


def _gib(size: int) -> float:
    return round(size / GIB, 3)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _told(figures: Mapping[str, object], found: Any) -> Iterator[str]:
    """Lines for the screen."""
    yield "Counted on shapes, not measured on a card."
    for name, value in figures.items():
        yield f"{name:<24}{value}"
    phase = max((one for one in found.peaks if one != "prompts"), key=found.peaks.__getitem__)
    yield f"\nat the peak ({phase}), GiB:"
    for made, size in list(found.at_peak.get(phase, {}).items())[:_SHOWN]:
        yield f"  {size / GIB:8.3f}  {made}"
    yield "\ncopies of a sampling step, GB:"
    for where, size in list(found.step.copies_gb.items())[:_SHOWN]:
        yield f"  {size:8.3f}  {where}"
    if not found.step.seconds:
        yield "\nseconds need --rate (TFLOP/s) and --bandwidth (TB/s)"


def add_row(path: Path, figures: Mapping[str, object]) -> None:
    """Adds a row to a CSV file; columns that only some rows have are empty in the others."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    rows.append(dict(figures))
    columns = list(dict.fromkeys(name for one in rows for name in one))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def run(config: PredictConfig) -> int:
    """Prints (and writes) the figures.

    Returns:
        The exit code: 0; 2 for wrong usage, 1 where the code needs numbers, in one line each.
    """
    try:
        figures, found = row(config)
        for line in _told(figures, found):
            print(line)
        if config.out is not None:
            add_row(config.out, figures)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr)
        return 2
    except (RuntimeError, NotImplementedError) as error:
        print(f"{PROGRAM}: not counted: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.predict`."""
    return run(parse(PredictConfig, arguments, PROGRAM))


if __name__ == "__main__":
    sys.exit(main())
