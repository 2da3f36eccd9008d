"""The network's frozen weights, dealt out to the processes: FSDP, for models that leave too little room on a device.

Every process keeps its share of the frozen weights and gets the others' block by block when it calls the network
(`torch.distributed.fsdp.fully_shard`). The LoRA stays whole everywhere, as do its gradients and its optimiser, so that
nothing else changes: what is trained is what would be trained without. `accelerate launch --use_fsdp` asks for it, and
`algos.run` does it.

Processes have to call the network equally often. Where an algorithm would deal them different numbers of micro-batches
it is refused (`distributed.Ranks.rows`, `distributed.Ranks.check_even`).

Limits: LoRA only. The network is loaded whole by each process before it is dealt out, so its weights alone have to fit
a device. Tested with gloo on CPUs, and with no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from algos.distributed import current


def shard_network(env: Any, policy: Any) -> None:
    """Deals out the frozen weights of an env's network; one that was dealt out before is left as it is.

    Args:
        env: has `mdp.model.denoiser` and `device`.
        policy: a LoRA on that network.

    Raises:
        ValueError: a policy that trains all weights.
    """
    network = env.mdp.model.denoiser
    if isinstance(network, FSDPModule):
        return
    if not getattr(policy, "lora_rank", 0):
        raise ValueError(
            "FSDP deals out frozen weights, and this policy trains all of them; give it a LoRA (lora_rank=16), or "
            "launch without --use_fsdp"
        )
    mesh = init_device_mesh(env.device.type, (current().world,))
    trained = {parameter for parameter in network.parameters() if parameter.requires_grad}
    trained |= set(policy.trainable_parameters())
    for block in (*_blocks(network), network):
        fully_shard(block, mesh=mesh, ignored_params=trained)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost elements of module lists: a transformer's layers, or the stages of a U-Net."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
