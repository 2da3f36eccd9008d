"""Runs an update, or sampling, on shapes alone and adds up what it holds and moves. See `benchmarks.predict`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from algos.zoo import recipe
from benchmarks.bench_options import arms, with_settings
from benchmarks.model_sizes import networks
from benchmarks.options import chosen_frames, make_env, make_policy
from benchmarks.shapes import Operation, Shapes
from benchmarks.shapes_rules import KINDS
from benchmarks.throughput_measure import embed_prompts, largest_group, one_update, sample
from benchmarks.training import build_algorithm
from vdm_env.models import visiting
from vdm_env.models.fast_path import plain

GIB = 2**30
PHASES = ("prompts", "sampling", "graph steps", "decode", "reward", "backward", "other")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Of a device."""

    flops: float
    """operations a second in large products"""
    bytes: float
    """bytes a second to and from its memory"""
    launch_s: float = 0.0
    """seconds that every kernel takes at least"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Sums over some operations."""

    kernels: int
    """at least: copies made inside convolutions count, kernels that one operation starts beside its own do not"""
    tflop: float
    gb: dict[str, float]
    """{kind: 10^9 bytes read and written}, copies inside convolutions among the copies"""
    turned_gb: float
    """10^9 bytes more, were cuDNN to turn every half-precision convolution to channels last and back"""
    seconds: dict[str, float]
    """{kind: roofline seconds}; nothing without rates"""
    launch_bound_s: float
    """the same sum with no kernel below `Rates.launch_s`, 0 without"""
    copies_gb: dict[str, float]
    """{code that copies: 10^9 bytes}, the largest first"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What was counted."""

    env: Any
    weights: dict[str, int]
    """{part: bytes}; text encoders that rest in main memory are not on the card"""
    trained: int
    """bytes of trained weights, gradients and the optimiser's state"""
    kept: int
    """bytes that a backward pass finds at its beginning beside weights, optimiser and conditions"""
    peaks: dict[str, int]
    """{phase: bytes}"""
    at_peak: dict[str, dict[str, int]]
    """{phase: {who made it: bytes}}, the largest first"""
    step: Traffic
    """one guided step of sampling, of all videos side by side"""
    phases: dict[str, Traffic]
    """of the whole call"""
    calls: dict[str, int]
    """of the denoiser, {"sampling": without a graph, "graph steps": with one}"""
    note: str

    @property
    def peak(self) -> int:
        """Bytes of the card that the call holds at most; embedding new prompts is apart."""
        return max(size for phase, size in self.peaks.items() if phase != "prompts")

    def seconds(self, num_steps: int) -> float:
        """Roofline seconds of the call, were it of so many denoising steps."""
        found = {phase: sum(one.seconds.values()) for phase, one in self.phases.items()}
        each = found.pop("sampling", 0.0) / max(1, self.calls["sampling"])
        return sum(found.values()) + each * (num_steps - self.calls["graph steps"])


def add_up(operations: Sequence[Operation], rates: Rates | None) -> Traffic:
    """Sums; a roofline second is the sum over operations of max(flops / rate, bytes / bandwidth)."""
    gb, seconds, copies = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0), dict[str, float]()
    kernels, launch_bound = 0, 0.0
    for one in operations:
        gb[one.kind] += one.bytes / 1e9
        gb["copies"] += one.inside / 1e9
        kernels += 1 + bool(one.inside)
        if one.kind == "copies" or one.inside:
            copies[one.where] = copies.get(one.where, 0.0) + (one.inside or one.bytes) / 1e9
        if rates is not None:
            own, inside = max(one.flops / rates.flops, one.bytes / rates.bytes), one.inside / rates.bytes
            seconds[one.kind] += own
            seconds["copies"] += inside
            launch_bound += max(own, rates.launch_s) + (max(inside, rates.launch_s) if inside else 0.0)
    return Traffic(
        kernels=kernels,
        tflop=sum(one.flops for one in operations) / 1e12,
        gb=gb,
        turned_gb=sum(one.turned for one in operations) / 1e9,
        seconds=seconds if rates is not None else {},
        launch_bound_s=launch_bound if rates is not None and rates.launch_s else 0.0,
        copies_gb=dict(sorted(copies.items(), key=lambda item: -item[1])),
    )


