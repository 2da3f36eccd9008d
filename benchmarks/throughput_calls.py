"""What an update should cost at least: the network calls it made, at the price of the same calls made bare.

    bare_s = sum over calls outside the rollouts of (seconds of that call alone),   update_per_bare = update_s / bare_s

`update_s` is all of an update but rollout, decoding and scoring. The calls are counted where they are made, by kind and
number of videos: each guidance branch is a video of its own, as in the environment's counters.

| kind            | what it is                                          | its price                           |
|-----------------|-----------------------------------------------------|-------------------------------------|
| forward         | without a graph: a reference, an old policy         | `model.predict` under no_grad       |
| graph_forward   | with a graph                                        | `model.predict` with the graph kept |
| backward        | to the trained weights; of a forward in the rollout | the gradient of that output         |
|                 | too (VADER)                                         |                                     |
| reward_backward | from scores to latents, through reward and decoder  | the gradient of score(decode(x))    |

For DDPO and the like every (video, step) is one graph_forward and one backward for each branch, so that the ratio is
the update's cost of a (video, step) against one forward and backward of the bare network. A reference's pass is
accounted for as what it is, one pass without a graph. Forwards inside a rollout belong to `rollout_s` and are left out
here; they are told apart by what opens a rollout (`env.reset`) and closes it (the environment's own clock).

The bare calls are made right after the update, in the same process, with its batch sizes, number format and LoRA. They
have no guidance arithmetic, loss, optimiser or copies, and a critic's network is not priced either: all of that is in
the ratio. With gradient checkpointing or offloading, or where all weights are trained, the bare call goes through
`policy.predict`, which alone knows these, and what is recomputed is part of the backward.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from vdm_env.mdp import Counters

FORWARD, GRAPH_FORWARD, BACKWARD = "forward", "graph_forward", "backward"
REWARD_BACKWARD = "reward_backward"
Call = tuple[str, int]
"""kind and videos of a call"""
_KINDS = {"denoiser_backwards": BACKWARD, "reward_backward_queries": REWARD_BACKWARD}
_WATCHED = ("denoiser_forwards", "rollout_s", *_KINDS)


class Ledger(Counters):
    """Counters of an environment that also keep, inside `recording()`, the calls made outside rollouts.

    Args:
        counts: to begin with, by the names of `Counters`.
    """

    def __init__(self, **counts: Any) -> None:
        object.__setattr__(self, "_on", False)
        super().__init__(**counts)
        self._outside: Counter[Call] = Counter()
        self._rollout: Counter[Call] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        grown = value - getattr(self, name) if self._on and name in _WATCHED else 0
        super().__setattr__(name, value)
        if grown <= 0:
            return
        if name == "rollout_s":  # what was called since the reset is in these seconds
            self._rollout = None
        elif name == "denoiser_forwards":
            kind = GRAPH_FORWARD if torch.is_grad_enabled() else FORWARD
            (self._outside if self._rollout is None else self._rollout)[kind, grown] += 1
        else:
            self._outside[_KINDS[name], grown] += 1

    def reset(self) -> None:
        """A rollout begins; the one before, if nobody took its time, was none."""
        self._outside += self._rollout or Counter()
        self._rollout = Counter()

    @contextmanager
    def recording(self, env: Any) -> Iterator[Counter[Call]]:
        """Inside, keeps the calls made with an environment whose counters these are; afterwards the counter has them.

        Yields:
            {(kind, videos): calls}, filled when the context ends.
        """
        found: Counter[Call] = Counter()
        # In the class: an algorithm may sample with a twin of the environment, on the same counters.
        kind: Any = next(one for one in type(env).__mro__ if "reset" in vars(one))
        reset = kind.reset

        def noted(this: Any, *args: Any, **options: Any) -> Any:
            if this.mdp.counters is self:
                self.reset()
            return reset(this, *args, **options)

        self._outside, self._rollout = Counter(), None
        with patch.object(kind, "reset", noted):
            self._on = True
            try:
                yield found
            finally:
                self._on = False
                self.reset()
                found.update(self._outside)


def without_recomputed(calls: Mapping[Call, int]) -> Counter[Call]:
    """The calls of an update with gradient checkpointing, less the forwards that belong to its backwards."""
    found = Counter(calls)
    for (kind, videos), number in calls.items():
        if kind == BACKWARD:
            found[GRAPH_FORWARD, videos] -= number
    return +found


def bare_cost(calls: Mapping[Call, int], seconds: Mapping[Call, float]) -> float:
    """Seconds of these calls at these prices."""
    return sum(number * seconds[call] for call, number in calls.items())


def bare_seconds(
    env: Any, policy: Any, calls: Mapping[Call, int], *, repeats: int = 3, clock: Callable[[], float] | None = None
) -> dict[Call, float]:
    """The price of each of these calls, the median of some. Gradients that are there stay as they are.

    Args:
        env: the environment.
        policy: that is trained in it.
        calls: whose prices are wanted.
        repeats: of each call.
        clock: seconds with the device's queue drained; None: the environment's.
    """
    clock = clock or env.mdp.clock
    found: dict[Call, float] = {}
    for videos in sorted({videos for kind, videos in calls if kind != REWARD_BACKWARD}):
        kinds = {kind for kind, width in calls if width == videos}
        found |= {(kind, videos): value for kind, value in _network(env, policy, videos, kinds, repeats, clock).items()}
    for kind, videos in calls:
        if kind == REWARD_BACKWARD:
            found[kind, videos] = statistics.median(_reward_backward(env, videos, clock) for _ in range(repeats))
    return found


def _network(
    env: Any, policy: Any, videos: int, kinds: set[str], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    x = env.mdp.initial_latents(torch.arange(videos))
    t = env.mdp.table.timesteps[:1].to(x).expand(videos)
    prompts = _prompts(env, videos)
    with torch.no_grad():
        policy.predict(x, t, prompts)  # a first call: the policy's own LoRA is the one that acts from here on
    call = _call(env, policy, x, t, prompts)
    spent: dict[str, list[float]] = {FORWARD: [], GRAPH_FORWARD: [], BACKWARD: []}
    trained = [parameter for parameter in policy.trainable_parameters() if parameter.requires_grad]
    for _ in range(repeats):
        if FORWARD in kinds:
            with torch.no_grad():
                started = clock()
                call()
                spent[FORWARD].append(clock() - started)
        if kinds & {GRAPH_FORWARD, BACKWARD}:
            with torch.enable_grad():
                started = clock()
                output = call()
                between = clock()
                torch.autograd.grad(output.sum(), trained, allow_unused=True)
                ended = clock()
            spent[GRAPH_FORWARD].append(between - started)
            spent[BACKWARD].append(ended - between)
    return {kind: statistics.median(values) for kind, values in spent.items() if values}


def _call(env: Any, policy: Any, x: Tensor, t: Tensor, prompts: list[int]) -> Callable[[], Tensor]:
    if not policy.lora_rank or policy.gradient_checkpointing or policy.offload_activations:
        return lambda: policy.predict(x, t, prompts)
    condition = env.mdp.condition(prompts)
    return lambda: env.model.predict(x, t, condition)


def _reward_backward(env: Any, videos: int, clock: Callable[[], float]) -> float:
    seeds = torch.arange(videos)
    texts = [env.prompts[i] for i in _prompts(env, videos)]
    with torch.enable_grad():
        latents = env.mdp.initial_latents(seeds).requires_grad_()
        score = env.mdp.score(env.mdp.decode(latents, env.mdp.frames_of(seeds)), texts)
        started = clock()
        torch.autograd.grad(score.sum(), latents)
        return float(clock() - started)


def _prompts(env: Any, videos: int) -> list[int]:
    ids: list[int] = env.prompt_ids()
    return [ids[i % len(ids)] for i in range(videos)]
