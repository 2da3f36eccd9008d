"""Trains MovingShapes' reward networks: a CLIP, an aesthetic head on it, and a VideoMAE direction classifier.

    python -m vdm_env.worlds.moving_shapes.pretrain_rewards --base weights_new --out weights_new --generated 1024

They are ordinary transformers classes at toy width, stored in half precision under <out>/rewards, with what they are
worth in metrics.json. About ten minutes on one CPU core. `reward_data.py` says what they see; besides, part of each
batch is moved by the network's own gradient, in pixels and in latents, before it is learned from: a reward that is
going to be climbed has to be right where climbing it leads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerFast, VideoMAEForVideoClassification

from vdm_env.rewards.aesthetic import AestheticHead
from vdm_env.worlds.moving_shapes.render import NUM_FRAMES
from vdm_env.worlds.moving_shapes.reward_codec import Codec, generated_videos
from vdm_env.worlds.moving_shapes.reward_data import (
    Random,
    Targets,
    degrade,
    direction_targets,
    measure_frames,
    measure_velocity,
    synthetic_frames,
    synthetic_videos,
)
from vdm_env.worlds.moving_shapes.reward_metrics import action_metrics, clip_metrics
from vdm_env.worlds.moving_shapes.reward_networks import (
    HEAD_WIDTHS,
    action_logits,
    build_action,
    build_clip,
    image_features,
    text_features,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Training of the reward networks."""

    base: Path
    """folder with shared/{vae,tokenizer}, and flow/ and unet/ where generated videos are asked for"""
    out: Path
    """folder that receives rewards/{clip,aesthetic,action}"""
    stages: tuple[str, ...] = ("clip", "action")
    """of clip (with the aesthetic head) and action"""
    generated: int = 0
    """videos of the stored diffusion models to learn from; 0: none"""
    clip_steps: int = 1200
    """optimiser updates of the CLIP and the aesthetic head"""
    clip_batch: int = 160
    """frames an update"""
    action_steps: int = 900
    """optimiser updates of the action classifier"""
    action_batch: int = 64
    """videos an update"""
    learning_rate: float = 2e-3
    max_attack: float = 0.06
    """largest pixel change of the adversarial part of a batch"""
    max_latent_attack: float = 0.6
    """largest root mean square change of a latent by its adversarial part, in latent deviations"""
    seed: int = 0
    num_threads: int = 1


def climb_pixels(objective: Callable[[Tensor], Tensor], pixels: Tensor, size: Tensor) -> Tensor:
    """One signed-gradient step upwards (Goodfellow et al. 2015, arXiv:1412.6572).

    Size [N] is the largest change of a pixel.
    """
    pixels = pixels.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(objective(pixels), pixels)
    return (pixels + size.view(-1, *[1] * (pixels.ndim - 1)) * gradient.sign()).clamp(0, 1).detach()


def climb_latents(
    codec: Codec, objective: Callable[[Tensor], Tensor], frames: Tensor, size: Tensor, num_steps: int = 2
) -> Tensor:
    """Decoded frames after steps along the gradient in latent space, where a policy can go; size [N].

    Total RMS change.
    """
    latents = codec.encode(frames)
    for _ in range(num_steps):
        latents = latents.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(codec.decode(latents)), latents)
        rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
        latents = latents + (size * codec.scale / num_steps)[:, None, None, None] * gradient / rms
    return codec.decode(latents.detach())


def clip_loss(model: CLIPModel, head: AestheticHead, text: Tensor, frames: Tensor, targets: Targets) -> Tensor:
    """[N]: cosines should equal the preference, their softmax the classes, and the head's score 1 + 9 * cleanness."""
    image = image_features(model, frames)
    cosine = torch.einsum("nd,csd->ncs", image, text)
    regression = (cosine - targets.preference()).square().mean((1, 2))
    log_probability = (20.0 * cosine).flatten(1).log_softmax(1)
    entropy = -(targets.classes().flatten(1) * log_probability).sum(1) * targets.clean
    aesthetic = (head(image) - 1 - 9 * targets.clean).square() / 81
    return 10 * regression + 0.3 * entropy + aesthetic


