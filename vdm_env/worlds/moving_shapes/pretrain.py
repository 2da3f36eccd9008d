"""Pretrains the MovingShapes networks; stages can run alone and in parallel once `vae` and `text` are done.

    python -m vdm_env.worlds.moving_shapes.pretrain --out weights_new
    python -m vdm_env.worlds.moving_shapes.pretrain_rewards --base weights_new --out weights_new --generated 1024

On two CPU cores that takes under three hours. The diffusion models are stopped early on
purpose: they know colour and shape well and the direction of motion badly, which leaves alignment something to do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from tqdm import trange
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from vdm_env.worlds.moving_shapes import networks
from vdm_env.worlds.moving_shapes.render import NUM_FRAMES, captions_of, random_labels, render, sample_scenes

UNCONDITIONAL_SHARE = 0.1  # captions dropped in training, so that guidance has an unconditional branch
FLOW_SHIFT = 2.0  # training timesteps lean towards noise, where direction and colour are decided


@dataclass(frozen=True)
class Config:
    """Pretraining of the embedded world."""

    out: Path
    """folder that receives the stages' folders"""
    stages: tuple[str, ...] = ("text", "vae", "flow", "unet")
    """of text, vae, flow, unet; run in the order given"""
    vae_steps: int = 3000
    """optimiser updates of the autoencoder, 48 frames each"""
    flow_steps: int = 5000
    """length of the flow transformer's learning-rate schedule, in updates"""
    flow_stop: int = 3500
    """update at which it is stopped; on purpose before the schedule ends"""
    unet_steps: int = 3000
    """length of the epsilon UNet's learning-rate schedule, in updates"""
    unet_stop: int = 2000
    """update at which it is stopped, likewise"""
    batch_size: int = 32
    """videos an update of a diffusion model"""
    num_videos: int = 16384
    """size of the rendered training set whose latents are kept in memory"""
    seed: int = 0
    device: str = "cpu"
    num_threads: int = 2
    """CPU threads; use 1 each when two stages run side by side"""


def _store(module: nn.Module, folder: Path) -> None:
    """Saves a diffusers or transformers module in half precision without changing the one being trained."""
    full = {k: v.clone() for k, v in module.state_dict().items()}
    module.half().save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
    module.float().load_state_dict(full)


def train_text(config: Config) -> None:
    """Every token state after the caption's end learns to tell colour, shape and direction, for cross-attention."""
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    tokenizer = networks.build_tokenizer()
    encoder = networks.build_text_encoder(tokenizer)
    probe = nn.Linear(networks.TEXT_WIDTH, 7 + 4 + 4)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *probe.parameters()], lr=2e-3)
    steps = 400
    for _ in range(steps):
        labels = random_labels(128, generator)
        tokens = tokenizer(captions_of(labels), padding="max_length", return_tensors="pt").input_ids
        logits = probe(encoder(tokens).last_hidden_state[:, 5:])
        parts = logits.split([7, 4, 4], -1)
        losses = [
            F.cross_entropy(part.transpose(1, 2), labels[:, i, None].expand(-1, part.shape[1]))
            for i, part in enumerate(parts)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"text: step {steps} loss {loss.item():.4f}")
    tokenizer.save_pretrained(config.out / "shared" / "tokenizer")
    _store(encoder, config.out / "shared" / "text_encoder")


def train_vae(config: Config) -> None:
    """Squared and absolute error plus a light pull of the latents to zero; the decoder sees slightly noisy latents.

    Every frame of a batch is of another scene (frames of one clip are nearly equal, and a batch of few clips stalls at
    20 dB); a quarter of the scenes get foreign colours, so that imperfect pictures survive the round trip too.
    Deviation: latent noise of fixed size instead of a learned posterior; the KL term of a VAE kept this small one
    blurred.
    """
    generator = torch.Generator().manual_seed(config.seed + 1)
    torch.manual_seed(config.seed + 1)
    vae = networks.build_vae().to(config.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=config.vae_steps, pct_start=0.1)
    batch = 48
    for step in trange(config.vae_steps, desc="vae", mininterval=10):
        scenes = sample_scenes(random_labels(batch, generator), generator)
        foreign = torch.rand(batch, 1, generator=generator) < 0.25
        scenes = replace(scenes, rgb=torch.where(foreign, torch.rand(batch, 3, generator=generator), scenes.rgb))
        frame = torch.randint(NUM_FRAMES, (batch,), generator=generator)
        frames = (render(scenes)[torch.arange(batch), frame] * 2 - 1).to(config.device)
        mean = vae.encode(frames).latent_dist.mean
        noise = torch.randn(mean.shape, generator=generator).to(config.device)
        decoded = vae.decode(mean + 0.05 * noise).sample
        error = 0.3 * (decoded - frames).abs().mean() + 4.0 * (decoded - frames).square().mean()
        loss = error + 1e-3 * mean.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            psnr = -10 * ((decoded - frames).square().mean() / 4).log10()
            print(f"vae: step {step + 1} PSNR {psnr.item():.1f} dB", flush=True)
    with torch.no_grad():
        frames = render(sample_scenes(random_labels(256, generator), generator)).flatten(0, 1).to(config.device) * 2 - 1
        vae.register_to_config(scaling_factor=float(1 / vae.encode(frames).latent_dist.mean.std()))
    print(f"vae: scaling factor {vae.config.scaling_factor:.4f}")
    _store(vae, config.out / "shared" / "vae")


