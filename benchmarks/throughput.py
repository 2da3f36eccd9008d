r"""How fast a model samples and an algorithm learns: seconds a phase, videos a second, operations, memory.

    python -m benchmarks.throughput --algos vader ddpo --batches 4 16
    python -m benchmarks.throughput --env-id "VideoCrafter2-HPS+Aesthetic" --weights random --scale full \
        --device cuda --dtype bfloat16 --height 320 --width 512 --num-frames 12 --num-steps 25 --guidance-scale 12

A row for the matrix rate, then for every batch one of sampling alone and one of an update of each algorithm; with
`--algos` and no name after it sampling alone. Everything goes through `vdm_env.make`, `env.make_policy` and the
algorithms' own presets. The first call of a row warms up and does not count (VideoDPO builds its data in it, of one
prompt); the prompts are embedded before. Each row is in the file as soon as it is measured; one that runs out of
memory, or that an algorithm refuses (DDPO's groups do not fit into one video), says so, and the others are measured
all the same.

| column                      | meaning                                                                               |
|-----------------------------|---------------------------------------------------------------------------------------|
| batch, videos               | videos side by side; of the call. An update is of one batch, unless told otherwise    |
| group_size                  | the algorithm's, or the largest below it that divides the batch                       |
| seconds, seconds_min, cpu_s | wall seconds of a call, the median; the least; CPU-seconds of the median call         |
| rollout_s, decode_s,        | of the median call, as the environment's clocks tell them; `update_s` is the rest:    |
| reward_s, update_s          | backward passes and optimiser. The four add up to `seconds`                           |
| videos_per_s                | videos / seconds                                                                      |
| tflop_guided_step           | of one video in one step of sampling, both branches of the guidance                   |
| tflop, denoiser_tflop       | of the call; the denoiser's part. Counts times `algos.flops`                          |
| tflop_per_s, share          | tflop / seconds; its share of the matrix rate, measured in the same process and dtype |
| rollout_share               | of sampling: the denoiser's operations in `rollout_s` alone, as such a share          |
| passes                      | backward passes of the denoiser, in videos and guidance branches                      |
| bare_s, update_per_bare     | what the update's network calls take bare; `update_s` / `bare_s`, see below           |
| grad_norm                   | of the last timed update, as the algorithm tells it: a finite number above 0 is right |
| peak_..._gib                | of the card's memory in a call; on a CPU the process's highest so far (ru_maxrss)     |
| build_s, embed_s            | seconds that making the environment and embedding the prompts took, once for all rows |

`update_per_bare` is the cost of learning on a (video, step) against one forward and backward of the bare network: the
median over rounds of `update_s` divided by what the same calls take when made alone, right after the update, in its
batch sizes. How they are counted and priced, and what the ratio therefore contains, says `benchmarks.throughput_calls`.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.arguments import one_line, parse
from benchmarks.options import UNLESS_GIVEN, ProcessOptions, chosen_frames, place

PROGRAM = "throughput"
# What trades speed for memory, or changes both; a row names those that are on.
_OPTIONS: tuple[str, ...] = ("compile", "guidance_interval", "free_text_encoder", "tile_decoding", "decode_chunk")
_OPTIONS += ("gradient_checkpointing", "offload_activations", "plain")


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputConfig:
    """Measure sampling and updates: seconds a phase, videos a second, operations, memory."""

    env_id: str = "MovingShapes-HPS"
    """environment, <Model>-<Reward>"""
    algos: tuple[str, ...] = ("vader", "ddpo")
    """of the zoo, or package.module:Class; no name after it: sampling alone"""
    batches: tuple[int, ...] = (4, 16)
    """videos side by side"""
    set: tuple[str, ...] = ()
    """settings of the algorithms, such as vader.backprop_steps=2, or micro_batch=4 of all"""
    videos_per_update: int | None = None
    """videos of an update, a multiple of the batch; None: one batch"""
    process: ProcessOptions = field(default_factory=lambda: ProcessOptions(device="cpu", **UNLESS_GIVEN))
    decode_frames: str | None = None
    """frames decoded for the reward: all, random1, alternate, a number of evenly spread ones, or indices as in 0,4;
    None: what the reward or the algorithm wants"""
    lora_rank: int = 16
    """rank of the LoRA that is trained; 0: all weights"""
    gradient_checkpointing: bool = False
    """compute the network again in the backward pass: less memory, more time"""
    offload_activations: bool = False
    """keep what is stored for the backward pass in main memory: less of the card's memory, more time"""
    plain: bool = False
    """the network's layers as diffusers has them, instead of the faster ones of vdm_env.models.fast_path, and on a CPU
    freed memory given back, as without vdm_env.allocator"""
    repeats: int = 3
    """timed calls of each row"""
    num_threads: int = 2
    """CPU threads"""
    out: Path | None = None
    """CSV file to write; one that is there is replaced"""


