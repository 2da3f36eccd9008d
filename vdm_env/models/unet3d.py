"""The `UNet3DConditionModel` family: ModelScope, Zeroscope, VideoCrafter2, the embedded UNet. Epsilon prediction, DDIM.

VideoCrafter2's network is diffusers' UNet3D plus a small frame-rate embedding that is added after the time
embedding's MLP (`FpsTimeEmbedding`); its latents carry the scale s_t (`vdm_env.schedule.latent_scale_lvdm`). Its
checkpoint is read by `vdm_env.models.lvdm`. T2V-Turbo builds on it in `vdm_env.models.t2v_turbo`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from vdm_env.models import local_weights, lvdm
from vdm_env.models.base import Condition, LatentVideoModel, ModelSpec, TokenTextEncoder, frozen, tiny_spec
from vdm_env.models.checkpoint_files import read_checkpoint
from vdm_env.models.codec import FrameCodec
from vdm_env.models.conditioning import CONDITIONING_FPS, FpsTimeEmbedding, add_fps_embedding
from vdm_env.models.fast_path import fast, shares_text
from vdm_env.models.loading import load_folder
from vdm_env.models.local_weights import UNWANTED, Published
from vdm_env.models.recompute import make_recomputable
from vdm_env.models.untrained import seeded
from vdm_env.models.visiting import resting_place
from vdm_env.schedule import VPSchedule, latent_scale_lvdm, scaled_linear_alphas_cumprod
from vdm_env.weights_folder import home_to_write

SD_SCHEDULE = VPSchedule(
    alphas_cumprod=scaled_linear_alphas_cumprod(lvdm.NUM_TRAIN_TIMESTEPS, lvdm.BETA_START, lvdm.BETA_END),
    prediction="epsilon",
)
"""Stable Diffusion's noise schedule, which ModelScope, VideoCrafter2 and T2V-Turbo share."""
LVDM_SCHEDULE = VPSchedule(
    alphas_cumprod=SD_SCHEDULE.alphas_cumprod, prediction="epsilon", latent_scale=latent_scale_lvdm(), spacing="lvdm"
)
"""The same with VideoCrafter2's latent scale and LVDM's grid."""

MODELSCOPE = ModelSpec(
    name="ModelScope",
    height=256,
    width=256,
    num_frames=16,
    spatial_stride=8,
    max_frames=200,  # 25 seconds, the longest of its model card; the network knows no positions in time
    size_multiple=8,
    num_steps=50,
    guidance_scale=9.0,
)
ZEROSCOPE = replace(MODELSCOPE, name="Zeroscope", height=320, width=576, num_frames=24)
"""ModelScope trained on, at a larger size. Steps and guidance are those of the pipeline it shares."""
VIDEOCRAFTER2 = ModelSpec(
    name="VideoCrafter2",
    height=320,
    width=512,
    num_frames=16,
    spatial_stride=8,
    max_frames=16,  # `temporal_length` of its configuration; the network knows no positions in time
    size_multiple=64,  # the original raises unless latents are multiples of 8
    num_steps=50,
    guidance_scale=12.0,
    fps=10.0,
)
TINY_SIZE = (4, 64, 64)
"""Frames, height and width of a shrunken model's videos."""
PUBLISHED = {
    "ModelScope": Published(
        model="ModelScope",
        repository="ali-vilab/text-to-video-ms-1.7b",
        files=("unet/*", "vae/*", "text_encoder/*"),
        size="about 3.7 GB in float16, 7.4 GB in float32",
        licence="CC-BY-NC by its model card, not for commercial use",
    ),
    "Zeroscope": Published(
        model="Zeroscope",
        repository="cerspense/zeroscope_v2_576w",
        files=("unet/*", "vae/*", "text_encoder/*"),
        size="about 7.4 GB in float32",
        licence="CC-BY-NC by its model card (from memory), not for commercial use",
        unwanted=tuple(pattern for pattern in UNWANTED if pattern != "*.bin"),  # network and autoencoder are only there
    ),
    "VideoCrafter2": Published(
        model="VideoCrafter2",
        repository="VideoCrafter/VideoCrafter2",
        files=("model.ckpt",),
        size="about 3.7 GB in float16, 7.4 GB in float32 (1.85 billion parameters with autoencoder and text encoder)",
        licence="the one on the repository's page, not confirmed here; read it before anything but research",
    ),
}


