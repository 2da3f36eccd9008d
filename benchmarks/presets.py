"""Benchmarks by name: a quick one, and the experiments of the papers."""

from __future__ import annotations

from dataclasses import fields, replace

from benchmarks.configs import nearest
from benchmarks.plan import Arm, Benchmark

EIGHT = ("vader", "ddpo", "diffusion_dpo", "online_vpo", "videodpo", "flow_grpo", "diffusion_nft", "rwr")
"""the algorithms of the zoo that are compared where none are named"""
LIMITS = ("Hyper-parameters are each algorithm's preset for this model, tuned on validation prompts.",)

QUICK = Benchmark(
    name="quick",
    arms=[Arm(label=name, algo=name) for name in EIGHT[:4]],
    env_id="MovingShapes-HPS",
    seeds=(0, 1, 2),
    budget="60s",
    evals=4,
    noise_seeds=2,
    heldout=("Aesthetic",),
    question="Which of four algorithms raises the reward most in one CPU-minute, and does the gold score follow?",
    limits=(*LIMITS, "Three seeds: wide intervals."),
)


def presets() -> dict[str, Benchmark]:
    """All benchmarks by name."""
    from benchmarks.experiments import EXPERIMENTS

    return {"quick": QUICK, **{name: replace(one.benchmark, experiment=name) for name, one in EXPERIMENTS.items()}}


def preset(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        ValueError: there is none; the names are listed.
    """
    known = presets()
    if name not in known:
        hint = nearest(name, known)
        every = ", ".join(known)
        raise ValueError(f"unknown preset {name!r}: {hint}" + ("" if every in hint else f" (there are {every})"))
    return known[name]


_TINY = {
    "videos_per_update": 8,
    "videos_per_rollout": 8,
    "videos_per_step": 8,
    "pairs_per_step": 4,
    "optimiser_steps": 1,
    "updates_per_rollout": 1,
    "micro_batch": 4,
    "prompts": 2,
}


def smoke(benchmark: Benchmark) -> Benchmark:
    """The same benchmark made tiny: one seed, two updates, two denoising steps, two prompts."""
    from algos.zoo import recipe

    def small(arm: Arm) -> Arm:
        found = recipe(arm.algo)
        names = {field.name for field in fields(found.config)} if found.config is not None else set()
        tiny = {name: value for name, value in _TINY.items() if name in names}
        return replace(arm, settings={**tiny, **arm.settings})

    return replace(
        benchmark,
        name=f"smoke-{benchmark.experiment or benchmark.name}",
        arms=[small(arm) for arm in benchmark.arms],
        sampling={**(benchmark.sampling or {}), "num_envs": 8, "num_steps": 2, "guidance_scale": 1.0},
        seeds=benchmark.seeds[:1],
        budget=None,
        updates=2,
        evals=1,
        eval_prompts=2,
        noise_seeds=2,
    )