def rows(config: ThroughputConfig) -> Iterator[dict[str, object]]:
    """The rows, each as it is measured. What can be refused is refused before the first one.

    Raises:
        ValueError, TypeError, OSError: an unknown name, a value that cannot be, missing weights.
    """
    import torch

    from benchmarks.ceiling import matmul_flops, measure_ceiling
    from benchmarks.throughput_measure import Bench, attempt, clear, embed_prompts, sampling_row, update_row
    from benchmarks.throughput_rows import TERA, rounded

    _check(config)
    torch.set_num_threads(config.num_threads)
    arms = _arms(config)
    started = time.perf_counter()
    env = _make(config)
    build_s = env.mdp.clock() - started
    policy_options = {
        "lora_rank": config.lora_rank,
        "gradient_checkpointing": config.gradient_checkpointing,
        "offload_activations": config.offload_activations,
    }
    env.make_policy(**policy_options)  # refused now or never
    started = env.mdp.clock()
    embed_prompts(env)
    embed_s = env.mdp.clock() - started
    common = _conditions(config, env) | {"build_s": rounded(build_s), "embed_s": rounded(embed_s)}
    best = measure_ceiling(env.device, getattr(torch, str(config.process.dtype)))
    yield common | {
        "what": "matmul",
        "seconds": rounded(best.seconds),
        "tflop": rounded(matmul_flops(best.size) / TERA),
        "tflop_per_s": rounded(best.flop_per_s / TERA),
        "share": 1,
        "note": f"{best.size} x {best.size}, the best of {', '.join(map(str, best.rates))}",
    }
    bench = Bench(
        env=env,
        policy_options=policy_options,
        ceiling=best.flop_per_s,
        repeats=config.repeats,
        videos_per_update=config.videos_per_update,
        env_options=_given(config),
    )
    for batch in config.batches:
        for arm in (None, *arms):
            found = attempt(
                partial(sampling_row, bench, batch) if arm is None else partial(update_row, bench, arm, batch)
            )
            clear(env.device)
            yield common | {"what": "sampling" if arm is None else arm.label, "batch": batch, **found}


def _check(config: ThroughputConfig) -> None:
    """Raises ValueError for numbers that cannot be."""
    numbers = {"--repeats": config.repeats, "--num-threads": config.num_threads}
    numbers |= {"--batches": min(config.batches, default=0)}
    if config.videos_per_update is not None:
        numbers["--videos-per-update"] = config.videos_per_update
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value if config.batches else 'none'}")


def _arms(config: ThroughputConfig) -> list[Any]:
    """The algorithms with their settings.

    Raises:
        ValueError: an unknown name or setting, or a value it refuses.
    """
    from algos.zoo import recipe
    from benchmarks.bench_options import arms, with_settings
    from benchmarks.settings import algorithm_config, keyword_settings
    from vdm_env.registry import parse_id

    found = with_settings(arms(config.algos), config.set)
    model = parse_id(config.env_id)[0]
    for arm in found:
        kind = recipe(arm.algo)
        if kind.config is None:
            keyword_settings(kind.algorithm, arm.settings, 0)
        else:
            algorithm_config(kind.config, model, arm.settings, 0)
    return found


def _given(config: ThroughputConfig) -> dict[str, Any]:
    """Options of `vdm_env.make` that were given."""
    options = {**asdict(config.process), "decode_frames": chosen_frames(config.decode_frames)}
    return {name: value for name, value in options.items() if value is not None}


def _make(config: ThroughputConfig) -> Any:
    """The environment that all others are derived from.

    Raises:
        ValueError, TypeError, OSError: see `vdm_env.make`.
    """
    import torch

    import vdm_env
    from vdm_env.models.fast_path import plain

    options = _given(config) | {
        "device": place(config.process.device, keep_memory=not config.plain),
        "dtype": getattr(torch, str(config.process.dtype)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that random weights mean nothing
        env = vdm_env.make(config.env_id, **options)
    if config.plain:
        plain(env.model.denoiser)
    return env


def _conditions(config: ThroughputConfig, env: Any) -> dict[str, object]:
    """What every row names."""
    from algos.provenance import provenance

    about, mdp = provenance(env.device), env.mdp
    chosen = {
        name: value for name, value in (asdict(config.process) | asdict(config)).items() if name in _OPTIONS and value
    }
    return {
        "env_id": config.env_id,
        "weights": config.process.weights,
        "scale": config.process.scale,
        "size": f"{mdp.num_frames}x{mdp.height}x{mdp.width}",
        "num_steps": env.num_steps,
        "sampler": mdp.sampler,
        "guidance_scale": env.config.guidance_scale,
        "lora_rank": config.lora_rank,
        "options": " ".join(name if value is True else f"{name}={value}" for name, value in chosen.items()),
        "device": str(env.device),
        "device_name": about["gpu_name"] or about["cpu_name"] or "",
        "dtype": config.process.dtype,
        "num_threads": about["cpu_threads"],
        "torch": about["torch"],
        "repeats": config.repeats,
    }


def throughput(config: ThroughputConfig) -> int:
    """Prints (and writes) the table, row by row.

    Returns:
        The exit code: 0, or 2 for wrong usage.
    """
    from benchmarks.throughput_rows import heading, line, write

    try:
        for number, row in enumerate(rows(config)):
            if not number:
                told = (
                    "{env_id}, {weights} weights, {scale} scale, {size}, {num_steps} steps, guidance {guidance_scale}"
                )
                print(told.format(**row))
                print("{device_name}, {num_threads} threads, {dtype}, torch {torch}".format(**row))
                print(heading())
                if config.out is not None:
                    write(config.out, None)
            print(line(row), flush=True)
            if config.out is not None:
                write(config.out, row)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.throughput`."""
    return throughput(parse(ThroughputConfig, arguments, PROGRAM))


if __name__ == "__main__":
    sys.exit(main())
