"""Stable Video Diffusion (arXiv 2311.15127): an image becomes a clip. EDM noise levels, v-prediction, no text.

The UNet sees the noisy latents beside the image's own latents (on the channels, the same for every frame), one CLIP
embedding of the image as its only token, and three numbers: frames a second less one, motion bucket, and the strength
of the noise on the image. The image's latents are not multiplied by the autoencoder's factor; unconditional is a zero
embedding and zero image latents. Guidance grows over the frames, from 1 at the first to w at the last.

Noise on the conditioning image is drawn once for each video, keyed by its seed (`vdm_env.noise.CONDITIONING`).

Sampling: the release uses `sampler="euler"`, which is deterministic. The default here is "euler_ancestral" on the same
grid, because policy gradients need noise. Checked against diffusers' pipeline on random weights: network, guidance,
image pre-processing and Euler sampler. Not checked, for want of the files: what only a trained network shows.

Deviation: an image of another size than the video's is resized by a bicubic filter with antialiasing, the pipeline
takes PIL's Lanczos filter; either squashes an image of other proportions.

Legend: B videos, C latent channels, F frames, H W pixels, h w latent rows and columns, D width of the CLIP embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdm_env.errors import CorruptWeightsError
from vdm_env.models import svd_weights
from vdm_env.models.base import Condition, ModelSpec, latent_shape, tiny_spec
from vdm_env.models.codec import recomputed
from vdm_env.schedule import EDMSchedule

_COMMON: dict[str, Any] = dict(
    height=576,
    width=1024,
    spatial_stride=8,
    size_multiple=64,  # three halvings of the latents
    num_steps=25,
    sampler="euler_ancestral",
    noise_level=1.0,
    guidance_scale=3.0,
    fps=7.0,
    conditioned_on="image",
)
SVD = ModelSpec(name="SVD", num_frames=14, max_frames=14, **_COMMON)
SVD_XT = ModelSpec(name="SVDXT", num_frames=25, max_frames=25, **_COMMON)
"""Each was trained on its own number of frames; `vdm_env.continuation` makes longer videos of them."""
TINY_SIZE = (4, 64, 64)
SVD_SCHEDULE = EDMSchedule(sigma_min=0.002, sigma_max=700.0, rho=7.0, p_mean=0.7, p_std=1.6)
"""Grid as in the release's scheduler. Noise of training: ln sigma ~ N(0.7, 1.6^2) is what several public fine-tuning
scripts for these weights draw, and the paper's appendix gives for its image-to-video model (the latter from memory; the
release has no training code)."""
MOTION_BUCKET = 127
NOISE_STRENGTH = 0.02
"""Standard deviation of the noise on the image, whose pixels are in [-1,1]; defaults of diffusers' pipeline."""

# ------------------------------------------------------------------------------------------------------------ the model


