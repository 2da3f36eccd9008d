"""What MovingShapes' reward networks are worth: accuracy, ranking, and what climbing them leads to.

Reads what is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel

from vdm_env.rewards.action import ActionReward, load_videomae
from vdm_env.rewards.aesthetic import AestheticReward, head_from
from vdm_env.rewards.clip import TransformersClipBackbone, frame_features, hps
from vdm_env.rewards.clip_loading import world_tokenizer
from vdm_env.rewards.loading import load_transformers, read_tensors
from vdm_env.worlds.moving_shapes.gold import gold_score
from vdm_env.worlds.moving_shapes.render import captions_of, random_labels, render, sample_scenes
from vdm_env.worlds.moving_shapes.reward_codec import Codec
from vdm_env.worlds.moving_shapes.reward_data import Random, cleanness, degrade, measure_frames

_PGD_SIZE = 8 / 255
_NUM = 256


def _pgd(objective: Callable[[Tensor], Tensor], pixels: Tensor, num_steps: int = 5) -> Tensor:
    """Projected gradient ascent within +-8/255 (Madry et al. 2018, arXiv:1706.06083)."""
    moved = pixels
    for _ in range(num_steps):
        moved = moved.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(moved), moved)
        moved = moved + gradient.sign() * _PGD_SIZE * 2 / num_steps
        moved = torch.minimum(torch.maximum(moved, pixels - _PGD_SIZE), pixels + _PGD_SIZE).clamp(0, 1)
    return moved.detach()


def _climb(codec: Codec, objective: Callable[[Tensor], Tensor], frames: Tensor, num_steps: int = 30) -> Tensor:
    """Frames after Adam steps on their latents: what unbounded optimisation of a reward makes of them."""
    latents = codec.encode(frames).requires_grad_(True)
    optimizer = torch.optim.Adam([latents], lr=0.1 * codec.scale)
    for _ in range(num_steps):
        optimizer.zero_grad()
        (-objective(codec.decode(latents))).backward()
        optimizer.step()
    return codec.decode(latents.detach())


def clip_metrics(base: Path, out: Path, codec: Codec, seed: int = 1000) -> dict[str, float]:
    """Accuracy of colour and shape in [0,1] (clean, decoded, adversarial), ranking accuracy, and climbing tests."""
    draw = Random(seed)
    model = load_transformers(CLIPModel, out / "rewards" / "clip").float().eval().requires_grad_(False)
    backbone = TransformersClipBackbone(model, world_tokenizer(base / "shared" / "tokenizer"))
    path = out / "rewards" / "aesthetic" / "model.safetensors"
    reward, aesthetic = hps(backbone), AestheticReward(backbone, head_from(read_tensors(path), path))

    labels = random_labels(_NUM, draw.generator)
    video = render(sample_scenes(labels, draw.generator))
    frames = video[torch.arange(_NUM), draw.integers(video.shape[1], _NUM)]
    captions = captions_of(labels)
    combinations = torch.cartesian_prod(torch.arange(7), torch.arange(4))
    every = captions_of(torch.cat([combinations, torch.zeros(28, 1, dtype=torch.int64)], 1))
    right = labels[:, 0] * 4 + labels[:, 1]

    def cosines(frames: Tensor) -> Tensor:
        text = torch.nn.functional.normalize(backbone.text_features(every), dim=-1)
        return frame_features(backbone, frames[:, None], reward.preprocess)[:, 0] @ text.T

    def score(frames: Tensor, captions: list[str] = captions) -> Tensor:
        return reward(frames[:, None], captions)

    result: dict[str, float] = {}
    adversarial = _pgd(lambda x: torch.nn.functional.cross_entropy(20 * cosines(x), right, reduction="sum"), frames)
    with torch.no_grad():
        decoded = codec.round_trip(frames, draw, 0.0)
        for name, seen in (("clean", frames), ("decoded", decoded), ("adversarial", adversarial)):
            guess = cosines(seen).argmax(1)
            result[f"colour_{name}"] = float((guess // 4 == labels[:, 0]).float().mean())
            result[f"shape_{name}"] = float((guess % 4 == labels[:, 1]).float().mean())
        worse = degrade(frames, draw, 1.0)
        harmed = cleanness(worse, frames) < 0.8
        result["ranking_clean_over_degraded"] = float((score(frames) > score(worse))[harmed].float().mean())
        other = captions_of(labels[torch.randperm(_NUM, generator=draw.generator)])
        different = torch.tensor([a.split()[1:3] != b.split()[1:3] for a, b in zip(captions, other, strict=True)])
        result["ranking_right_over_wrong_caption"] = float(
            (score(frames) > score(frames, other))[different].float().mean()
        )
        mixed = degrade(frames, draw)
        pair = torch.stack([aesthetic(mixed[:, None], captions), 1 + 9 * cleanness(mixed, frames)])
        result["aesthetic_correlation"] = float(torch.corrcoef(pair)[0, 1])
        result["score_clean"], result["score_degraded"] = float(score(frames).mean()), float(score(worse).mean())

    wish = random_labels(64, draw.generator)
    wanted = captions_of(wish)
    start = codec.round_trip(frames[:64], draw, 0.0)
    end = _climb(codec, lambda x: score(x, wanted).sum(), start)
    for name, seen in (("before", start), ("after", end)):
        targets, _ = measure_frames(seen)
        result[f"climb_{name}_score"] = float(score(seen, wanted).mean())
        result[f"climb_{name}_colour"] = float((targets.colour.argmax(1) == wish[:, 0]).float().mean())
        result[f"climb_{name}_shape"] = float((targets.shape.argmax(1) == wish[:, 1]).float().mean())
        result[f"climb_{name}_clean"] = float(targets.clean.mean())
    return {k: round(v, 4) for k, v in result.items()}


def action_metrics(base: Path, out: Path, codec: Codec, seed: int = 2000) -> dict[str, float]:
    """Accuracy of the direction in [0,1] (clean, decoded, adversarial, degraded) and a climbing test."""
    draw = Random(seed)
    model = load_videomae(out / "rewards" / "action").eval()
    reward = ActionReward(model.requires_grad_(False), score="log_probability")
    labels = random_labels(_NUM, draw.generator)
    video = render(sample_scenes(labels, draw.generator))
    shape = video.shape[:2]
    captions = captions_of(labels)
    adversarial = _pgd(lambda x: -reward(x, captions).sum(), video)
    result: dict[str, float] = {}
    with torch.no_grad():
        decoded = codec.round_trip(video.flatten(0, 1), draw, 0.0).unflatten(0, shape)
        degraded = degrade(video.flatten(0, 1), draw).unflatten(0, shape)
        kinds = {"clean": video, "decoded": decoded, "degraded": degraded, "adversarial": adversarial}
        for name, seen in kinds.items():
            result[f"direction_{name}"] = float((reward.logits(seen).argmax(1) == labels[:, 2]).float().mean())
    n = 24
    wish = labels[:n].clone()
    wish[:, 2] = draw.integers(4, n)
    wanted = captions_of(wish)
    end = _climb(codec, lambda x: reward(x.unflatten(0, (n, shape[1])), wanted).sum(), video[:n].flatten(0, 1))
    for name, seen in (("before", decoded[:n]), ("after", end.unflatten(0, (n, shape[1])))):
        result[f"climb_{name}_probability"] = float(reward(seen, wanted).exp().mean())
        result[f"climb_{name}_gold_direction"] = float(gold_score(seen, wanted).direction.mean())
        result[f"climb_{name}_gold_clean"] = float(gold_score(seen, wanted).clean.mean())
    return {k: round(v, 4) for k, v in result.items()}
