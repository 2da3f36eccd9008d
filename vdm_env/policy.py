"""The policy: a video model's own network as a Gaussian over its output.

a ~ N(mean(x_k, t_k, prompt), action_std_k^2), where the mean is the (guided) network output and action_std comes from
the environment, so that the step's randomness is exactly the sampler's. `policy(obs)` is a reparameterised sample
whose noise is keyed by (video seed, step); gradients flow through the mean.

`with policy.reference():` is the model to stay close to: the untrained one or, after `policy.refresh_reference()`, the
policy as it was then. Such a snapshot is a copy of the trained weights alone (of a LoRA, its small matrices).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vdm_env import noise
from vdm_env.adapters import (
    adapter_parameters,
    add_adapter,
    lora_config,
    read_weights,
    save_weights,
    switch_adapter,
    without_adapters,
)
from vdm_env.compiled import compile_copy
from vdm_env.distribution import MeanNormal
from vdm_env.errors import CorruptWeightsError
from vdm_env.guidance import as_interval, check_guidance, inside
from vdm_env.host import joined, upload
from vdm_env.mdp import DenoisingMDP
from vdm_env.memory import activations_in_main_memory
from vdm_env.models.base import VideoModel

Observation = Mapping[str, Tensor]


class DenoisingPolicy(nn.Module):
    """A model's denoiser with LoRA (or all its weights) trainable, and guidance, as a Gaussian policy.

    Several policies live on one network: each has an adapter of its own, switched on when it is called. Dropout stays
    off (the module is always in eval mode): the same input must give the same log-probability in rollout and update.

    Args:
        mdp: the process it acts in.
        lora_rank: rank of the adapter; 0 trains all weights, on a copy of the network.
        lora_alpha: scale of the adapter, `lora_rank` if None (a factor of 1).
        lora_targets: endings of the linear layers' names; the model's own default if None.
        guidance_scale: classifier-free guidance w of `mean` and of sampling; 1 is none.
        guidance_interval: noise levels (lo, hi] at which it acts, see `vdm_env.guidance`; None is all. A video at
            another level costs one pass of the network instead of two.
        gradient_checkpointing: recompute the network in the backward pass instead of storing its activations.
        offload_activations: keep what is stored for the backward pass in main memory, see `vdm_env.memory`; with
            gradient_checkpointing that is each call's inputs.
        seed: of the adapter's initial values.

    Raises:
        ValueError: a negative rank, targets that no layer's name ends with, or lora_rank=0 on a network in half
            precision, where small steps round to nothing.
    """

    def __init__(
        self,
        mdp: DenoisingMDP,
        *,
        lora_rank: int = 16,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
        gradient_checkpointing: bool = False,
        offload_activations: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(lora_rank, int) or lora_rank < 0:
            raise ValueError(f"lora_rank={lora_rank!r}: expected a positive whole number, or 0 to train all weights")
        if lora_alpha is not None and not lora_alpha > 0:
            raise ValueError(f"lora_alpha={lora_alpha}: expected a number > 0, or None for lora_rank")
        check_guidance(guidance_scale)
        self._mdp = mdp
        self.guidance_scale = float(guidance_scale)
        self.guidance_interval = as_interval(guidance_interval)
        self.gradient_checkpointing = gradient_checkpointing
        self.offload_activations = offload_activations
        self.lora_rank = lora_rank
        self._reference_on = False
        self._snapshot: dict[str, Tensor] = {}
        if lora_rank:
            self._model = mdp.model
            self._config = lora_config(lora_rank, lora_alpha, lora_targets or mdp.model.spec.lora_targets)
            self._adapter = add_adapter(mdp.model.denoiser, self._config, seed=seed, device=mdp.device, dtype=mdp.dtype)
        else:
            coarse = sorted({str(p.dtype) for p in mdp.model.denoiser.parameters() if p.dtype.itemsize < 4})
            if coarse:
                raise ValueError(
                    f"lora_rank=0 trains all weights in the network's own {coarse[0]}, in which steps of 1e-5 round to "
                    f"nothing; make the env with dtype=torch.float32, or give lora_rank=16, whose weights are float32"
                )
            # The copy is trained; the model's own network stays what it was and serves as the reference.
            self._model = copy.copy(mdp.model)
            network = without_adapters(copy.deepcopy(mdp.model.denoiser)).eval().requires_grad_(True)
            compile_copy(mdp.model.denoiser, network)
            object.__setattr__(self._model, "denoiser", network)

    # ------------------------------------------------------------------ acting

    def forward(self, obs: Observation) -> Tensor:
        """A reparameterised sample [B,C,F,H,W]; the mean where the step has no noise."""
        drawn = noise.normal(obs["video_seed"], obs["step"], obs["latents"].shape[1:])
        x = obs["latents"]
        return self.dist(obs).rsample(noise=upload(drawn, x.device, x.dtype))

    def dist(self, obs: Observation) -> MeanNormal:
        """The distribution of the action."""
        return MeanNormal(self.mean(obs), self._mdp.action_scale(obs))

    def mean(self, obs: Observation) -> Tensor:
        """The guided output a_u + w (a_c - a_u), as one doubled batch; the conditional output alone for w = 1.

        With a guidance interval the videos outside it have no second pass, whatever the others of the batch have.
        """
        mdp, x, t = self._mdp, obs["latents"], obs["timestep"]
        x = self._scaled(x, t)
        condition = mdp.condition_of(obs)
        w = self.guidance_scale
        if w == 1.0:
            return self._network(x, t, condition)
        rows = self._guided_rows(t)
        if rows is not None and not len(rows):
            return self._network(x, t, condition)
        # Those that are guided come twice, first without their prompts.
        x_u, t_u = (x, t) if rows is None else (x[rows], t[rows])
        prompts = condition if rows is None else {name: values[rows] for name, values in condition.items()}
        empty = mdp.unconditional(len(x_u), prompts)
        both = {name: torch.cat([empty[name], condition[name]]) for name in condition}
        a_u, a_all = self._network(torch.cat([x_u, x]), joined(t_u, t), both).split([len(x_u), len(x)])
        a_c = a_all if rows is None else a_all[rows]
        of_frames = getattr(mdp.model, "guidance", None)  # a model may have its own for every frame
        weight = w if of_frames is None else upload(of_frames(w, x.shape[2]), x.device, x.dtype).view(-1, 1, 1)
        of_times = getattr(mdp.model, "guidance_at", None)  # or for every part of the process
        if of_times is not None:
            weight = of_times(w, t_u).to(x).view(-1, 1, 1, 1, 1)
        guided = a_u + weight * (a_c - a_u)
        return guided if rows is None else a_all.index_put((rows,), guided)

    def _guided_rows(self, t: Tensor) -> Tensor | None:
        """Places of the videos that the guidance interval holds; None for all of them."""
        if self.guidance_interval is None:
            return None
        guided = inside(self._mdp.schedule, t, self.guidance_interval)
        return None if bool(guided.all()) else upload(guided.nonzero().flatten(), t.device)

    def predict(self, x_t: Tensor, t: Tensor, prompt_ids: Tensor | Sequence[int]) -> Tensor:
        """Conditional network output without guidance, at any timesteps t [B]: what preference losses train on."""
        return self._network(self._scaled(x_t, t), t, self._mdp.condition(prompt_ids))

    def _scaled(self, x: Tensor, t: Tensor) -> Tensor:
        """The latents as the network wants them; a function of t alone, so it holds on every grid."""
        return x * self._mdp.schedule.input_scale(t).to(x).reshape(-1, *[1] * (x.ndim - 1))

    def _network(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        counters = self._mdp.counters
        snapshot = self._snapshot if self._reference_on else {}
        untrained = self._reference_on and not snapshot

        def call(x: Tensor, t: Tensor) -> Tensor:
            counters.denoiser_forwards += len(x)
            # Inside, not before: a checkpoint calls this again in the backward pass, when another policy may be on.
            model = self._switched_on(untrained)
            if not snapshot:
                with _recomputed_blocks(model.denoiser, self.gradient_checkpointing):
                    return model.predict(x, t, condition)
            # The snapshot stands in for the parameters during this call only; they themselves are not touched, so a
            # graph that waits for its backward pass keeps its gradients.
            return torch.func.functional_call(_Predictor(model), snapshot, (x, t, condition))

        with activations_in_main_memory(self._model.denoiser, self.offload_activations and torch.is_grad_enabled()):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                output = checkpoint(call, x, t, use_reentrant=False, preserve_rng_state=False)
            else:
                output = call(x, t)
        if output.requires_grad:

            def count_backward(gradient: Tensor) -> None:
                counters.denoiser_backwards += len(x)

            output.register_hook(count_backward)
        return output

    def _switched_on(self, untrained: bool) -> VideoModel:
        """Puts this policy's weights (or the untrained model's) into place and returns the model to call."""
        if not self.lora_rank and not untrained:
            return self._model
        switch_adapter(self._mdp.model.denoiser, None if untrained else self._adapter)
        return self._mdp.model

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside this context the policy is the reference.

        That is the untrained model (adapters off, or the original weights), or the latest `refresh_reference`.
        """
        before, self._reference_on = self._reference_on, True
        try:
            yield
        finally:
            self._reference_on = before

    def refresh_reference(self) -> None:
        """From now on the reference is the policy as it is now; what is trained later does not change it."""
        self._snapshot = {name: parameter.detach().clone() for name, parameter in self._named_trainable()}

    def reset_reference(self) -> None:
        """From now on the reference is the untrained model again, as in a new policy."""
        self._snapshot = {}

    def reference_state_dict(self) -> dict[str, Tensor]:
        """The snapshot by name, copies on the CPU; empty while the reference is the untrained model.

        `save` does not write it: an algorithm that refreshes the reference keeps this in its own state.
        """
        return {self._plain(name): value.cpu().clone() for name, value in self._snapshot.items()}

    def load_reference_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a `reference_state_dict`; an empty one makes the reference the untrained model.

        Raises:
            CorruptWeightsError: names or shapes that are not this policy's; the reference is then unchanged.
        """
        own = dict(self._named_trainable())
        if state:
            self._check_names({self._plain(name): parameter for name, parameter in own.items()}, state)
            self._snapshot = {name: state[self._plain(name)].detach().to(p, copy=True) for name, p in own.items()}
        else:
            self.reset_reference()

    def train(self, mode: bool = True) -> DenoisingPolicy:
        """Does nothing: the network stays in eval mode, see the class."""
        return self

    # ------------------------------------------------------------------ weights

    def _named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names as in `_Predictor`, in a fixed order."""
        if self.lora_rank:
            return [(f"denoiser.{n}", p) for n, p in adapter_parameters(self._model.denoiser, self._adapter)]
        return [(f"denoiser.{n}", p) for n, p in self._model.denoiser.named_parameters() if p.requires_grad]

    def _plain(self, name: str) -> str:
        """A trainable parameter's name in saved states, which another policy of the same shape can read."""
        name = name.removeprefix("denoiser.")
        return name.replace(f".{self._adapter}.", ".") if self.lora_rank else name

    def _check_names(self, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
        if wrong:
            raise CorruptWeightsError(
                f"these weights do not belong to this policy (rank {self.lora_rank}): {wrong[:4]} differ "
                f"({len(wrong)} in all); make the policy with the rank and targets the weights were trained with"
            )

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters an algorithm may change, in a fixed order."""
        return [parameter for _, parameter in self._named_trainable()]

    def lora_state_dict(self) -> dict[str, Tensor]:
        """The trained weights by name, detached copies on the CPU."""
        if not self.lora_rank:
            return {k: v.detach().cpu().clone() for k, v in self._model.denoiser.state_dict().items()}
        state = get_peft_model_state_dict(self._model.denoiser, adapter_name=self._adapter)
        return {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}

    def load_lora_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over weights of `lora_state_dict`.

        Raises:
            CorruptWeightsError: names or shapes that are not this policy's.
        """
        self._check_names(self.lora_state_dict(), state)
        if self.lora_rank:
            set_peft_model_state_dict(self._model.denoiser, dict(state), adapter_name=self._adapter)
        else:
            self._model.denoiser.load_state_dict(dict(state))

    def save(self, folder: str | Path) -> Path:
        """Writes `adapter_model.safetensors` and `adapter_config.json` in PEFT's format.

        `peft.PeftModel.from_pretrained` reads them too. With `lora_rank=0` it is the whole network, in
        `model.safetensors`.
        """
        return save_weights(folder, self.lora_state_dict(), self._config if self.lora_rank else None)

    def load(self, folder: str | Path) -> None:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            CorruptWeightsError: a damaged file, or weights of another shape.
        """
        self.load_lora_state_dict(read_weights(folder, adapter=bool(self.lora_rank)))


class _Predictor(nn.Module):
    """`model.predict` as a module with the denoiser's parameters, for `torch.func.functional_call`."""

    def __init__(self, model: VideoModel) -> None:
        super().__init__()
        self.denoiser = model.denoiser
        self.predict = model.predict  # not the model: were it a module, each parameter would have two names

    def forward(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.predict(x, t, condition)


@contextmanager
def _recomputed_blocks(denoiser: nn.Module, on: bool) -> Iterator[None]:
    """Inside, diffusers networks that can also checkpoint every block, so that a backward pass holds one at a time.

    Only within a checkpoint of the whole network: its recomputation puts the right adapter into place first.
    """
    if not (on and getattr(denoiser, "_supports_gradient_checkpointing", False)):
        yield
        return
    denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
