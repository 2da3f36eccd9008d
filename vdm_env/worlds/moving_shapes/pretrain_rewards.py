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
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, VideoMAEConfig, VideoMAEForVideoClassification

from vdm_env.rewards.aesthetic import AestheticHead
from vdm_env.rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, normalise
from vdm_env.worlds.moving_shapes.networks import MAX_TOKENS, TEXT_WIDTH
from vdm_env.worlds.moving_shapes.render import DIRECTIONS, NUM_FRAMES, SIZE_PX, captions_of
from vdm_env.worlds.moving_shapes.reward_data import (
    Codec,
    Random,
    Targets,
    cleanness,
    degrade,
    direction_targets,
    generated_videos,
    measure_frames,
    measure_velocity,
    synthetic_frames,
    synthetic_videos,
)
from vdm_env.worlds.moving_shapes.reward_metrics import action_metrics, clip_metrics

HEAD_WIDTHS = (64, 32, 16, 8)


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


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """0.29 M parameters: 4 layers of 64 over 8x8 patches of 4 px, 2 layers of 64 over 8 tokens."""
    vision = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE_PX,
        "patch_size": 4,
        "hidden_act": "gelu",
        "projection_dim": 64,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "gelu",
        "projection_dim": 64,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def build_action() -> VideoMAEForVideoClassification:
    """0.2 M parameters: 4 layers of 64 over 4x4x4 patches of 2 frames and 8 px."""
    return VideoMAEForVideoClassification(
        VideoMAEConfig(
            image_size=SIZE_PX,
            patch_size=8,
            num_frames=NUM_FRAMES,
            tubelet_size=2,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            use_mean_pooling=True,
            id2label={i: f"moving {d}" for i, d in enumerate(DIRECTIONS)},
        )
    )


def image_features(model: CLIPModel, frames: Tensor) -> Tensor:
    """Unit features [N,D] of frames in [0,1]."""
    pixels = normalise(frames, CLIP_MEAN, CLIP_STD)
    return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def text_features(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, directions: Tensor) -> Tensor:
    """Unit features [7,4,D] of the captions of all colours and shapes, with the given directions [7,4]."""
    labels = torch.cartesian_prod(torch.arange(7), torch.arange(4))
    captions = captions_of(torch.cat([labels, directions.reshape(-1, 1)], 1))
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt")
    return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1).view(7, 4, -1)


def action_logits(model: VideoMAEForVideoClassification, video: Tensor) -> Tensor:
    """Logits [B,4] of videos in [0,1]."""
    return model(pixel_values=normalise(video, IMAGENET_MEAN, IMAGENET_STD)).logits


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
    optimizer, schedule = _optimizer(config, [*model.parameters(), *head.parameters()], config.clip_steps)
    n = config.clip_batch
    running: list[float] = []
    for step in range(config.clip_steps):
        frames, targets, ideal = synthetic_frames(n, draw)
        frames[: n // 4] = codec.round_trip(frames[: n // 4], draw)
        if generated is not None:
            k = n // 4
            pick = generated[draw.integers(len(generated), k), draw.integers(NUM_FRAMES, k)].float() / 255
            measured, ideal[-k:] = measure_frames(pick)
            targets = Targets(*(torch.cat([a[:-k], b]) for a, b in zip(_parts(targets), _parts(measured), strict=True)))
            frames[-k:] = pick
        frames = degrade(frames, draw)
        present = (targets.clean > 0).float()
        text = text_features(model, tokenizer, draw.integers(4, 7, 4))
        fixed = text.detach()
        if step >= config.clip_steps // 10:  # the attack means nothing before there is something to attack
            m, k = n // 3, n // 8
            order = torch.randperm(n, generator=draw.generator)
            pixel, latent = order[:m], order[m : m + k]
            now = Targets(
                targets.colour[pixel], targets.shape[pixel], present[pixel] * cleanness(frames[pixel], ideal[pixel])
            )
            frames[pixel] = climb_pixels(
                lambda x, now=now, t=fixed: clip_loss(model, head, t, x, now).sum(),
                frames[pixel],
                draw.uniform(m, low=0.005, high=config.max_attack),
            )
            wish = fixed.flatten(0, 1)[draw.integers(28, k)]
            frames[latent] = climb_latents(
                codec,
                lambda x, w=wish: (image_features(model, x) * w).sum(),
                frames[latent],
                draw.uniform(k, high=config.max_latent_attack),
            )
            moved, ideal[latent] = measure_frames(frames[latent])
            for old, new in zip(_parts(targets), _parts(moved), strict=True):
                old[latent] = new
        targets = Targets(targets.colour, targets.shape, present * cleanness(frames, ideal))
        loss = clip_loss(model, head, text, frames, targets).mean()
        running.append(_update(optimizer, schedule, loss))
        if step % 100 == 99 or step == config.clip_steps - 1:
            print(f"clip: step {step + 1} mean loss {sum(running) / len(running):.4f}", flush=True)
            running = []
    return model.eval(), head.eval()


def train_action(config: Config, codec: Codec, generated: Tensor | None) -> VideoMAEForVideoClassification:
    """Cross entropy against the soft direction of the true (or, for generated videos, measured) velocity."""
    draw = Random(config.seed + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        model = build_action().train()
    optimizer, schedule = _optimizer(config, list(model.parameters()), config.action_steps)
    n = config.action_batch
    running: list[float] = []

    def loss_of(video: Tensor, target: Tensor) -> Tensor:
        return -(target * action_logits(model, video).log_softmax(1)).sum(1)

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
            m, k = n // 3, n // 16
            order = torch.randperm(n, generator=draw.generator)
            pixel, latent = order[:m], order[m : m + k]
            video[pixel] = climb_pixels(
                lambda x, t=target[pixel]: loss_of(x, t).sum(),
                video[pixel],
                draw.uniform(m, low=0.005, high=config.max_attack),
            )
            # A latent step of this size bends a picture but does not carry its shape elsewhere: the direction stays.
            moved = climb_latents(
                codec,
                lambda x, t=target[latent], k=k: loss_of(x.unflatten(0, (k, NUM_FRAMES)), t).sum(),
                video[latent].flatten(0, 1),
                draw.uniform(k, high=config.max_latent_attack / 2).repeat_interleave(NUM_FRAMES),
                num_steps=1,
            )
            video[latent] = moved.unflatten(0, (k, NUM_FRAMES))
        running.append(_update(optimizer, schedule, loss_of(video, target).mean()))
        if step % 100 == 99 or step == config.action_steps - 1:
            print(f"action: step {step + 1} mean loss {sum(running) / len(running):.4f}", flush=True)
            running = []
    return model.eval()


def _parts(targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    return targets.colour, targets.shape, targets.clean


def _optimizer(config: Config, parameters: list[nn.Parameter], steps: int):  # type: ignore[no-untyped-def]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps, pct_start=0.08)
    return optimizer, schedule


def _update(optimizer, schedule, loss: Tensor) -> float:  # type: ignore[no-untyped-def]
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()


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