def call_unet3d(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """UNet3D on latents [B,C,F,H,W] and t [B] in [0, 999].

    The condition holds "text" [B,L,D] and, for VideoCrafter2's network, optionally "fps" [B] or [B,1].

    Raises:
        ValueError: a condition the network does not take.
    """
    dtype = next(denoiser.parameters()).dtype
    numbers = {name: value for name, value in condition.items() if name != "text"}
    if numbers and not isinstance(denoiser.time_embedding, FpsTimeEmbedding):
        raise ValueError(f"this network is conditioned on text alone, not on {sorted(numbers)}; leave them out")
    output = denoiser(
        x_t.to(dtype),
        t,
        encoder_hidden_states=condition["text"].to(dtype),
        timestep_cond=numbers or None,
        cross_attention_kwargs={"num_frames": x_t.shape[2]} if shares_text(denoiser) else None,
        return_dict=False,
    )[0]
    return output.to(x_t.dtype)


@dataclass(frozen=True, kw_only=True)
class TextWithNumbers(TokenTextEncoder):
    """A text encoder whose conditions also carry fixed numbers, such as the frame rate, as [B,1]; "" has them too."""

    numbers: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str]) -> Condition:
        condition = super().__call__(prompts)
        like = condition["text"]
        return condition | {
            name: torch.full((len(like), 1), value, dtype=torch.float32, device=like.device)
            for name, value in self.numbers.items()
        }


# ---------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The networks of one model; `conditioning` are the weights around its time embedding (None: random ones)."""

    unet: Any
    vae: Any
    text: Any
    conditioning: dict[str, Tensor] | None = None


def build(
    spec: ModelSpec,
    parts: Parts,
    schedule: VPSchedule,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    numbers: Mapping[str, float] | None = None,
    call: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor] = call_unet3d,
) -> LatentVideoModel:
    """Puts a model together, frozen and in place; `numbers` are conditions all its prompts carry."""
    make_recomputable(parts.unet)
    # Not diffusers' own `to`, which logs a warning about layers in float32 even where there are none.
    unet, vae = (nn.Module.to(part, device, dtype) for part in (parts.unet, parts.vae))
    return LatentVideoModel(
        spec=spec,
        denoiser=frozen(fast(unet)),
        schedule=schedule,
        codec=FrameCodec(vae=frozen(vae)),
        # Padding is id 0, as VideoCrafter2 and Stable Diffusion 2 were trained with.
        text=TextWithNumbers(
            encoder=frozen(parts.text.to(resting_place(device), dtype)),
            tokenize=open_clip.get_tokenizer("ViT-H-14", context_length=parts.text.config.max_position_embeddings),
            device=torch.device(device),
            numbers=numbers or {},
        ),
        call=call,
    )


