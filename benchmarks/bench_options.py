"""The options of `benchmarks.reward_vs_gpu_hours`, and the benchmark that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tyro

from benchmarks.plan import Arm, Benchmark, check
from benchmarks.presets import EIGHT, LIMITS, preset, smoke

PROGRAM = "reward_vs_gpu_hours"
_SHARED = (
    "env_id", "seeds", "budget", "updates", "evals", "eval_prompts", "noise_seeds", "splits", "heldout", "question",
    "hypothesis", "tuning", "name",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Compare algorithms on one task with the same budget. plan shows the runs, run makes what is missing of them."""

    algo: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """an algorithm, of the zoo or package.module:Class of your own; may be repeated. None: the preset's, or vader,
    ddpo, diffusion_dpo, online_vpo, videodpo, flow_grpo, diffusion_nft and rwr"""
    preset: str | None = None
    """a benchmark by name: quick, or one of the papers' experiments; the options below change it"""
    env_id: str | None = None
    """environment; without a preset MovingShapes-HPS"""
    seeds: tuple[int, ...] | None = None
    """training seeds; without a preset 0 1 2 3 4"""
    budget: str | None = None
    """device time of each run for rollout, decoding, reward and update, such as 60s or 30min"""
    updates: int | None = None
    """updates of each run, instead of a budget or beside it: whichever comes first"""
    evals: int | None = None
    """evaluations after the first one; without a preset 6"""
    eval_prompts: int | None = None
    """prompts of each split; without a preset 16"""
    noise_seeds: int | None = None
    """videos of each prompt in an evaluation; without a preset 4"""
    splits: tuple[str, ...] | None = None
    """prompts of the evaluations, the main ones first, such as test train; without a preset test"""
    heldout: tuple[str, ...] | None = None
    """rewards that are evaluated and never optimised, such as Aesthetic"""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """a setting of an algorithm, as in vader.learning_rate=1e-3, or of all of them, as in micro_batch=4; {seed} stands
    for the seed"""
    name: str | None = None
    """folder of the benchmark below --out; without a preset reward_vs_gpu_hours"""
    question: str | None = None
    """what the runs are to answer"""
    hypothesis: str | None = None
    """what you expect; it is written down before the runs, and cannot be changed after"""
    ahead: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """part of the hypothesis: "vader>ddpo" expects the first above the second at equal cost"""
    tuning: str | None = None
    """how much tuning each algorithm had, and where it is logged"""
    smoke: bool = False
    """the same with tiny videos and two updates, in seconds, to see that it works"""
    out: str = "runs"
    """folder of all benchmarks"""
    fresh: bool = False
    """remove earlier runs of these algorithms and seeds first"""
    jobs: int = 1
    """runs side by side, each in a process of its own (two on one GPU slow each other down, which counts as device
    time); 0: all in this process, which saves their start-up"""
    num_threads: int = 1
    """CPU threads of each run"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one, else cpu"""
    ray: bool = False
    """give the runs to Ray, on this machine"""
    ray_address: str | None = None
    """give them to a running Ray cluster, such as auto"""
    gpus_per_run: float | None = None
    """with Ray: share of a GPU that a run holds, such as 0.5; None: 1 where there is any and --device is not cpu"""
    cpus_per_run: float = 1.0
    """with Ray: CPU cores that a run holds"""


def benchmark_of(options: Options) -> Benchmark:
    """The benchmark that the options ask for.

    Raises:
        ValueError: unknown names, or numbers that do not fit.
    """
    if options.preset is not None:
        base = preset(options.preset)
    else:
        base = Benchmark(name=PROGRAM, arms=arms(EIGHT), limits=() if options.set else LIMITS)
    changes: dict[str, Any] = {name: value for name in _SHARED if (value := getattr(options, name)) is not None}
    if options.budget is not None and options.updates is None:
        changes["updates"] = None  # of the preset, which this budget replaces
    elif options.updates is not None and options.budget is None:
        changes["budget"] = None
    if options.algo:
        known = {arm.label: arm for arm in base.arms} if options.preset else {}
        named = arms([name for name in options.algo if name not in known])
        new = {arm.algo: arm for arm in named}
        changes["arms"] = [known.get(name) or new[name] for name in dict.fromkeys(options.algo)]
        left = {arm.label for arm in changes["arms"]}
        changes["expected_ahead"] = [pair for pair in base.expected_ahead if set(pair) <= left]
    if options.ahead:
        changes["expected_ahead"] = [ahead(text) for text in options.ahead]
    if options.smoke:  # what is asked for beside it counts
        base = smoke(replace(base, arms=changes.pop("arms", base.arms)))
    found = replace(base, **changes)
    found = replace(found, arms=with_settings(found.arms, options.set))
    check(found)
    _check_names(found)
    return found