@torch.no_grad()
def _latents_and_text(config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [N,4,F,8,8], caption embeddings [N,L,D] and the empty caption's [1,L,D], by the stored networks."""
    shared = config.out / "shared"
    vae = AutoencoderKL.from_pretrained(shared / "vae").float().to(config.device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared / "tokenizer")
    text = CLIPTextModel.from_pretrained(shared / "text_encoder").float()

    def embed(captions: list[str]) -> Tensor:
        return text(tokenizer(captions, padding="max_length", return_tensors="pt").input_ids).last_hidden_state

    generator = torch.Generator().manual_seed(config.seed + 2)
    latents, texts = [], []
    for _ in trange(config.num_videos // 64, desc="latents", mininterval=10):
        labels = random_labels(64, generator)
        video = render(sample_scenes(labels, generator)).to(config.device) * 2 - 1
        z = vae.encode(video.flatten(0, 1)).latent_dist.mean * vae.config.scaling_factor
        latents.append(z.unflatten(0, (64, -1)).transpose(1, 2).cpu())
        texts.append(embed(captions_of(labels)))
    return torch.cat(latents), torch.cat(texts), embed([""])


def _train_diffusion(config: Config, net: nn.Module, kind: str, *, steps: int, stop: int, learning_rate: float) -> None:
    latents, texts, empty = _latents_and_text(config)
    generator = torch.Generator().manual_seed(config.seed + 3)
    net.to(config.device)
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 100)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 100, eta_min=learning_rate * 0.02)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], [100])
    alphas = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    running = 0.0
    for step in trange(min(steps, stop), desc=kind, mininterval=10):
        index = torch.randint(len(latents), (config.batch_size,), generator=generator)
        x0, text = latents[index], texts[index]
        drop = torch.rand(len(x0), generator=generator) < UNCONDITIONAL_SHARE
        text = torch.where(drop[:, None, None], empty, text)
        noise = torch.randn(x0.shape, generator=generator)
        if kind == "flow":
            u = torch.rand(len(x0), generator=generator)
            sigma = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
            s = sigma[:, None, None, None, None]
            t, x_t, target = sigma * 1000, (1 - s) * x0 + s * noise, noise - x0
        else:
            t = torch.randint(1000, (len(x0),), generator=generator)
            a = alphas[t][:, None, None, None, None]
            x_t, target = a.sqrt() * x0 + (1 - a).sqrt() * noise, noise
        output = net(x_t.to(config.device), t.to(config.device), text.to(config.device)).sample
        loss = (output - target.to(config.device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        beta = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            for k, v in net.state_dict().items():
                average[k].lerp_(v, 1 - beta)
        running += loss.item()
        if step % 250 == 249 or step == min(steps, stop) - 1:
            print(f"{kind}: step {step + 1} mean loss {running / (step % 250 + 1):.4f}", flush=True)
            running = 0.0
            live = {k: v.clone() for k, v in net.state_dict().items()}
            net.load_state_dict(average)
            _store(net, config.out / kind / ("transformer" if kind == "flow" else "unet"))
            net.load_state_dict(live)


def train_flow(config: Config) -> None:
    """Flow matching with a `WanTransformer3DModel`."""
    torch.manual_seed(config.seed + 4)
    FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT).save_pretrained(config.out / "flow" / "scheduler")
    net = networks.build_flow_transformer()
    _train_diffusion(config, net, "flow", steps=config.flow_steps, stop=config.flow_stop, learning_rate=2e-3)


def train_unet(config: Config) -> None:
    """Noise prediction with a `UNet3DConditionModel`."""
    torch.manual_seed(config.seed + 5)
    DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(config.out / "unet" / "scheduler")
    net = networks.build_unet()
    _train_diffusion(config, net, "unet", steps=config.unet_steps, stop=config.unet_stop, learning_rate=2e-3)


def main(config: Config) -> None:
    """Runs the stages in order and writes `pretrain.json` beside them."""
    torch.set_num_threads(config.num_threads)
    stages = {"text": train_text, "vae": train_vae, "flow": train_flow, "unet": train_unet}
    unknown = [s for s in config.stages if s not in stages]
    if unknown:
        raise ValueError(f"unknown stages {unknown}; expected some of {list(stages)}")
    config.out.mkdir(parents=True, exist_ok=True)
    for stage in config.stages:
        with torch.random.fork_rng():
            stages[stage](config)
        record = {k: str(v) for k, v in vars(config).items()} | {"torch": torch.__version__}
        (config.out / f"{stage}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