def load(
    spec: ModelSpec, *, weights: str, scale: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> LatentVideoModel:
    """`MODELSCOPE`, `ZEROSCOPE` or `VIDEOCRAFTER2`; `weights="random"` is the architecture untrained.

    `scale="tiny"` shrinks the networks, the video (4 frames of 64x64) and the number of steps.

    Pretrained weights are looked for as `vdm_env.models.local_weights` says; VideoCrafter2's `model.ckpt` is converted
    on first use.

    Raises:
        MissingWeightsError: `weights="pretrained"` and they are not on this machine.
        CorruptWeightsError: they are, but truncated, damaged, or of another architecture.
    """
    lvdm_model = spec.name == "VideoCrafter2"
    if weights == "pretrained":
        parts = (
            load_videocrafter2(device=device, dtype=dtype)
            if lvdm_model
            else _load_modelscope(PUBLISHED[spec.name], device=device, dtype=dtype)
        )
        if lvdm_model:
            add_fps_embedding(parts.unet, parts.conditioning)
    else:
        warnings.warn(
            f"{spec.name} has random weights: use it for tests, speed and memory, not for results", stacklevel=3
        )
        if scale == "tiny":
            spec = tiny_spec(spec, *TINY_SIZE)
        with seeded(seed, device, dtype):
            parts = random_parts(scale, spec.width)
            if lvdm_model:
                add_fps_embedding(parts.unet)
    if lvdm_model:
        return build(spec, parts, LVDM_SCHEDULE, device=device, dtype=dtype, numbers={"fps": CONDITIONING_FPS})
    return build(spec, parts, SD_SCHEDULE, device=device, dtype=dtype)


def load_videocrafter2(*, device: torch.device | str, dtype: torch.dtype) -> Parts:
    """VideoCrafter2's networks from this machine; converts `model.ckpt` once where only that is there.

    Raises:
        MissingWeightsError, CorruptWeightsError: see `load`.
    """
    published = PUBLISHED["VideoCrafter2"]
    found = local_weights.find_folder(published, lambda place: converted_in(place) is not None)
    folder = None if found is None else converted_in(found)
    checkpoint = local_weights.find_file(published, published.files[0])
    if folder is not None and checkpoint is not None:
        lvdm.check_source(folder, checkpoint)
    if folder is None:
        if checkpoint is None:
            raise local_weights.missing(published)
        # A folder of its own: the checkpoint itself may lie in the one that has the model's name.
        folder = lvdm.convert_file(checkpoint, home_to_write() / published.model / lvdm.CONVERTED)
    return load_converted(folder, device=device, dtype=dtype)


def converted_in(place: Path) -> Path | None:
    """The converted weights of VideoCrafter2 in this folder: itself, or its sub-folder `converted`."""
    return next((folder for folder in (place, place / lvdm.CONVERTED) if lvdm.is_converted(folder)), None)


def load_converted(folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> Parts:
    """Networks of a folder that `lvdm.save_folders` wrote, before `add_fps_embedding`.

    Raises:
        MissingWeightsError, CorruptWeightsError: a part is not there, or damaged.
    """
    parts = _load_networks(folder, device=device, dtype=dtype)
    return Parts(
        unet=parts.unet,
        vae=parts.vae,
        text=parts.text,
        conditioning=read_checkpoint(folder / "conditioning" / "model.safetensors"),
    )


def _load_networks(folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> Parts:
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    return Parts(
        unet=load_folder(UNet3DConditionModel, folder / "unet", **place),
        vae=load_folder(AutoencoderKL, folder / "vae", **place),
        text=load_folder(CLIPTextModel, folder / "text_encoder", **place),
    )


def _load_modelscope(published: Published, *, device: torch.device | str, dtype: torch.dtype) -> Parts:
    folder = local_weights.find_folder(
        published, lambda p: (p / "unet" / "config.json").is_file() and not (p / lvdm.MARKER).is_file()
    )
    if folder is None:
        cached = local_weights.find_cached(published, "unet/config.json")
        if cached is None:
            raise local_weights.missing(published)
        folder = cached.parents[1]
    return _load_networks(folder, device=device, dtype=dtype)


def random_parts(scale: str, sample_size: int) -> Parts:
    """Untrained networks at full or tiny size, drawn from the global generator (see `vdm_env.models.untrained`)."""
    tiny = scale == "tiny"
    width = 32 if tiny else 1024
    small: dict[str, Any] = dict(
        block_out_channels=(16, 32, 32, 32),
        attention_head_dim=8,
        cross_attention_dim=width,
        norm_num_groups=8,
        layers_per_block=1,
    )
    return Parts(
        unet=UNet3DConditionModel(**small) if tiny else UNet3DConditionModel(),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8) if tiny else (128, 256, 512, 512),
            layers_per_block=1 if tiny else 2,
            latent_channels=4,
            norm_num_groups=4 if tiny else 32,
            sample_size=sample_size,
        ),
        text=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=1 if tiny else 23,  # 24 less one: the penultimate layer's states, with the final norm
                num_attention_heads=2 if tiny else 16,
                hidden_act="gelu",
                eos_token_id=49407,
            )
        ),
    )
