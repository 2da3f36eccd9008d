r"""The table of one graphics card: full-size models with random weights, each case a process of its own.

    python -m benchmarks.card --out runs/card                              # all cases; again: those that are missing
    python -m benchmarks.card --out runs/card --cases VideoCrafter2 Wan2.1_1.3B --minutes 5

A case is a call of `benchmarks.throughput`, which says what the figures mean; its rows are in `<case>.csv`, what it
printed in `<case>.log`. A case that fails or runs out of its minutes leaves `<case>.part.csv` with the rows it had, and
the others are measured all the same; the next call takes it up again. `card.md` is the table of all rows that are
there, with the card's name. Weights are random: times and memory mean something, videos do not.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.arguments import one_line, parse
from benchmarks.options import Dtype

PROGRAM = "card"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A call of `benchmarks.throughput`."""

    env_id: str
    """environment"""
    size: tuple[int, int, int]
    """frames, height and width, of full-size models"""
    num_steps: int
    """denoising steps"""
    guidance_scale: float
    """weight of the guidance"""
    batches: tuple[int, ...] = (1,)
    """videos side by side"""
    algos: tuple[str, ...] = ()
    """whose updates are measured; none: sampling alone"""
    options: tuple[str, ...] = ()
    """further arguments"""


_VADER = Case(
    env_id="VideoCrafter2-HPS+Aesthetic",
    size=(12, 320, 512),
    num_steps=25,
    guidance_scale=12.0,
    algos=("vader",),
    # The published setting: the last step back-propagated, one decoded frame.
    options=("--decode-frames", "random1", "--set", "vader.backprop_steps=1"),
)


def _vader(*, frames: int = 12, batches: tuple[int, ...] = (1,), more: tuple[str, ...] = ()) -> Case:
    return Case(
        env_id=_VADER.env_id,
        size=(frames, *_VADER.size[1:]),
        num_steps=_VADER.num_steps,
        guidance_scale=_VADER.guidance_scale,
        batches=batches,
        algos=_VADER.algos,
        options=(*_VADER.options, *more),
    )


