"""Memory of reward back-propagation, counted exactly: what autograd keeps from the forward to the backward pass.

`SavedBytes` is VADER with such a count around each update, for `--algo benchmarks.experiments.saved_bytes:SavedBytes`.
The count is the peak of the bytes of all tensors kept at once, each storage once. Weights are left out, and so is what
`offload_activations` moves to main memory (on a CPU that is the same memory; the count says what a GPU would keep). It
is the same on every machine and in every run.

Not counted: what a gradient checkpoint computes again, which is kept for one part of the network at a time, and
temporary results inside an operation.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_MIB = 2**20


@dataclass(kw_only=True)
class Ledger:
    """Bytes that are kept now, and their peak."""

    now: int = 0
    peak: int = 0
    holders: dict[int, int] = field(default_factory=dict)
    """by address of a storage, how many kept tensors lie in it"""

    def hold(self, tensor: Tensor) -> Held:
        """Notes a tensor that is kept until what is returned is gone."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.holders:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.holders[address] = self.holders.get(address, 0) + 1
        return Held(tensor, address, size, self)

    def release(self, address: int, size: int) -> None:
        """A tensor of a storage is gone."""
        self.holders[address] -= 1
        if not self.holders[address]:
            del self.holders[address]
            self.now -= size


class Held:
    """A tensor that autograd keeps."""

    __slots__ = ("address", "ledger", "size", "tensor")

    def __init__(self, tensor: Tensor, address: int, size: int, ledger: Ledger) -> None:
        self.tensor, self.address, self.size, self.ledger = tensor, address, size, ledger

    def __del__(self) -> None:
        self.ledger.release(self.address, self.size)


@contextmanager
def counting(weights: Iterable[Tensor]) -> Iterator[Ledger]:
    """Counts what autograd keeps of calls inside, without these weights; hooks further inside take theirs away."""
    from torch.autograd.graph import saved_tensors_hooks

    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    ledger = Ledger()

    def pack(tensor: Tensor) -> Tensor | Held:
        return tensor if tensor.untyped_storage().data_ptr() in own else ledger.hold(tensor.detach())

    def unpack(packed: Tensor | Held) -> Tensor:
        return packed.tensor if isinstance(packed, Held) else packed

    with saved_tensors_hooks(pack, unpack):
        yield ledger


def weights() -> list[Tensor]:
    """Of all modules in this process: denoiser, decoder and reward are there with or without a graph."""
    from torch import nn

    # By type: isinstance asks some objects for __class__, and lazy ones among them then load or warn.
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    return [tensor for one in modules for tensor in (*one.parameters(recurse=False), *one.buffers(recurse=False))]


class SavedBytes:
    """VADER whose updates report saved_mib, state_mib and training_mib (their sum) beside its own numbers.

    state_mib: trained weights, their gradients and the optimiser's state.

    Args:
        env: vector env with a differentiable reward; one batch of its videos makes an update.
        policy: from `env.make_policy`.
        backprop_steps: K, denoising steps with a graph; None: all of them.
        autocast: mixed precision: activations in bfloat16, weights as they are.
        learning_rate: of AdamW.
        seed: see `VADERConfig`.

    Raises:
        ValueError: see `algos.vader.VADER`.
    """

    def __init__(
        self,
        env: Any,
        policy: Any,
        backprop_steps: int | None = 1,
        autocast: bool = False,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        from algos.vader import VADER, VADERConfig

        config = VADERConfig(
            learning_rate=learning_rate,
            backprop_steps=backprop_steps or env.num_steps,
            videos_per_update=env.num_envs,
            seed=seed,
        )
        self.algorithm = VADER(env, policy, config)
        self.env, self.policy, self.config, self.autocast = env, policy, config, autocast

    def update(self) -> dict[str, float]:
        """One update of VADER.

        Returns:
            VADER's numbers, and the three above in MiB.

        Raises:
            FloatingPointError: see `VADER.update`.
        """
        import torch

        trained = self.policy.trainable_parameters()
        device = torch.device(self.env.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast), counting(weights()) as ledger:
            row = self.algorithm.update()
        moments = [value for state in self.algorithm.optimizer.state.values() for value in state.values()]
        kept = [*trained, *(p.grad for p in trained if p.grad is not None), *(v for v in moments if torch.is_tensor(v))]
        state = sum(tensor.numel() * tensor.element_size() for tensor in kept)
        return {
            **row,
            "saved_mib": ledger.peak / _MIB,
            "state_mib": state / _MIB,
            "training_mib": (ledger.peak + state) / _MIB,
        }

    def state_dict(self) -> dict[str, Any]:
        """VADER's."""
        return self.algorithm.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken."""
        self.algorithm.load_state_dict(state)