def predict(config: Any, rates: Rates | None = None) -> Prediction:
    """Counts what a `PredictConfig` asks for.

    Raises:
        ValueError, TypeError, OSError: whatever the environment or the algorithm refuses.
        RuntimeError: code that needs numbers where there are shapes alone.
    """
    shapes = Shapes()
    memory = shapes.memory
    with shapes, _as_a_card(shapes), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights mean nothing, which is meant
        found = recipe(config.algo) if config.algo else None
        env = _make(config, found)
        if config.plain:
            plain(env.model.denoiser)
        weights = _place(env, shapes)
        embed_prompts(env)
        prompts = memory.peaks.get("prompts", 0)
        before = memory.now
        policies: list[Any] = []

        def policy_made() -> Any:
            policies.append(make_policy(env, config.policy))
            memory.lie(policies[0].trainable_parameters(), True, "other", "trained weights")
            return policies[0]

        if found is None:
            policy_made()
            call, note = partial(sample, env, policies[0]), "sampling alone"
        else:
            (arm,) = with_settings(arms((config.algo,)), config.set)
            chosen = {**one_update(found.config, config.batch), **arm.settings}
            _, algorithm, _, note = build_algorithm(found, env, policy_made, chosen, seed=0)
            call = algorithm.update
            _make_state(algorithm, call)
        calls = _say_phases(env, shapes)
        trained = memory.now - before + (memory.size_of(policies[0].trainable_parameters()) if found else 0)
        at_rest = memory.now
        memory.forget_peaks()
        shapes.kept, shapes.operations = 0, []
        call()
        memory.settle()
        operations, shapes.operations = shapes.operations, []
        peaks, made_calls = dict(memory.peaks), dict(calls)
        at_peak = {phase: dict(made.most_common()) for phase, made in memory.at_peak.items()}
        with torch.no_grad():
            policies[0](env.reset()[0])
        step = [one for one in shapes.operations if one.phase == "sampling"]
    return Prediction(
        env=env,
        weights=weights,
        trained=trained,
        kept=max(0, shapes.kept - at_rest),
        peaks=peaks | ({"prompts": prompts} if prompts else {}),
        at_peak=at_peak,
        step=add_up(step, rates),
        phases={p: add_up(some, rates) for p in PHASES if (some := [one for one in operations if one.phase == p])},
        calls=made_calls,
        note=note,
    )


def _make_state(algorithm: Any, update: Callable[[], Any]) -> None:
    """Makes the state that an optimiser has from its first step on."""
    optimizer = getattr(algorithm, "optimizer", None)
    if optimizer is None:
        update()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _make(config: Any, found: Any) -> Any:
    """The environment, at the size of the batch, with what suits the algorithm."""
    suited = dict(found.env) if found is not None else {}
    suited = {name: value for name, value in suited.items() if getattr(config.process, name, None) is None}
    group = largest_group(int(suited.pop("group_size", 1)), config.batch)
    process = replace(config.process, num_steps=config.run_steps)
    frames = chosen_frames(config.decode_frames)
    more = {**suited, **({} if frames is None else {"decode_frames": frames})}
    return make_env(config.env_id, process, num_envs=config.batch, group_size=group, **more)


@contextmanager
def _as_a_card(shapes: Shapes) -> Iterator[None]:
    """Inside, an environment may be made of shapes alone, and text encoders that visit the card are seen."""

    class Visitors(set[nn.Module]):
        def add(self, encoder: nn.Module) -> None:
            super().add(encoder)
            shapes.memory.lie(encoder.parameters(), True, "prompts")
            shapes.phase = "prompts"

        def discard(self, encoder: Any) -> None:
            super().discard(encoder)
            shapes.memory.lie(encoder.parameters(), False, "prompts")
            shapes.phase = "other"

    with patch("vdm_env.making.check_place"), patch.object(visiting, "_VISITORS", Visitors()):
        yield


def _place(env: Any, shapes: Shapes) -> dict[str, int]:
    """Says what the tensors of the model and the reward are, and gives {part: bytes}."""
    text = list(networks(getattr(env.model, "text", None)))
    others = [one for one in networks(env.model) if one is not env.model.denoiser and one not in text]
    parts = {"denoiser": [env.model.denoiser], "autoencoder": others, "rewards": list(_networks_of(env.mdp.reward))}
    sizes = {}
    for part, some in {"text encoder": text, **parts}.items():
        own = [tensor for one in some for tensor in (*one.parameters(), *one.buffers())]
        rests = part == "text encoder" and getattr(env.model.text, "device", None) is not None
        shapes.memory.lie(own, not rests, "other", f"weights: {part}")
        sizes[part] = shapes.memory.size_of(own)
    return sizes


def _networks_of(thing: Any) -> Iterator[nn.Module]:
    """The networks that a reward holds, or its parts do."""
    if isinstance(thing, nn.Module):
        yield thing
    elif isinstance(thing, list | tuple):
        for one in thing:
            yield from _networks_of(one)
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from _networks_of(getattr(thing, field.name))
    elif type(thing).__module__.startswith("vdm_env."):
        for one in vars(thing).values():
            yield from _networks_of(one)


def _say_phases(env: Any, shapes: Shapes) -> dict[str, int]:
    """From here on the environment says what it does; returns the denoiser's calls, {phase: calls}, as they come."""
    calls = dict.fromkeys(("sampling", "graph steps"), 0)

    def begins(*_: Any) -> None:
        shapes.phase = "graph steps" if torch.is_grad_enabled() else "sampling"
        if shapes.operations is not None and shapes.now() in calls:
            calls[shapes.phase] += 1

    def ends(*_: Any) -> None:
        shapes.phase = "other"

    def during(phase: str, call: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            with shapes.during(phase):
                return call(*arguments, **options)

        return wrapped

    env.model.denoiser.register_forward_pre_hook(begins)
    env.model.denoiser.register_forward_hook(ends)
    env.mdp.decode = during("decode", env.mdp.decode)
    env.mdp._score = during("reward", env.mdp._score)
    return calls