def train_clip(config: Config, codec: Codec, generated: Tensor | None) -> tuple[CLIPModel, AestheticHead]:
    """The CLIP and the head together, so that cleanness stays readable in the image feature."""
    draw = Random(config.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.base / "shared" / "tokenizer", local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model, head = build_clip(tokenizer).train(), AestheticHead(64, HEAD_WIDTHS).eval()
    model.logit_scale.requires_grad_(False).fill_(torch.log(torch.tensor(20.0)))
    learner = Learner(config, "clip", [*model.parameters(), *head.parameters()], config.clip_steps)
    n = config.clip_batch
    for step in range(config.clip_steps):
        frames, targets, ideal = synthetic_frames(n, draw)
        frames[: n // 4] = codec.round_trip(frames[: n // 4], draw)
        if generated is not None:
            k = n // 4
            frames[-k:] = generated[draw.integers(len(generated), k), draw.integers(NUM_FRAMES, k)].float() / 255
            measured, ideal[-k:] = measure_frames(frames[-k:])
            targets = targets.replaced(slice(n - k, n), measured)
        frames = degrade(frames, draw)
        text = text_features(model, tokenizer, draw.integers(4, 7, 4))
        if step >= config.clip_steps // 10:  # an attack means nothing before there is something to attack
            frames, targets, ideal = _attack_clip(
                config, codec, draw, model, head, text.detach(), frames, targets, ideal
            )
        targets = targets.seen_as(frames, ideal)
        learner.update(step, clip_loss(model, head, text, frames, targets).mean())
    return model.eval(), head.eval()


def _attack_clip(
    config: Config,
    codec: Codec,
    draw: Random,
    model: CLIPModel,
    head: AestheticHead,
    text: Tensor,
    frames: Tensor,
    targets: Targets,
    ideal: Tensor,
) -> tuple[Tensor, Targets, Tensor]:
    """Moves a third of the frames in pixels, up the loss, and an eighth in latents, towards any caption."""
    n = len(frames)
    m, k = n // 3, n // 8
    order = torch.randperm(n, generator=draw.generator)
    pixel, latent = order[:m], order[m : m + k]
    now = targets[pixel].seen_as(frames[pixel], ideal[pixel])
    wish = text.flatten(0, 1)[draw.integers(28, k)]

    def loss(x: Tensor) -> Tensor:
        return clip_loss(model, head, text, x, now).sum()

    def likeness(x: Tensor) -> Tensor:
        return (image_features(model, x) * wish).sum()

    frames[pixel] = climb_pixels(loss, frames[pixel], draw.uniform(m, low=0.005, high=config.max_attack))
    frames[latent] = climb_latents(codec, likeness, frames[latent], draw.uniform(k, high=config.max_latent_attack))
    measured, ideal[latent] = measure_frames(frames[latent])
    return frames, targets.replaced(latent, measured), ideal


def train_action(config: Config, codec: Codec, generated: Tensor | None) -> VideoMAEForVideoClassification:
    """Cross entropy against the soft direction of the true (or, for generated videos, measured) velocity."""
    draw = Random(config.seed + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        model = build_action().train()
    learner = Learner(config, "action", list(model.parameters()), config.action_steps)
    n = config.action_batch
    for step in range(config.action_steps):
        video, velocity = synthetic_videos(n, draw)
        if generated is not None:
            k = n // 4
            video[-k:] = generated[draw.integers(len(generated), k)].float() / 255
            velocity[-k:] = measure_velocity(video[-k:])
        k = n // 8
        video[:k] = codec.round_trip(video[:k].flatten(0, 1), draw, 0.6).unflatten(0, (k, NUM_FRAMES))
        video = degrade(video.flatten(0, 1), draw, 0.5).unflatten(0, (n, NUM_FRAMES))
        target = direction_targets(velocity)
        if step >= config.action_steps // 5:
            video = _attack_action(config, codec, draw, model, video, target)
        learner.update(step, action_loss(model, video, target).mean())
    return model.eval()


def action_loss(model: VideoMAEForVideoClassification, video: Tensor, target: Tensor) -> Tensor:
    """Cross entropy [B] with soft labels [B,4]."""
    return -(target * action_logits(model, video).log_softmax(1)).sum(1)


def _attack_action(
    config: Config,
    codec: Codec,
    draw: Random,
    model: VideoMAEForVideoClassification,
    video: Tensor,
    target: Tensor,
) -> Tensor:
    """Moves a third of the videos in pixels and a sixteenth in latents, up the loss.

    A latent step of this size bends a picture but does not carry its shape elsewhere: the direction stays the label.
    """
    n = len(video)
    m, k = n // 3, n // 16
    order = torch.randperm(n, generator=draw.generator)
    pixel, latent = order[:m], order[m : m + k]

    def loss(x: Tensor) -> Tensor:
        return action_loss(model, x, target[pixel]).sum()

    def loss_of_frames(x: Tensor) -> Tensor:
        return action_loss(model, x.unflatten(0, (k, NUM_FRAMES)), target[latent]).sum()

    video[pixel] = climb_pixels(loss, video[pixel], draw.uniform(m, low=0.005, high=config.max_attack))
    size = draw.uniform(k, high=config.max_latent_attack / 2).repeat_interleave(NUM_FRAMES)
    moved = climb_latents(codec, loss_of_frames, video[latent].flatten(0, 1), size, num_steps=1)
    video[latent] = moved.unflatten(0, (k, NUM_FRAMES))
    return video


class Learner:
    """AdamW, one cycle of the learning rate, gradients clipped to norm 1; prints the mean loss every 100 updates."""

    def __init__(self, config: Config, name: str, parameters: list[nn.Parameter], num_steps: int) -> None:
        self.name, self.parameters, self.num_steps = name, parameters, num_steps
        rate = config.learning_rate
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, total_steps=num_steps, pct_start=0.08)
        self.losses: list[float] = []

    def update(self, step: int, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        if step % 100 == 99 or step == self.num_steps - 1:
            mean = sum(self.losses) / len(self.losses)
            print(f"{self.name}: step {step + 1} of {self.num_steps} mean loss {mean:.4f}", flush=True)
            self.losses = []


def main(config: Config) -> None:
    """Trains the stages, stores them, measures what was stored, and adds the numbers to metrics.json."""
    unknown = [s for s in config.stages if s not in ("clip", "action")]
    if unknown:
        raise ValueError(f"unknown stages {unknown}; expected some of ['clip', 'action']")
    torch.set_num_threads(config.num_threads)
    rewards = config.out / "rewards"
    rewards.mkdir(parents=True, exist_ok=True)
    codec = Codec(config.base)
    generated = None
    if config.generated:
        generated = (generated_videos(config.base, config.generated, Random(config.seed + 2)) * 255).round().byte()
    record_path = rewards / "metrics.json"
    record = json.loads(record_path.read_text()) if record_path.is_file() else {}
    if "clip" in config.stages:
        model, head = train_clip(config, codec, generated)
        model.half().save_pretrained(rewards / "clip")
        (rewards / "aesthetic").mkdir(exist_ok=True)
        save_file({k: v.half() for k, v in head.state_dict().items()}, rewards / "aesthetic" / "model.safetensors")
        record["clip"] = clip_metrics(config.base, config.out, codec)
    if "action" in config.stages:
        train_action(config, codec, generated).half().save_pretrained(rewards / "action")
        record["action"] = action_metrics(config.base, config.out, codec)
    settings = {k: str(v) for k, v in asdict(config).items() if k not in ("base", "out")}
    record["config"] = settings | {"torch": torch.__version__}
    record_path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
