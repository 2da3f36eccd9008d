"""Timed rounds of sampling and of updates, through the public interface. See `benchmarks.throughput`."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch

from algos.flops import Flops
from algos.meter import COUNTS, Meter
from algos.out_of_memory import is_out_of_memory
from algos.zoo import recipe
from benchmarks.arguments import one_line
from benchmarks.plan import Arm
from benchmarks.throughput_calls import Call, Ledger, bare_cost, bare_seconds, without_recomputed
from benchmarks.throughput_rows import Round, figures, rounded
from benchmarks.training import build_algorithm
from vdm_env.memory import EMBEDDED_AT_ONCE

_MEMORY = ("peak_allocated_gib", "peak_reserved_gib", "peak_rss_gib")
# An update of one batch, and one group of preference data, which the first update builds.
_ALL_VIDEOS = ("videos_per_update", "videos_per_rollout", "videos_per_step")
_ONE = ("updates_per_rollout",)
_BUILT: dict[str, Any] = {"prompts": 1}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows of a table have in common."""

    env: Any
    """from `vdm_env.make`; others are derived from it"""
    policy_options: Mapping[str, Any]
    """of `env.make_policy`"""
    ceiling: float
    """operations a second of the device"""
    repeats: int
    """timed rounds of a row"""
    videos_per_update: int | None = None
    """of an update; None: the batch"""
    env_options: Mapping[str, Any] = field(default_factory=dict)
    """that were asked for, before what suits an algorithm"""
    costs: dict[str, dict[str, int]] = field(default_factory=dict)
    """operations of each call, by row; they do not depend on the batch"""


def embed_prompts(env: Any) -> None:
    """Embeds the prompts that episodes draw from, as a training run has done after a few updates.

    Images are encoded anew for every video, so that their time belongs to it.
    """
    if env.mdp.on_images:
        return
    ids = env.prompt_ids()
    for start in range(0, len(ids), EMBEDDED_AT_ONCE):
        env.mdp.condition(ids[start : start + EMBEDDED_AT_ONCE])


@torch.no_grad()
def sample(env: Any, policy: Any) -> None:
    """One batch of videos with guidance, decoded and scored."""
    obs, _ = env.reset()
    for _ in range(env.num_steps):
        obs, *_ = env.step(policy(obs))


def timed(call: Callable[[], Any], meter: Meter) -> Round:
    """A call in the meter's train phase."""
    names = (*COUNTS, "decode_s", "reward_s", "rollout_s")
    before = {name: meter.totals[name] for name in names}
    seconds, cpu_s = meter.seconds["train"], meter.cpu_s
    with meter.phase("train"):
        call()
    spent = {name: meter.totals[name] - before[name] for name in names}
    return Round(
        seconds=meter.seconds["train"] - seconds,
        cpu_s=meter.cpu_s - cpu_s,
        rollout_s=spent["rollout_s"],
        decode_s=spent["decode_s"],
        reward_s=spent["reward_s"],
        counts={name: spent[name] for name in COUNTS},
    )


def sampling_row(bench: Bench, batch: int) -> dict[str, object]:
    """Figures of sampling alone."""
    env = bench.env.derive(num_envs=batch)
    policy = env.make_policy(**bench.policy_options)
    row = _rounds(bench, "sampling", env, policy, lambda: sample(env, policy))
    return {"group_size": env.group_size, **row}