def call_svd(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Network output v [B,C,F,h,w] at scaled latents x_t [B,C,F,h,w] and t = ln(sigma) / 4 [B].

    The condition holds `image` [B,1,D], `image_latents` [B,C,h,w] and `time_ids` [B,3].
    """
    dtype = next(denoiser.parameters()).dtype
    x = x_t.transpose(1, 2)
    image = condition["image_latents"].to(x)[:, None].expand(-1, x.shape[1], -1, -1, -1)
    output = denoiser(
        torch.cat([x, image], dim=2).to(dtype),
        t,
        encoder_hidden_states=condition["image"].to(dtype),
        added_time_ids=condition["time_ids"],
        return_dict=False,
    )[0]
    return output.transpose(1, 2).to(x_t.dtype)


@dataclass(frozen=True, kw_only=True)
class SVDModel:
    """A `VideoModel` conditioned on images, for videos of the spec's size."""

    spec: ModelSpec
    denoiser: nn.Module
    schedule: EDMSchedule
    vae: Any
    """an `AutoencoderKLTemporalDecoder`"""
    image_encoder: Any
    """a `CLIPVisionModelWithProjection`"""
    pixel_mean: tuple[float, ...] = svd_weights.CLIP_MEAN
    pixel_std: tuple[float, ...] = svd_weights.CLIP_STD
    motion_bucket: float = MOTION_BUCKET
    noise_strength: float = NOISE_STRENGTH
    min_guidance: float = 1.0
    """guidance of the first frame"""
    decode_chunk: int | None = None
    """frames decoded together; None is all. The decoder looks across frames, so that less memory costs differences at
    the borders of chunks. With gradients, every chunk is computed anew in the backward pass"""

    def with_size(self, num_frames: int, height: int, width: int) -> SVDModel:
        """The same networks for videos of another size, in frames and pixels.

        Raises:
            ValueError: a size the model cannot make.
        """
        self.latent_shape(num_frames, height, width)
        return replace(self, spec=replace(self.spec, num_frames=num_frames, height=height, width=width))

    def with_decode_chunk(self, frames: int) -> SVDModel:
        """The same networks, decoding this many frames together.

        Raises:
            ValueError: less than one.
        """
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise ValueError(f"decode_chunk={frames!r}: expected a whole number of frames of at least 1")
        return replace(self, decode_chunk=frames)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return call_svd(self.denoiser, x_t, t, condition)

    def guidance(self, scale: float, num_frames: int) -> Tensor:
        """Guidance of every frame [F]: linear from `min_guidance` to `scale`; 1 everywhere for scale 1."""
        first = 1.0 if scale == 1.0 else self.min_guidance
        return torch.linspace(first, scale, num_frames)

    def encode_images(self, images: Sequence[Tensor], noise: Tensor | None = None) -> Condition:
        """Condition of B images, each [3,H',W'] in [0,1] and of any size. Differentiable.

        Args:
            images: what the videos start from.
            noise: standard normal [B,3,H,W] of the video's size, for the noise on the images; none if None. The
                network is told the model's `noise_strength` in either case.
        """
        device, spec = next(self.denoiser.parameters()).device, self.spec
        frames, views = [], []
        for image in images:
            pixels = image.to(device)[None] * 2 - 1
            same = pixels.shape[-2:] == (spec.height, spec.width)
            size = (spec.height, spec.width)
            frames.append(pixels if same else F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1))
            views.append(blur_resize(pixels, self.image_encoder.config.image_size) / 2 + 0.5)
        video = torch.cat(frames)
        if noise is not None:
            video = video + self.noise_strength * noise.to(video)
        latents = self.vae.encode(video.to(self.vae.dtype)).latent_dist.mode()
        mean, std = (torch.tensor(v).to(video).view(3, 1, 1) for v in (self.pixel_mean, self.pixel_std))
        view = ((torch.cat(views) - mean) / std).to(self.image_encoder.dtype)
        embedding = self.image_encoder(view).image_embeds
        exact = torch.promote_types(embedding.dtype, torch.float32)
        return {
            "image": embedding[:, None].to(exact),
            "image_latents": latents.to(exact),
            "time_ids": self._time_ids(len(images), device),
        }

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The unconditional condition, B times: zeros, and the numbers all videos have.

        Raises:
            ValueError: a text that is not empty.
        """
        texts = [text for text in prompts if text]
        if texts:
            raise ValueError(
                f"{self.spec.name} animates images and reads no text, got the prompt {texts[0]!r}; give images "
                "(make(..., images=...), or reset(options={'images': [...]})), or take a text-to-video model"
            )
        place: dict[str, Any] = {"device": next(self.denoiser.parameters()).device}
        place["dtype"] = torch.promote_types(self.image_encoder.dtype, torch.float32)
        channels, _, height, width = self.latent_shape(1, self.spec.height, self.spec.width)
        return {
            "image": torch.zeros(len(prompts), 1, self.image_encoder.config.projection_dim, **place),
            "image_latents": torch.zeros(len(prompts), channels, height, width, **place),
            "time_ids": self._time_ids(len(prompts), place["device"]),
        }

    def unconditional(self, condition: Condition) -> Condition:
        """What guidance contrasts these with: no image, the same numbers."""
        zeros = {name: torch.zeros_like(condition[name]) for name in ("image", "image_latents")}
        return {**condition, **zeros}

    def _time_ids(self, batch: int, device: Any) -> Tensor:
        numbers = [self.spec.fps - 1, self.motion_bucket, self.noise_strength]  # trained on fps - 1
        return torch.tensor([numbers] * batch, dtype=torch.float32, device=device)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Latents [B,C,F,h,w] of a video [B,F,3,H,W] in [0,1] (the posteriors' means), scaled."""
        frames = video.flatten(0, 1).to(self.vae.dtype) * 2 - 1
        latents = self.vae.encode(frames).latent_dist.mode() * self.vae.config.scaling_factor
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        return latents.unflatten(0, video.shape[:2]).transpose(1, 2)

    def decode(self, latents: Tensor, frames: Tensor | None = None) -> Tensor:
        """Video [B,n,3,H,W] in [0,1]; only chunks with chosen frames [B,n] are decoded."""
        z = (latents / self.vae.config.scaling_factor).to(self.vae.dtype).transpose(1, 2)
        batch, total = z.shape[:2]
        size = self.decode_chunk or total
        starts = range(0, total, size)
        if frames is not None:
            chosen = {int(i) // size for i in frames.flatten()}
            starts = [s for s in starts if s // size in chosen]  # type: ignore[assignment]
        parts: list[Tensor] = []
        numbers: list[int] = []
        for start in starts:
            part = z[:, start : start + size]
            parts.append(self._decode(part) if len(starts) == 1 else recomputed(self._decode, part))
            numbers += range(start, start + part.shape[1])
        video = (torch.cat(parts, dim=1).to(latents.dtype) / 2 + 0.5).clamp(0, 1)
        if frames is None:
            return video
        place = torch.zeros(total, dtype=torch.int64, device=video.device)
        place[numbers] = torch.arange(len(numbers), device=video.device)
        return video[torch.arange(batch, device=video.device)[:, None], place[frames.to(video.device)]]

    def _decode(self, z: Tensor) -> Tensor:
        """Pixels [B,F,3,H,W] of a chunk [B,F,C,h,w]."""
        pixels = self.vae.decode(z.flatten(0, 1), num_frames=z.shape[1]).sample
        return pixels.unflatten(0, z.shape[:2])

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return latent_shape(self.spec, num_frames, height, width)


def blur_resize(images: Tensor, side: int) -> Tensor:
    """[B,3,H',W'] to [B,3,side,side]: Gaussian blur against aliasing, then bicubic with aligned corners.

    As the image encoder of the release was used: deviation (f - 1) / 2 for a factor f of reduction, at least 0.001, and
    a window of four deviations, at least 3 pixels, mirrored at the edges.
    """
    for dim in (-2, -1):
        factor = images.shape[dim] / side
        deviation = max((factor - 1) / 2, 0.001)
        reach = int(max(4 * deviation, 3)) // 2  # an even window is made one longer
        place = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
        weight = torch.exp(-place.square() / (2 * deviation**2))
        weight = weight / weight.sum()
        pad = (0, 0, reach, reach) if dim == -2 else (reach, reach, 0, 0)
        kernel = weight.view(1, 1, -1, 1) if dim == -2 else weight.view(1, 1, 1, -1)
        padded = F.pad(images, pad, mode="reflect")
        images = F.conv2d(padded, kernel.expand(images.shape[1], -1, -1, -1), groups=images.shape[1])
    return F.interpolate(images, (side, side), mode="bicubic", align_corners=True)


# -------------------------------------------------------------------------------------------------------------- loading


def load(
    spec: ModelSpec = SVD,
    *,
    weights: str,
    scale: str,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
) -> SVDModel:
    """`SVD` (14 frames) or `SVD_XT` (25).

    Args:
        spec: the model.
        weights: "pretrained" (see `vdm_env.models.local_weights` for where they are looked for), or "random".
        scale: with random weights, "tiny" shrinks the networks, the video (4 frames of 64x64) and the steps.
        device: of all networks.
        dtype: of all networks; in float16 the autoencoder stays in float32 where its config asks for that.
        seed: of random weights.

    Raises:
        MissingWeightsError: pretrained weights that are not on this machine.
        CorruptWeightsError: a damaged file, or one of another architecture or sampler.
    """
    if weights == "pretrained":
        networks = svd_weights.released(spec.name, spec.num_frames, device=device, dtype=dtype)
    else:
        warnings.warn(
            f"{spec.name} has random weights: use it for tests, speed and memory, not for results", stacklevel=3
        )
        tiny = scale == "tiny"
        networks = svd_weights.untrained(spec.num_frames, tiny, device=device, dtype=dtype, seed=seed)
        spec = tiny_spec(spec, *TINY_SIZE) if tiny else spec
    networks.vae.enable_gradient_checkpointing()  # it has no adapters: recomputing its blocks changes no number
    return SVDModel(
        spec=spec,
        denoiser=networks.unet,
        schedule=schedule_of(networks.scheduler),
        vae=networks.vae,
        image_encoder=networks.image_encoder,
        pixel_mean=networks.pixel_mean,
        pixel_std=networks.pixel_std,
    )


def schedule_of(settings: dict[str, Any]) -> EDMSchedule:
    """The schedule that a `scheduler_config.json` describes; the release's own where it is {}.

    Raises:
        CorruptWeightsError: v-prediction on continuous Karras noise levels is not what it asks for.
    """
    expected = {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True}
    wrong = {key: settings[key] for key, value in expected.items() if settings and settings.get(key, value) != value}
    if wrong:
        raise CorruptWeightsError(f"the scheduler's settings {wrong} are not Stable Video Diffusion's {expected}")
    try:
        return replace(
            SVD_SCHEDULE,
            sigma_min=float(settings.get("sigma_min") or SVD_SCHEDULE.sigma_min),
            sigma_max=float(settings.get("sigma_max") or SVD_SCHEDULE.sigma_max),
        )
    except (TypeError, ValueError) as error:
        raise CorruptWeightsError(f"the scheduler's settings {settings} give no noise levels ({error})") from error
