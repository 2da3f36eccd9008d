"""Pictures from MovingShapes' stored networks: round trips through the autoencoder, videos of the diffusion models."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel, WanTransformer3DModel
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from vdm_env.worlds.moving_shapes.render import NUM_FRAMES, SIZE_PX, captions_of, random_labels
from vdm_env.worlds.moving_shapes.reward_data import Random


class Codec:
    """The stored autoencoder on frames in [0,1]; latents in its own units, about `scale` in deviation."""

    def __init__(self, base: Path) -> None:
        self.vae = AutoencoderKL.from_pretrained(base / "shared" / "vae", local_files_only=True).float().eval()
        self.vae.requires_grad_(False)
        self.scale = 1.0 / float(self.vae.config.scaling_factor)

    def encode(self, frames: Tensor) -> Tensor:
        return self.vae.encode(frames * 2 - 1).latent_dist.mean

    def decode(self, latents: Tensor) -> Tensor:
        return (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def round_trip(self, frames: Tensor, draw: Random, noise: float = 0.3) -> Tensor:
        """Encodes, adds noise of up to `noise` latent deviations (none to half of the frames), decodes."""
        latents = self.encode(frames)
        amount = draw.uniform(len(frames)) * draw.chance(0.5, len(frames)) * noise * self.scale
        return self.decode(latents + amount[:, None, None, None] * draw.normal(*latents.shape))


@torch.no_grad()
def generated_videos(base: Path, num_videos: int, draw: Random, batch: int = 32) -> Tensor:
    """Videos [num,F,3,H,W] of the diffusion models stored in `base`, half of each.

    With varied guidance and step counts.
    """
    codec = Codec(base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base / "shared" / "tokenizer", local_files_only=True)
    encoder = CLIPTextModel.from_pretrained(base / "shared" / "text_encoder", local_files_only=True).float()
    flow = WanTransformer3DModel.from_pretrained(base / "flow" / "transformer", local_files_only=True).float().eval()
    unet = UNet3DConditionModel.from_pretrained(base / "unet" / "unet", local_files_only=True).float().eval()
    ddim = DDIMScheduler.from_pretrained(base / "unet" / "scheduler", local_files_only=True)
    videos = []
    for i in range(-(-num_videos // batch)):
        captions = captions_of(random_labels(batch, draw.generator)) + [""] * batch
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = encoder(tokens).last_hidden_state
        x = draw.normal(batch, 4, NUM_FRAMES, SIZE_PX // 4, SIZE_PX // 4)
        guidance = float(draw.uniform(1, low=1.0, high=4.0))
        num_steps = int(draw.integers(9, 1)) + 4

        def guided(net, x, t, text=text, guidance=guidance):  # type: ignore[no-untyped-def]
            given, free = net(torch.cat([x, x]), torch.as_tensor(t).expand(len(x) * 2), text).sample.chunk(2)
            return free + guidance * (given - free)

        if i % 2 == 0:
            u = torch.linspace(1, 0, num_steps + 1)
            sigmas = (2 * u / (1 + u)).tolist()  # shift 2
            for sigma, following in zip(sigmas, sigmas[1:], strict=False):
                x = x + (following - sigma) * guided(flow, x, sigma * 1000)
        else:
            ddim.set_timesteps(num_steps + 4)
            for t in ddim.timesteps:
                x = ddim.step(guided(unet, x, t), t, x, eta=1.0, generator=draw.generator).prev_sample
        frames = codec.decode(x.transpose(1, 2).flatten(0, 1) * codec.scale)
        videos.append(frames.unflatten(0, (batch, NUM_FRAMES)))
        print(f"generated {batch * (i + 1)} videos", flush=True)
    return torch.cat(videos)[:num_videos]
