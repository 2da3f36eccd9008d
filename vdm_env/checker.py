"""The contracts, as functions that try them: for environments, rewards and models that somebody plugs in.

Each raises `ContractError` at the first breach, saying what was found, what was expected and what to do, and returns
None if all is well. They run no network but the one they check, and take seconds at small sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdm_env.check_env import check_env_spec
from vdm_env.errors import expect
from vdm_env.models.base import VideoModel
from vdm_env.noise import generator_for
from vdm_env.rewards.base import as_reward, score_parts, select_frames

__all__ = ["check_env_spec", "check_model", "check_reward"]

_PROMPTS = ("a red circle moving left", "a blue square moving right")


# --------------------------------------------------------------------------------------------------------- rewards


def check_reward(
    reward: Any,
    *,
    prompts: Sequence[str] = _PROMPTS,
    size: tuple[int, int, int] = (8, 32, 32),
    device: torch.device | str = "cpu",
    tolerance: float = 1e-3,
) -> None:
    """Checks a reward (or a plain function of (video, prompts)) on random videos, one for each prompt.

    Its attributes, one finite float a video within `range`, the same scores for the same input, no influence of a
    video on another's score, an untouched input, and for a differentiable one finite gradients that are not all zero.

    Args:
        reward: what to check.
        prompts: at least two.
        size: (frames, height, width) of the videos.
        device: where the videos are.
        tolerance: allowed difference of scores between batches, relative to the largest score.

    Raises:
        ContractError: the first breach found.
        TypeError, ValueError: scores of the wrong type or shape, or not finite.
    """
    reward = as_reward(reward)
    name = f"reward {reward.name!r}"
    expect(isinstance(reward.name, str) and bool(reward.name), f"a reward needs a name, got {reward.name!r}")
    expect(
        isinstance(reward.differentiable, bool),
        f"{name}: differentiable is {reward.differentiable!r}, expected True or False",
    )
    low, high = reward.range
    expect(
        low < high, f"{name}: range is ({low}, {high}), expected (low, high) with low < high; infinite where unknown"
    )
    frames = select_frames(reward.frames, size[0], 0)
    expect(len(prompts) >= 2, f"give at least two prompts, got {list(prompts)}")
    batch = len(prompts)
    video = torch.rand(batch, len(frames), 3, *size[1:], generator=generator_for(0)).to(device)
    before, texts, edits = video.clone(), list(prompts), video._version
    with torch.no_grad():
        scores = score_parts(reward, video, texts)[0]
        # The version tells of edits that happen to change no value here, such as a clamp_.
        untouched = torch.equal(before, video) and video._version == edits
        expect(untouched, f"{name} changed the video it was given; work on a copy")
        expect(texts == list(prompts), f"{name} changed the list of prompts it was given; work on a copy")
        inside = bool((scores >= low).all() and (scores <= high).all())
        expect(inside, f"{name} gave {scores.tolist()}, outside its range ({low}, {high}); correct one of them")
        allowed = tolerance * max(1e-6, float(scores.abs().max()))
        twice = score_parts(reward, video, texts)[0]
        expect(
            _near(scores, twice, allowed),
            f"{name}: {scores.tolist()}, then {twice.tolist()} for the same input; is dropout on?",
        )
        turned = score_parts(reward, video.flip(0), texts[::-1])[0].flip(0)
        alone = torch.cat([score_parts(reward, video[i : i + 1], texts[i : i + 1])[0] for i in range(batch)])
    for other, what in ((turned, "in another order"), (alone, "one by one")):
        given = f"{scores.tolist()} in a batch, {other.tolist()} {what}"
        message = f"{name}: {given}; score i may depend on video i and prompt i only"
        expect(_near(scores, other, allowed), message)
    if reward.differentiable:
        _check_reward_gradient(reward, video, texts, name)


def _check_reward_gradient(reward: Any, video: Tensor, prompts: list[str], name: str) -> None:
    pixels = video.clone().requires_grad_()
    scores = score_parts(reward, pixels, prompts)[0]
    hint = "remove no_grad, detach and rounding, or set differentiable = False"
    expect(scores.requires_grad, f"{name} says it is differentiable, but its scores have no graph; {hint}")
    (gradient,) = torch.autograd.grad(scores[0], pixels, allow_unused=True)
    expect(gradient is not None and bool(gradient[0].any()), f"{name}: no gradient reaches the pixels; {hint}")
    expect(
        bool(torch.isfinite(gradient).all()),
        f"{name}: its gradient is not finite; look for a square root or division at 0",
    )
    expect(
        not bool(gradient[1:].any()),
        f"{name}: the score of video 0 has a gradient at other videos; score each by itself",
    )


# ---------------------------------------------------------------------------------------------------------- models


def check_model(model: Any, *, prompts: Sequence[str] = _PROMPTS, tolerance: float = 1e-3) -> None:
    """Checks a `VideoModel` at its spec's size: use a small one, every part of it is run.

    Raises:
        ContractError: the first breach found.
    """
    expect(
        isinstance(model, VideoModel),
        f"{type(model).__name__} lacks attributes or methods of vdm_env.models.VideoModel",
    )
    spec, name = model.spec, f"model {model.spec.name!r}"
    expect(
        isinstance(model.denoiser, nn.Module),
        f"{name}: denoiser is {type(model.denoiser).__name__}, expected an nn.Module",
    )
    expect(
        not any(m.training for m in model.denoiser.modules()),
        f"{name}: denoiser is in training mode (dropout); call eval()",
    )
    wanted = tuple(spec.lora_targets)
    linear = [n for n, m in model.denoiser.named_modules() if isinstance(m, nn.Linear) and n.endswith(wanted)]
    expect(
        bool(linear), f"{name}: no linear layer's name ends with one of lora_targets {list(wanted)}; correct the spec"
    )
    expect(len(prompts) >= 2, f"give at least two prompts, got {list(prompts)}")
    shape = model.latent_shape(spec.num_frames, spec.height, spec.width)
    for frames, height, width in ((0, spec.height, spec.width), (spec.num_frames, spec.height + 1, spec.width)):
        try:
            model.latent_shape(frames, height, width)
        except ValueError:
            continue
        odd = spec.spatial_stride > 1 or frames == 0
        expect(
            not odd,
            f"{name}: latent_shape({frames}, {height}, {width}) must raise ValueError, the model cannot make it",
        )
    table = model.schedule.table(spec.num_steps, spec.sampler, spec.noise_level)
    _check_network(model, name, tuple(shape), table.timesteps, list(prompts), tolerance)
    _check_codec(model, name, tuple(shape), tolerance)


def _check_network(
    model: VideoModel, name: str, shape: tuple[int, ...], timesteps: Tensor, prompts: list[str], tolerance: float
) -> None:
    device, batch = next(model.denoiser.parameters()).device, len(prompts)
    x = torch.randn(batch, *shape, generator=generator_for(1)).to(device)
    t = timesteps[torch.arange(batch) % len(timesteps)].float().to(device)
    condition = _conditions(model, prompts)
    empty = model.encode_prompts([""] * batch)
    for key, value in condition.items():
        expect(len(value) == batch, f"{name}: condition {key!r} has {len(value)} rows for {batch} prompts")
        fits = key in empty and empty[key].shape == value.shape
        expect(fits, f"{name}: condition {key!r} of the prompt '' has another shape; guidance puts both into one batch")
    with torch.no_grad():
        output = model.predict(x, t, condition)
        expect(output.shape == x.shape, f"{name}: predict gave {tuple(output.shape)} for latents {tuple(x.shape)}")
        expect(bool(torch.isfinite(output).all()), f"{name}: predict gave NaN or infinity for plain noise")
        allowed = tolerance * float(output.abs().max())
        expect(
            _near(output, model.predict(x, t, condition), allowed),
            f"{name}: predict is not deterministic; is dropout on?",
        )
        rows = [
            model.predict(x[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in condition.items()})
            for i in range(batch)
        ]
    same = _near(output, torch.cat(rows), allowed)
    expect(
        same, f"{name}: a video's output depends on the batch; each has its own t [B], condition and no other influence"
    )
    leaf = x.clone().requires_grad_()
    expect(
        model.predict(leaf, t, condition).requires_grad, f"{name}: predict cuts the graph; remove no_grad and detach"
    )


def _conditions(model: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Of the prompts, or of as many random images for a model that animates images."""
    spec = model.spec
    if spec.conditioned_on == "text":
        return model.encode_prompts(prompts)
    expect(hasattr(model, "encode_images"), f"model {spec.name!r} is conditioned on images but has no encode_images")
    images = torch.rand(len(prompts), 3, spec.height, spec.width, generator=generator_for(3))
    with torch.no_grad():
        return model.encode_images(list(images), None)


