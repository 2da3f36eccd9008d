"""Floating-point operations of training: counts of the environment times what one of each costs, measured once.

    flops = sum over counters of count * cost of one

counters being denoiser forwards and backwards, videos decoded, reward queries and reward backwards. A cost is measured
on one video with torch's flop counter, at the environment's shapes, the first time its counter is not 0. Torch counts
matrix products, convolutions and attention, a multiply-add as two operations; element-wise ones are left out, and so
is what does not run through torch in this process (a remote reward). Text and image encoders run once per prompt and
are left out. A backward goes as far as the policy trains. What a checkpoint recomputes in it belongs to it,
except whole forwards of the denoiser, which the environment counts as such.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from algos.random_state import get_random_state, set_random_state

DENOISER = ("denoiser_forwards", "denoiser_backwards")
"""counters whose cost is the denoiser's"""
PRICES = {
    "denoiser_forwards": ("denoiser_forward",),
    "denoiser_backwards": ("denoiser_backward",),
    "videos_sampled": ("decode",),
    "reward_queries": ("reward",),
    "reward_backward_queries": ("decode_backward", "reward_backward"),
}
"""what one of each counter costs: every video that is sampled is decoded, and a reward's gradient goes through its
decoder"""

_SEED = 0  # of the video that is measured; operations do not depend on it


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# The counter of older releases of PyTorch knows the attention kernels of GPUs only.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call, by `torch.utils.flop_counter`."""
    # It warns where a checkpoint runs modules again in the backward pass; the sum over all modules is right.
    logger = logging.getLogger("torch.utils.module_tracker")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            call()
    finally:
        logger.setLevel(level)
    return int(counter.get_total_flops())


@dataclass(kw_only=True)
class Flops:
    """Costs that were measured so far, and why others could not be."""

    env: Any
    """the training environment"""
    policy: Any
    """that is trained, with `predict(x_t, t, prompt_ids)` and `trainable_parameters()`"""
    costs: dict[str, int] = field(default_factory=dict)
    """operations of one call, for one video"""
    notes: dict[str, str] = field(default_factory=dict)
    """why a cost is unknown"""

    def missing(self, counts: Mapping[str, float]) -> list[str]:
        """Costs that are needed for these counts and were not measured yet."""
        return [
            price
            for name, prices in PRICES.items()
            if counts[name]
            for price in prices
            if price not in self.costs and price not in self.notes
        ]

    def measure(self, prices: list[str]) -> None:
        """Measures these costs. Random states, counters and gradients are afterwards what they were; never raises."""
        for price in prices:
            try:
                with _untouched(self.env):
                    self.costs[price] = _MEASURES[price](self.env, self.policy)
            except Exception as error:
                self.notes[price] = f"{type(error).__name__}: {error}"

    def of(self, counts: Mapping[str, float], names: tuple[str, ...] = tuple(PRICES)) -> int | None:
        """Operations for these counts; None where a cost that enters is unknown."""
        wanted = [(counts[name], price) for name in names for price in PRICES[name] if counts[name]]
        if any(price not in self.costs for _, price in wanted):
            return None
        return sum(int(count) * self.costs[price] for count, price in wanted)

    def note(self) -> str:
        """Why the column flops is null; empty where it is not."""
        return "; ".join(f"{price} was not measured: {why}" for price, why in self.notes.items())

    def state_dict(self) -> dict[str, Any]:
        return {"costs": dict(self.costs), "notes": dict(self.notes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.costs, self.notes = dict(state["costs"]), dict(state["notes"])


@contextmanager
def _untouched(env: Any) -> Iterator[None]:
    """Puts random states and the environment's counters back, whatever its body does."""
    counters = env.mdp.counters
    names = [one.name for one in fields(counters)] if is_dataclass(counters) else list(vars(counters))
    before = {name: getattr(counters, name) for name in names}
    state = get_random_state(env.device)
    try:
        yield
    finally:
        set_random_state(state, env.device)
        for name, value in before.items():
            setattr(counters, name, value)


def _denoiser(env: Any, policy: Any, *, backward: bool) -> tuple[int, int, int]:
    """Operations of one conditional pass on one video, and how many forwards and backwards the env counted in it."""
    mdp, prompt = env.mdp, _prompt(env)
    x = mdp.initial_latents(torch.tensor([_SEED]))
    t = mdp.table.timesteps[:1].to(x)
    with torch.no_grad():
        mdp.condition([prompt])  # embedded before, so that the text encoder is not in it
    before = mdp.counters.denoiser_forwards, mdp.counters.denoiser_backwards

    def call() -> None:
        with torch.set_grad_enabled(backward):
            output = policy.predict(x, t, [prompt])
            if backward:
                # Not .backward(): gradients that are there must stay as they are.
                torch.autograd.grad(output.sum(), _trained(policy), allow_unused=True)

    found = count_flops(call)
    return found, mdp.counters.denoiser_forwards - before[0], mdp.counters.denoiser_backwards - before[1]


def _trained(policy: Any) -> list[Tensor]:
    return [parameter for parameter in policy.trainable_parameters() if parameter.requires_grad]


def _denoiser_forward(env: Any, policy: Any) -> int:
    found, forwards, _ = _denoiser(env, policy, backward=False)
    return found // max(1, forwards)


def _denoiser_backward(env: Any, policy: Any) -> int:
    forward = _denoiser_forward(env, policy)
    found, forwards, backwards = _denoiser(env, policy, backward=True)
    # A policy that counts the forward a checkpoint recomputes has paid for it already.
    return (found - max(1, forwards) * forward) // max(1, backwards)


def _decode(env: Any, _: Any) -> int:
    return count_flops(lambda: _decoded(env))


def _decode_backward(env: Any, _: Any) -> int:
    # A view, here and below: torch's counter cannot follow a module whose input is the leaf itself.
    def both() -> None:
        with torch.enable_grad():
            latents = env.mdp.initial_latents(torch.tensor([_SEED])).requires_grad_()
            torch.autograd.grad(_video(env, latents.view_as(latents)).sum(), latents)

    return count_flops(both) - count_flops(lambda: _decoded(env))


def _reward(env: Any, _: Any) -> int:
    video = _decoded(env)
    with torch.no_grad():
        return count_flops(lambda: _scored(env, video))


def _reward_backward(env: Any, _: Any) -> int:
    video = _decoded(env).clone().requires_grad_()

    def both() -> None:
        with torch.enable_grad():
            torch.autograd.grad(_scored(env, video.view_as(video)).sum(), video)

    with torch.no_grad():
        forward = count_flops(lambda: _scored(env, video))
    return count_flops(both) - forward


_MEASURES: dict[str, Callable[[Any, Any], int]] = {
    "denoiser_forward": _denoiser_forward,
    "denoiser_backward": _denoiser_backward,
    "decode": _decode,
    "decode_backward": _decode_backward,
    "reward": _reward,
    "reward_backward": _reward_backward,
}


def _prompt(env: Any) -> int:
    return int(env.prompt_ids()[0])


def _video(env: Any, latents: Tensor) -> Tensor:
    return env.mdp.decode(latents, env.mdp.frames_of(torch.tensor([_SEED])))


@torch.no_grad()
def _decoded(env: Any) -> Tensor:
    return _video(env, env.mdp.initial_latents(torch.tensor([_SEED])))


def _scored(env: Any, video: Tensor) -> Tensor:
    return env.mdp.score(video, [env.mdp.prompts[_prompt(env)]])