_SAVING = ("--gradient-checkpointing", "--free-text-encoder")
CASES: dict[str, Case] = {
    "VideoCrafter2": _vader(batches=(1, 4, 8)),
    "VideoCrafter2_plain": _vader(more=("--plain",)),
    "VideoCrafter2_compiled": _vader(batches=(1, 4), more=("--compile",)),
    "VideoCrafter2_saving": _vader(more=_SAVING),
    "VideoCrafter2_16_frames": _vader(frames=16, more=_SAVING),
    "VideoCrafter2_policies": Case(
        env_id="VideoCrafter2-HPS+Aesthetic",
        size=(12, 320, 512),
        num_steps=5,
        guidance_scale=12.0,
        batches=(4,),
        algos=("ddpo", "diffusion_dpo"),
        options=("--set", "micro_batch=1", "--gradient-checkpointing"),
    ),
    "ModelScope": Case(env_id="ModelScope-HPS", size=(16, 256, 256), num_steps=10, guidance_scale=9.0, batches=(1, 4)),
    "OpenSora1.2": Case(env_id="OpenSora1.2-HPS", size=(51, 240, 426), num_steps=10, guidance_scale=7.0),
    "CogVideoX2B": Case(env_id="CogVideoX2B-HPS", size=(49, 480, 720), num_steps=5, guidance_scale=6.0),
    "Wan2.1_1.3B": Case(env_id="Wan2.1_1.3B-HPS", size=(33, 480, 832), num_steps=10, guidance_scale=5.0),
    "Wan2.1_1.3B_compiled": Case(
        env_id="Wan2.1_1.3B-HPS", size=(33, 480, 832), num_steps=10, guidance_scale=5.0, options=("--compile",)
    ),
}
"""Models at their papers' sizes (Wan at 9 latent frames); steps of those that are sampled only are fewer, because what
is asked is the time of one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardConfig:
    """Measure full-size models on one graphics card."""

    out: Path = field(default_factory=lambda: Path("runs/card"))
    """folder of the tables; cases that are there are not measured again"""
    cases: tuple[str, ...] = ()
    """names; none: all"""
    minutes: float = 10.0
    """that a case may take"""
    device: str = "cuda"
    """cuda, cuda:1, ...; with --scale tiny also cpu"""
    dtype: Dtype = "bfloat16"
    """number format of the networks"""
    scale: Literal["full", "tiny"] = "full"
    """tiny: shrunken networks and videos, to try the program"""
    repeats: int = 3
    """timed calls of each row"""


def command(case: Case, config: CardConfig, out: Path) -> list[str]:
    """The call of `benchmarks.throughput`."""
    frames, height, width = case.size
    size = ["--num-frames", frames, "--height", height, "--width", width, "--num-steps", case.num_steps]
    if config.scale == "tiny":
        size = ["--num-steps", 2]  # and the size of the shrunken model
    parts = [sys.executable, "-m", "benchmarks.throughput", "--env-id", case.env_id, "--weights", "random"]
    parts += ["--scale", config.scale, "--device", config.device, "--dtype", config.dtype]
    parts += [*map(str, size), "--guidance-scale", str(case.guidance_scale)]
    parts += ["--batches", *map(str, case.batches), "--repeats", str(config.repeats), "--out", str(out)]
    return [*parts, *case.options, "--algos", *case.algos]


def measure(name: str, config: CardConfig) -> str | None:
    """Measures a case, in a process.

    Returns:
        What went wrong; None where its table is complete.
    """
    part = config.out / f"{name}.part.csv"
    log = config.out / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                command(CASES[name], config, part), stdout=file, stderr=subprocess.STDOUT, timeout=60 * config.minutes
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {config.minutes:g} minutes; give more with --minutes"
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"exit code {done.returncode}: {said[-1] if said else 'it said nothing'} (see {log})"
    part.replace(config.out / f"{name}.csv")
    return None


def table(folder: Path) -> str:
    """The markdown table of the rows that are in a folder, complete cases and parts of others."""
    head = ("case", "what", "videos", "s a video", "s a guided step", "TFLOP/s", "share", "peak GiB", "note")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    devices: list[str] = []
    for name in CASES:
        found = next((p for p in (folder / f"{name}.csv", folder / f"{name}.part.csv") if p.is_file()), None)
        if found is None:
            continue
        with found.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            device = f"{row['device_name']}, {row['dtype']}, torch {row['torch']}"
            if device not in devices:
                devices.append(device)
            if row["what"] != "matmul":
                lines.append("| " + " | ".join(_cells(name, row, found.name.endswith(".part.csv"))) + " |")
    return "\n".join([f"Measured on: {'; '.join(devices) or 'nothing yet'}. Random weights.", "", *lines, ""])


def _cells(name: str, row: dict[str, str], incomplete: bool) -> tuple[str, ...]:
    videos, seconds = float(row["videos"] or 0), float(row["seconds"] or 0)
    step = float(row["rollout_s"] or 0) / float(row["num_steps"])
    return (
        f"{name}, {row['size']}, {row['num_steps']} steps" + (f", {row['options']}" if row["options"] else ""),
        row["what"],
        row["batch"],
        f"{seconds / videos:.3g}" if videos else "",
        f"{step:.3g}" if row["rollout_s"] else "",
        f"{float(row['tflop_per_s']):.4g}" if row["tflop_per_s"] else "",
        f"{float(row['share']):.0%}" if row["share"] else "",
        f"{float(row['peak_allocated_gib'] or row['peak_rss_gib']):.1f}" if row["videos"] else "",
        row["error"] or ("the case did not end" if incomplete else row["note"]),
    )


def card(config: CardConfig) -> int:
    """Measures what is missing and writes `card.md`.

    Returns:
        The exit code: 0, 1 where a case failed, 2 for wrong usage.
    """
    unknown = sorted(set(config.cases) - set(CASES))
    if unknown or config.minutes <= 0 or config.repeats < 1:
        wrong = f"unknown cases {unknown}; known: {', '.join(CASES)}" if unknown else "--minutes and --repeats: above 0"
        print(f"{PROGRAM}: {wrong}", file=sys.stderr)
        return 2
    if config.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            print(f"{PROGRAM}: no CUDA device here; --device cpu --scale tiny tries the program", file=sys.stderr)
            return 2
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr)
        return 2
    failed = 0
    for name in config.cases or tuple(CASES):
        if (config.out / f"{name}.csv").is_file():
            print(f"{name}: there already", flush=True)
            continue
        wrong_with = measure(name, config)
        failed += wrong_with is not None
        print(f"{name}: {wrong_with or 'measured'}", flush=True)
        (config.out / "card.md").write_text(table(config.out), encoding="utf-8")
    print(table(config.out))
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.card`."""
    return card(parse(CardConfig, arguments, PROGRAM))


if __name__ == "__main__":
    sys.exit(main())