def update_row(bench: Bench, arm: Arm, batch: int) -> dict[str, object]:
    """Figures of an algorithm's updates.

    Raises:
        ValueError, TypeError, OSError: whatever the environment, config or class refuses.
    """
    found = recipe(arm.algo)
    suited = {name: value for name, value in found.env.items() if name not in bench.env_options}
    group = largest_group(int(suited.pop("group_size", 1)), batch)
    env = bench.env.derive(num_envs=batch, group_size=group, **suited)
    ledger = env.mdp.counters = Ledger(**asdict(env.mdp.counters))
    builds = found.data == "builds"
    chosen = {**(_BUILT if builds else one_update(found.config, bench.videos_per_update or batch)), **arm.settings}
    told = " ".join(f"{name}={value}" for name, value in chosen.items())
    with TemporaryDirectory() as folder:
        data = {"folder": folder} if builds else {}
        policy, algorithm, _, note = build_algorithm(
            found, env, lambda: env.make_policy(**bench.policy_options), {**data, **chosen}, seed=0
        )
        metrics: dict[str, float] = {}
        row = _rounds(
            bench, arm.label, env, policy, lambda: metrics.update(algorithm.update()), ledger, warm_up=1 + builds
        )
    if "grad_norm" in metrics:
        row["grad_norm"] = rounded(metrics["grad_norm"])
    return {"group_size": group, "settings": f"{note}; {told}" if told else note, **row}


def largest_group(wanted: int, batch: int) -> int:
    """The largest group size that divides a batch and is not above the one wanted."""
    return max(size for size in range(1, min(wanted, batch) + 1) if batch % size == 0)


def one_update(config: type[Any] | None, videos: int) -> dict[str, int]:
    """Settings that make an update of so many videos, of those the config has."""
    names = {one.name for one in fields(config)} if config is not None else set()
    return {name: videos for name in _ALL_VIDEOS if name in names} | {name: 1 for name in _ONE if name in names}


def _rounds(
    bench: Bench,
    what: str,
    env: Any,
    policy: Any,
    call: Callable[[], Any],
    ledger: Ledger | None = None,
    warm_up: int = 1,
) -> dict[str, object]:
    """Warms up, times the rounds and prices them."""
    flops = Flops(env=env, policy=policy, costs=bench.costs.setdefault(what, {}))
    meter = Meter(counters=env.mdp.counters, device=env.device, flops=flops)
    for _ in range(warm_up):
        timed(call, meter)
    meter.measure_flops()
    rounds, memory, notes = [], [], []
    for _ in range(bench.repeats):
        _peaks(meter)  # those of this round begin here
        with nullcontext(Counter[Call]()) if ledger is None else ledger.recording(env) as calls:
            one = timed(call, meter)
        memory.append(_peaks(meter))
        bare_s, why = _bare(env, policy, calls)
        notes.append(why)
        rounds.append(replace(one, bare_s=bare_s))
    meter.measure_flops()
    return {
        **figures(rounds, flops, bench.ceiling, env.num_steps),
        **{name: max(one[name] for one in memory) for name in memory[0]},
        "note": "; ".join(dict.fromkeys(note for note in (flops.note(), *notes) if note)),
        "decode_frames": env.mdp.decode_frames,
    }


def _peaks(meter: Meter) -> dict[str, float]:
    """Peak memory since the last call, of those kinds that there are here."""
    row = meter.row(0, {})
    return {name: row[name] for name in _MEMORY if row[name] is not None}


def _bare(env: Any, policy: Any, calls: Counter[Call]) -> tuple[float | None, str]:
    """Seconds of these calls made bare, and why there are none."""
    if policy.gradient_checkpointing:
        calls = without_recomputed(calls)
    if not calls:
        return None, ""
    try:
        return bare_cost(calls, bare_seconds(env, policy, calls)), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None, "out of memory in the bare calls"


def attempt(measure: Callable[[], dict[str, object]]) -> dict[str, object]:
    """A row's figures, or why there are none: no memory, or an algorithm that refuses this batch."""
    try:
        return measure()
    except Exception as error:
        full = is_out_of_memory(error)
        if not full and not isinstance(error, ValueError | TypeError | OSError | FloatingPointError):
            raise
        told = f"out of memory: {first_line(error)}" if full else one_line(error)
    # Out here, where the error and with it the networks' activations are gone.
    return {"error": told}


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def clear(device: torch.device) -> None:
    """Gives memory back that nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