def arms(names: Sequence[str]) -> list[Arm]:
    """An arm for each algorithm with its own settings; two classes of one name keep their modules' names.

    Raises:
        ValueError: see `algos.zoo.recipe`.
    """
    from algos.zoo import recipe

    labels = [recipe(name).label for name in dict.fromkeys(names)]
    return [
        Arm(label=name if labels.count(label) > 1 else label, algo=name)
        for name, label in zip(dict.fromkeys(names), labels, strict=True)
    ]


def ahead(text: str) -> tuple[str, str]:
    """The labels of "vader>ddpo".

    Raises:
        ValueError: another text.
    """
    first, sign, second = (part.strip() for part in text.partition(">"))
    if not sign or not first or not second:
        raise ValueError(f"--ahead {text!r}: expected two algorithms, such as 'vader>ddpo'")
    return first, second


def with_settings(given: Sequence[Arm], texts: Sequence[str]) -> list[Arm]:
    """The arms with settings such as "vader.learning_rate=1e-3", or "micro_batch=4" of all.

    Raises:
        ValueError: no such arm, or no name=value.
    """
    from benchmarks.settings import parse_setting

    found = list(given)
    for text in texts:
        name, value = parse_setting(text)
        label, _, field = name.rpartition(".")
        chosen = [arm for arm in found if not label or label in (arm.label, arm.algo)]
        if not chosen:
            raise ValueError(f"--set {text!r}: no arm {label!r}; there are {', '.join(arm.label for arm in found)}")
        found = [replace(arm, settings={**arm.settings, field: value}) if arm in chosen else arm for arm in found]
    return found


def _optimised(benchmark: Benchmark) -> dict[str, str]:
    """{reward: who optimises it}: the terms of the environment's reward, and of those that arms have instead."""
    from vdm_env.registry import parse_id

    own = {"reward": parse_id(benchmark.env_id)[1], **(benchmark.sampling or {})}
    found: dict[str, str] = {}
    for owner, options in [(benchmark.env_id, own), *((arm.label, arm.env) for arm in benchmark.arms)]:
        reward = (options or {}).get("reward", ())
        found |= dict.fromkeys([reward] if isinstance(reward, str) else reward, owner)
    return found


def _check_names(benchmark: Benchmark) -> None:
    """Refuses an unknown environment, reward or setting, and a held-out reward that is optimised, building nothing.

    Raises:
        ValueError: see there.
    """
    from algos.budget import seconds
    from algos.zoo import recipe
    from benchmarks.settings import algorithm_config, keyword_settings
    from vdm_env.registry import parse_id, parse_rewards

    model, _ = parse_id(benchmark.env_id)
    optimised = _optimised(benchmark)
    for name in benchmark.heldout:
        parse_rewards(name, name)
        if name in optimised:
            raise ValueError(
                f"--heldout {name}: {optimised[name]} optimises this reward, so it is not held out; leave it out"
            )
    if benchmark.budget is not None:
        seconds(benchmark.budget)
    for split in benchmark.splits:
        if split not in ("train", "validation", "test"):
            raise ValueError(f"--splits: unknown split {split!r}; there are test, validation and train")
    for arm in benchmark.arms:
        found = recipe(arm.algo)
        if found.config is None:
            keyword_settings(found.algorithm, arm.settings, 0)
        else:
            algorithm_config(found.config, model, arm.settings, 0)
