"""What saves memory in training: activations that wait in main memory, and prompts without their text encoder.

The other savers have a place of their own: `gradient_checkpointing` of policies; `decode_frames`, `tile_decoding`,
`decode_chunk` and `dtype` of `make`. Text encoders of large models rest in main memory (`vdm_env.models.visiting`), and
autoencoders take few frames at a time and are computed anew in the backward pass (`vdm_env.models.codec`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from vdm_env.rewards.known_texts import with_known_texts

if TYPE_CHECKING:
    from vdm_env.env import DenoisingVectorEnv

EMBEDDED_AT_ONCE = 8
"""Prompts that a text encoder sees together, before it is freed."""


@contextmanager
def activations_in_main_memory(network: nn.Module, on: bool = True) -> Iterator[None]:
    """What autograd keeps of calls inside lies in main memory until the backward pass asks for it.

    `torch.autograd.graph.save_on_cpu` does the same with all that is kept; weights (and views of them) are most of it
    for a short video, and they stay on the device anyway, so here they are left where they are. Values are only
    copied; gradients differ at most in rounding, where a copy lies in memory in another order.

    Args:
        network: whose weights stay.
        on: False does nothing.
    """
    if not on:
        yield
        return
    weights = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if tensor.untyped_storage()._cdata in weights:
            return tensor
        resting = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        # Nothing on the host looks at it; memory that is not pinned may be read before it is filled all the same.
        return tensor.device, resting.copy_(tensor, non_blocking=resting.is_pinned())

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, resting = packed
        back = torch.empty_like(resting, device=device, pin_memory=False)
        return back.copy_(resting, non_blocking=resting.is_pinned())

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@dataclass(frozen=True, kw_only=True, slots=True)
class FreedText:
    """Stands where a text encoder was."""

    model: str

    def __call__(self, prompts: Sequence[str]) -> NoReturn:
        """Raises ValueError, always."""
        raise ValueError(
            f"the text encoder of {self.model} was freed (free_text_encoder=True), so {list(prompts)[:3]} cannot be "
            "embedded; give make(prompts=...) all prompts of every split, or leave free_text_encoder out"
        )


def free_text_encoder(env: DenoisingVectorEnv) -> None:
    """Embeds every prompt of an environment, and the empty one, and lets go of the text encoder.

    Rewards that compare pictures with texts let go of their text towers too, see `vdm_env.rewards.known_texts`.

    The embeddings stay on the environment's device: about 2 MB for a prompt of T5-XXL (226 tokens, 16 bit), 0.3 MB of
    CLIP. Environments derived from this one share them. Prompts that come later cannot be embedded any more. Memory is
    given back once nobody else holds the encoder: a model object of your own still does.

    Raises:
        ValueError: the model is conditioned on images, or keeps its text encoder in no field `text`.
    """
    model: Any = env.model
    has_text = is_dataclass(model) and "text" in {field.name for field in fields(model)}
    if env.mdp.on_images or not has_text:
        raise ValueError(
            f"{model.spec.name} has no text encoder to free"
            + (": images are encoded anew for every video" if env.mdp.on_images else " in a field `text`")
            + "; leave free_text_encoder out"
        )
    ids = list(range(len(env.prompts)))
    for start in range(0, len(ids), EMBEDDED_AT_ONCE):
        condition = env.mdp.condition(ids[start : start + EMBEDDED_AT_ONCE])
    env.mdp.unconditional(1, {name: values[:1] for name, values in condition.items()})
    freed: Any = replace(model, text=FreedText(model=model.spec.name))
    reward = with_known_texts(env.mdp.reward, [env.prompts[number] for number in ids])
    env.model, env.mdp.model, env.mdp.reward = freed, freed, reward
    env.config = replace(env.config, model=freed, reward=reward)