def _check_codec(model: VideoModel, name: str, shape: tuple[int, ...], tolerance: float) -> None:
    spec = model.spec
    device = next(model.denoiser.parameters()).device
    video = torch.rand(1, spec.num_frames, 3, spec.height, spec.width, generator=generator_for(2)).to(device)
    latents = model.encode(video)
    expect(tuple(latents.shape) == (1, *shape), f"{name}: encode gave {tuple(latents.shape)}, expected {(1, *shape)}")
    leaf = latents.detach().clone().requires_grad_()
    decoded = model.decode(leaf)
    expect(decoded.shape == video.shape, f"{name}: decode gave {tuple(decoded.shape)}, expected {tuple(video.shape)}")
    inside = bool((decoded >= 0).all() and (decoded <= 1).all())
    expect(inside, f"{name}: decoded pixels lie in {decoded.min():.3g} .. {decoded.max():.3g}, expected 0 .. 1")
    expect(decoded.requires_grad, f"{name}: decode cuts the graph, so no reward can be back-propagated; remove no_grad")
    chosen = torch.tensor([[spec.num_frames - 1]])
    some = model.decode(latents, chosen)
    expect(
        _near(some, decoded[:, -1:], tolerance),
        f"{name}: decode(latents, frames) differs from those frames of decode(latents)",
    )


def _near(a: Tensor, b: Tensor, allowed: float) -> bool:
    return a.shape == b.shape and float((a - b).detach().abs().max()) <= allowed
