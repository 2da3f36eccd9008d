"""Several processes that train one policy together: who is who, and what they tell each other.

`accelerate launch --multi_gpu --num_processes 2 program.py` (or `torchrun --nproc-per-node 2`) runs the same program
in every process. Each simulates its part of a wider env (`vdm_env.starts.Shard`): `num_envs` and `micro_batch` are of
one process, the numbers of videos and pairs in an algorithm's config are of all. Rewards are gathered before they are
compared, each process makes the gradient of its own part, and the parts are added up before clipping: w processes of B
videos are one process of w B videos, but for the order of sums. Random draws are made for everybody and cut afterwards.

All functions do nothing where there is one process. Every process has to make the same calls in the same order.

Tested with gloo on CPUs. On GPUs tensors are sent by NCCL where they are there and by gloo where they are on the CPU,
which no test of this package has seen.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from algos.launch import HOW, LaunchError, launched
from vdm_env.starts import Shard

_TIMEOUT = timedelta(hours=2)
"""that a process may be waited for"""
_GRACE_S = 3.0
"""in which processes that noticed a failure say so, before a silent one counts as gone"""
_BUCKET = 1 << 26
"""elements of gradient that are sent at once"""


class PeerError(Exception):
    """Another process of the run has ended; the message says which, and why if it could still say so."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    """number of this process, 0 .. world - 1; 0 writes the files"""
    world: int = 1
    """how many there are"""
    sharded: bool = False
    """they share one network (`algos.fsdp`), and have to call it equally often"""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all processes in order of rank, without a graph; numbers of rows may differ."""
        if self.world == 1:
            return values
        values = values.detach().contiguous()
        with self._together():
            counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
            dist.all_gather(counts, torch.tensor([len(values)]))
            sizes = [int(count) for count in counts]
            padded = values
            if len(values) < max(sizes):
                padded = torch.cat([values, values.new_zeros(max(sizes) - len(values), *values.shape[1:])])
            parts = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def own(self, values: Tensor) -> Tensor:
        """This process's rows of a table that has as many of each: what `gather` has put there."""
        return values.chunk(self.world)[self.rank] if self.world > 1 else values

    def rows(self, count: int) -> slice:
        """The rows of `count` that this process works on: neighbours, as many as the others have, give or take one.

        Raises:
            ValueError: not as many as the others, and they share one network.
        """
        if self.sharded and count % self.world:
            raise ValueError(
                f"{count} videos or pairs cannot be dealt evenly to {self.world} processes, which share one network "
                f"and have to call it equally often; choose a multiple of {self.world}, or launch without --use_fsdp"
            )
        return slice(*(r * (count // self.world) + min(r, count % self.world) for r in (self.rank, self.rank + 1)))

    def randn(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Standard normal noise of this shape, cut out of what is drawn for all processes together."""
        return self.own(torch.randn(self.world * shape[0], *shape[1:], generator=generator))

    def totals(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The sum over the processes of each number."""
        if self.world == 1:
            return dict(numbers)
        added = torch.tensor([float(value) for value in numbers.values()], dtype=torch.float64)
        with self._together():
            dist.all_reduce(added)
        return dict(zip(numbers, added.tolist(), strict=True))

    def total(self, number: float) -> float:
        """The sum over the processes."""
        return self.totals({"": number})[""]

    def means(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The mean over the processes of each number."""
        return {name: value / self.world for name, value in self.totals(numbers).items()}

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of the processes."""
        return flag if self.world == 1 else self.total(float(flag)) > 0

    def agreed(self, value: Any) -> Any:
        """What the first process says; the others' own value is dropped."""
        if self.world == 1:
            return value
        said = [value]
        with self._together():
            dist.broadcast_object_list(said, src=0)
        return said[0]

    def check_even(self, calls: int) -> None:
        """Raises ValueError where processes that share one network would call it `calls` times and differ in that."""
        if self.sharded and len(set(self.gather(torch.tensor([calls])).tolist())) > 1:
            raise ValueError(
                "the processes have different numbers of micro-batches of this update, and share one network, which "
                "they have to call equally often; train on all videos and groups, or launch without --use_fsdp"
            )

    def wait(self) -> None:
        """Until all processes are here."""
        self.total(0.0)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Adds up the gradients of all processes, in place; a parameter that has none anywhere keeps none."""
        if self.world == 1:
            return
        for bucket in _buckets(parameters):
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            there = found[0].new_tensor([float(p.grad is not None) for p in bucket])
            flat = torch.cat([*(gradient.flatten() for gradient in found), there])
            with self._together():
                dist.all_reduce(flat)
            *summed, there = flat.split([p.numel() for p in bucket] + [len(bucket)])
            for p, gradient, count in zip(bucket, summed, there.tolist(), strict=True):
                p.grad = gradient.view_as(p).clone() if count else None

    def check_same(self, parameters: Iterable[Tensor]) -> None:
        """Raises RuntimeError unless all processes have these very values."""
        if self.world == 1:
            return
        digest = hashlib.sha256()
        for parameter in parameters:
            digest.update(parameter.detach().flatten().cpu().view(torch.uint8).numpy().tobytes())
        own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
        for rank, other in enumerate(self.gather(own[None])):
            if not torch.equal(other, own):
                raise RuntimeError(
                    f"the weights of process {rank} are not those of process {self.rank}: build the policy from one "
                    f"seed and one file everywhere, and add gradients up with distributed.current().sum_gradients(...) "
                    f"before each optimiser step, as algos.training.optimiser_step does"
                )

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around a collective call, which fails where another process is gone."""
        try:
            yield
        except RuntimeError as error:
            raise PeerError(self._cause()) from error

    def _cause(self) -> str:
        """What the others have left behind."""
        others = [r for r in range(self.world) if r != self.rank]
        try:
            store = _store()
            store.set(_key(self.rank), "")  # noticed, and still here
            until = time.monotonic() + _GRACE_S
            while True:
                said = {r: store.get(_key(r)).decode() for r in others if store.check([_key(r)])}
                for rank, text in said.items():
                    if text:
                        return f"process {rank} of {self.world} has failed: {text}"
                silent = [r for r in others if r not in said]
                if not silent or time.monotonic() > until:
                    break
                time.sleep(0.05)
        except RuntimeError:  # the store was process 0's
            silent = [0]
        if not silent:
            return f"the connection between the {self.world} processes broke down; the network's fault, or a time-out"
        return f"process {', '.join(map(str, silent))} of {self.world} is gone without a word: killed, or out of memory"


def current() -> Ranks:
    """The processes of this run. The first call connects them, where a launcher has started several.

    Raises:
        LaunchError: see `launch.launched`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        world = launched(os.environ)
        if world == 1:
            return Ranks()
        _connect(world)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    return Ranks(rank=dist.get_rank(), world=dist.get_world_size(), sharded=sharded and dist.get_world_size() > 1)


def _connect(world: int) -> None:
    from accelerate import PartialState

    # PartialState alone would take processes without GPUs for single ones, and let each train by itself.
    cuda = torch.cuda.is_available()
    PartialState(cpu=not cuda, backend="cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=_TIMEOUT)
    if not dist.is_initialized() or dist.get_world_size() != world:
        raise LaunchError(f"WORLD_SIZE={world}, but the processes did not find each other; {HOW}")
    atexit.register(_disconnect)


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard_env(env: Any) -> None:
    """Makes an env this process's part of the wider one.

    Raises:
        TypeError: there are several processes, and the env has no `shard`.
    """
    ranks = current()
    if ranks.world == 1:
        return
    if not hasattr(env, "shard"):
        raise TypeError(
            f"{type(env).__name__} has no attribute 'shard', and {ranks.world} processes would all simulate the same "
            f"videos; use an env of vdm_env.make, or give yours one (see vdm_env.starts.Shard)"
        )
    env.shard = Shard(rank=ranks.rank, world=ranks.world)


@contextmanager
def announcing() -> Iterator[None]:
    """Around the work of a process: what ends it is left behind for the others, who will notice that it is gone."""
    try:
        yield
    except PeerError:
        raise
    except BaseException as error:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            try:
                _store().set(_key(dist.get_rank()), f"{type(error).__name__}: {error}")
            except RuntimeError:  # the store was that of a process which is gone
                pass
        raise


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _key(rank: int) -> str:
    return f"vdm_env/ended/{rank}"


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in their order, of one type and device each, and not too many at once."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        full = sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET
        if bucket and (full or kind != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
