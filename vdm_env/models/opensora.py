"""Open-Sora 1.2: STDiT3 with rectified flow, a spatial and a temporal autoencoder, T5-XXL.

The network emits x0 - eps; here the sign is turned, so that actions are eps - x0 as everywhere in this package. Three things depend on
the size of the video that is asked for: the noise grid (its shift), the network's positions and the number of decoded frames. A model
is therefore made for one size, and `with_size` gives another on the same networks.

Deviation: the release's script holds height, width and frames in bfloat16, which moves its timesteps by up to 0.5 of 1000; here they
are exact. Deviation: no motion or camera scores in the prompt.

Legend: B videos, C latent channels, F latent frames, H W latent rows and columns, L text tokens.
"""

from __future__ import annotations

import html
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ftfy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.models.base import Condition, ModelSpec, frozen
from vdm_env.models.opensora_vae import SPATIAL_STRIDE, OpenSoraVAE, TemporalVAEConfig, VideoVAEConfig
from vdm_env.models.stdit3 import STDiT3, STDiT3Config
from vdm_env.schedule import FlowSchedule, opensora_shift

OPENSORA12 = ModelSpec(
    name="OpenSora1.2",
    height=240,
    width=426,
    num_frames=51,
    spatial_stride=SPATIAL_STRIDE,
    temporal_stride=4,
    size_multiple=SPATIAL_STRIDE,
    num_steps=30,
    sampler="flow_grpo",
    noise_level=0.7,
    guidance_scale=7.0,
    fps=24.0,
    lora_targets=("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"),
)
"""The release at 240p, 9:16, two seconds; VADER's and the release's script sample with `sampler="flow_ode"`."""

MIN_FRAMES, MAX_FRAMES = 17, 408
"""One chunk of the autoencoder, below which the noise grid is not defined, to 16 seconds, the longest it was trained on."""
NOMINAL_SIZES = (426, 854)
"""Sides of 240p and 480p in 16:9 that no 8 divides; the decoded side is 424 and 848."""
IMAGE_FPS = 120.0
"""What the release conditions single frames on."""
STDIT_REPO, VAE_REPO, TEXT_REPO = "hpcai-tech/OpenSora-STDiT-v3", "hpcai-tech/OpenSora-VAE-v1.2", "DeepFloyd/t5-v1_1-xxl"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Texts to token ids and mask, both int64 [B,L]."""


# --------------------------------------------------------------------------------------------------------- the model


def call_stdit3(
    denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, fps: float, height: float, width: float
) -> Tensor:
    """Flow eps - x0 [B,C,F,H,W] at latents x_t and t [B] in [0, 1000].

    Args:
        denoiser: an `STDiT3`.
        x_t: latents [B,C,F,H,W].
        t: timesteps [B], 1000 being pure noise.
        condition: `text` [B,L,D], `mask` [B,L], and optionally `x_mask` [B,F], False on frames that are given clean.
        fps: frames a second.
        height: of the video in pixels, as asked for.
        width: likewise.
    """
    size = {"fps": fps, "height": height, "width": width, "x_mask": condition.get("x_mask")}
    velocity = denoiser(x_t, t, condition["text"], condition["mask"], **size)
    return -velocity[:, : x_t.shape[1]].to(x_t.dtype)


def release_schedule(num_frames: int, height: int, width: int) -> FlowSchedule:
    """Rectified flow with the release's shift for videos of this size (pixels)."""
    return FlowSchedule(shift=opensora_shift(height, width, num_frames))


@dataclass(frozen=True, kw_only=True)
class T5Text:
    """Prompts to T5 states, cleaned and padded as in the release."""

    encoder: Any
    tokenize: Tokenize

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Condition:
        ids, mask = (v.to(self.encoder.device) for v in self.tokenize([release_prompt(p) for p in prompts]))
        return {"text": self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, "mask": mask}


@dataclass(frozen=True, kw_only=True)
class OpenSoraModel:
    """A `VideoModel` for videos of the spec's size."""

    spec: ModelSpec
    denoiser: nn.Module
    schedule: FlowSchedule
    vae: OpenSoraVAE
    text: T5Text

    def with_size(self, num_frames: int, height: int, width: int) -> OpenSoraModel:
        """The same networks for videos of another size, in frames and pixels.

        Raises:
            ValueError: a size the model cannot make.
        """
        self.latent_shape(num_frames, height, width)
        spec = replace(self.spec, num_frames=num_frames, height=height, width=width)
        return replace(self, spec=spec, schedule=release_schedule(num_frames, height, width))

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        spec = self.spec
        expected = self.latent_shape(spec.num_frames, spec.height, spec.width)
        if tuple(x_t.shape[1:]) != expected:
            raise ValueError(
                f"{spec.name} was made for {spec.num_frames} frames of {spec.height}x{spec.width}, latents {expected}; got "
                f"{tuple(x_t.shape[1:])}. Its noise grid and positions depend on the size: call model.with_size(frames, height, width)"
            )
        fps = IMAGE_FPS if spec.num_frames == 1 else spec.fps
        return call_stdit3(self.denoiser, x_t, t, condition, fps=fps, height=spec.height, width=spec.width)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """T5 states `text` [B,L,D] and `mask` [B,L]; "" is the learned null caption at full length, see `unconditional`."""
        null = self._null_caption()
        text = null.expand(len(prompts), -1, -1).clone()
        mask = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
        rows = [row for row, prompt in enumerate(prompts) if prompt]
        if rows:
            encoded = self.text([prompts[row] for row in rows])
            text[rows], mask[rows] = encoded["text"].to(text), encoded["mask"].to(mask)
        return {"text": text, "mask": mask}

    def unconditional(self, condition: Condition) -> Condition:
        """What guidance subtracts for these prompts: the null caption, cut to each prompt's own length as in the release."""
        return {**condition, "text": self._null_caption().to(condition["text"]).expand_as(condition["text"])}

    def _null_caption(self) -> Tensor:
        return self.denoiser.y_embedder.y_embedding[None]  # type: ignore[union-attr, index, return-value]

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Latents [B,C,F,H,W] of a video [B,F,3,H,W] in [0,1] (the posteriors' means)."""
        return self.vae.encode(video.transpose(1, 2) * 2 - 1).float()

    def decode(self, latents: Tensor, frames: Tensor | None = None) -> Tensor:
        """Video [B,n,3,H,W] in [0,1]. The temporal stage runs on chunks with a chosen frame, the spatial one on chosen frames."""
        needed = None if frames is None else sorted({int(i) for i in frames.flatten()})
        cells = self.vae.temporal_decode(latents, self.spec.num_frames, needed)
        if frames is not None:
            rows = torch.arange(len(cells), device=cells.device)[:, None]
            cells = cells.transpose(1, 2)[rows, frames.to(cells.device)].transpose(1, 2)
        video = self.vae.spatial_decode(cells).transpose(1, 2)
        return (video.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W).

        Raises:
            ValueError: sides that are neither a multiple of 8 nor nominal (426, 854), or frames that are not 1 or 17 to 408.
        """
        name = self.spec.name
        for side, value in (("height", height), ("width", width)):
            if value <= 0 or (value % SPATIAL_STRIDE and value not in NOMINAL_SIZES):
                near = max(SPATIAL_STRIDE, round(value / SPATIAL_STRIDE) * SPATIAL_STRIDE)
                raise ValueError(
                    f"{name}: {side}={value} is neither a positive multiple of {SPATIAL_STRIDE} nor one of the release's {NOMINAL_SIZES}; "
                    f"try {side}={near}"
                )
        if num_frames != 1 and not MIN_FRAMES <= num_frames <= MAX_FRAMES:
            near = min(max(num_frames, MIN_FRAMES), MAX_FRAMES)
            raise ValueError(
                f"{name}: num_frames={num_frames}; it makes a single frame or {MIN_FRAMES} to {MAX_FRAMES}; try num_frames={near}"
            )
        return self.spec.latent_channels, *self.vae.config.latent_size(num_frames, height, width)


# ------------------------------------------------------------------------------------------------------------ prompts

_MARKUP = re.compile(r"<[^<>]*>")
_LINK = re.compile(r"\b(?:https?://|www\.)\S+")
_SIGNS = re.compile(r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*\s]+")


def clean_text(text: str) -> str:
    """Lower case, repaired characters, no markup, links or signs.

    Deviation: the release's cleaner also drops advertising phrases, file names and article numbers of scraped captions.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text.lower())))
    text = _SIGNS.sub(" ", _LINK.sub(" ", _MARKUP.sub(" ", text)))
    return text.strip().strip("\"'").strip()


def release_prompt(prompt: str) -> str:
    """The text T5 is given: the release asks for an aesthetic score of 6.5, then cleans twice."""
    return clean_text(clean_text(f"{prompt} aesthetic score: 6.5."))


def byte_tokenizer(length: int) -> Tokenize:
    """Bytes as token ids, where the real vocabulary is a file that random weights come without."""

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens = [byte + 3 for byte in text.encode()][: length - 1] + [1]  # 0, 1, 2: padding, end and unknown, as in T5
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids, (ids != 0).long()

    return tokenize


# ------------------------------------------------------------------------------------------------------------ weights


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CorruptWeightsError: truncated or damaged.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CorruptWeightsError(f"{file} is damaged or truncated ({error}); fetch or copy it again") from error


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies the tensors into the module; every name and shape must be the architecture's.

    Raises:
        CorruptWeightsError: with the list of missing, unexpected and mis-shaped tensors.
    """
    own = module.state_dict()
    shapes = [f"{k} {list(v.shape)}, expected {list(own[k].shape)}" for k, v in tensors.items() if k in own and v.shape != own[k].shape]
    wrong = {"missing": sorted(set(own) - set(tensors)), "unexpected": sorted(set(tensors) - set(own)), "mis-shaped": shapes}
    if any(wrong.values()):
        listed = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise CorruptWeightsError(
            f"{source} does not fit {type(module).__name__} of {len(own)} tensors: {listed}. Fetch it again, or give the config.json "
            "that belongs to it"
        )
    module.load_state_dict(dict(tensors), strict=True)


def read_stdit3(folder: Path) -> STDiT3:
    """The network of a release folder: `config.json` and `model.safetensors`.

    Raises:
        MissingWeightsError, CorruptWeightsError: a file is absent, damaged, or not of the architecture that its config describes.
    """
    config, weights = _release_files(folder, STDIT_REPO)
    network = STDiT3(STDiT3Config.of(json.loads(config.read_text())))
    load_exactly(network, read_tensors(weights), str(weights))
    return network


def read_vae(folder: Path, config: VideoVAEConfig | None = None) -> OpenSoraVAE:
    """The autoencoder of a release folder (`model.safetensors` holds both stages, scale and shift); the release's sizes if None.

    Raises:
        MissingWeightsError, CorruptWeightsError: as `read_stdit3`.
    """
    _, weights = _release_files(folder, VAE_REPO)
    vae = OpenSoraVAE(config or VideoVAEConfig())
    load_exactly(vae, read_tensors(weights), str(weights))
    return vae


def _release_files(folder: Path, repository: str) -> tuple[Path, Path]:
    files = folder / _CONFIG, folder / _WEIGHTS
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise MissingWeightsError(f"no {' and '.join(absent)} in {folder}; expected the files of the repository {repository}")
    return files


def _find(repository: str, folder: Path | None) -> Path | None:
    """Folder of a repository's files: below `folder`, else in the hub's local cache. Never downloads."""
    from huggingface_hub import try_to_load_from_cache

    if folder is not None:
        places = [folder / repository, folder / repository.split("/")[-1]]
        return next((place for place in places if place.is_dir()), None)
    config = try_to_load_from_cache(repository, _CONFIG)
    return Path(config).parent if isinstance(config, str) else None


@contextmanager
def _building(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Networks made inside are drawn from `seed`, directly on the device and in the type: a full one exists only once."""
    before = torch.get_default_dtype()
    cards = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def load(
    spec: ModelSpec = OPENSORA12,
    *,
    weights: str,
    scale: str,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    folder: Path | None = None,
) -> OpenSoraModel:
    """Open-Sora 1.2 for videos of the spec's size.

    Args:
        spec: `OPENSORA12`, or the same with another size.
        weights: "pretrained", or "random" for the architecture untrained, with bytes for tokens.
        scale: with random weights, "tiny" shrinks the networks and the default size (17 frames of 48x64).
        device: of all networks.
        dtype: of all networks; angles and norms stay float32 or better.
        seed: of random weights.
        folder: holds the repositories' folders (`OpenSora-STDiT-v3`, `OpenSora-VAE-v1.2`, `t5-v1_1-xxl`); the hub's cache if None.

    Raises:
        MissingWeightsError: pretrained weights that are not on this machine.
        CorruptWeightsError: weights that cannot be read or are not this architecture's.
    """
    device = torch.device(device)
    if weights == "pretrained":
        networks = _pretrained(spec, device, dtype, folder)
    else:
        warnings.warn(f"{spec.name} has random weights: use it for tests, speed and memory, not for results", stacklevel=3)
        if scale == "tiny":
            # An explicit size of the caller's own is kept.
            small = (spec.num_frames, spec.height, spec.width) == (OPENSORA12.num_frames, OPENSORA12.height, OPENSORA12.width)
            spec = replace(spec, num_frames=17, height=48, width=64) if small else spec
        with _building(device, dtype, seed):
            networks = _random(scale == "tiny")
    denoiser, vae, encoder, tokenize = networks
    model = OpenSoraModel(
        spec=spec,
        denoiser=frozen(denoiser),
        schedule=release_schedule(spec.num_frames, spec.height, spec.width),
        vae=frozen(vae),  # type: ignore[arg-type]
        text=T5Text(encoder=frozen(encoder), tokenize=tokenize),
    )
    return model.with_size(spec.num_frames, spec.height, spec.width)


def _random(tiny: bool) -> tuple[STDiT3, OpenSoraVAE, nn.Module, Tokenize]:
    config, vae = STDiT3Config(), VideoVAEConfig()
    text = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    if tiny:
        config = STDiT3Config(hidden_size=32, depth=1, num_heads=2, caption_channels=16, model_max_length=48)
        vae = VideoVAEConfig(
            temporal=TemporalVAEConfig(filters=8, num_res_blocks=1, num_groups=4),
            spatial={**vae.spatial, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
        )
        text = dict(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    encoder = T5EncoderModel(T5Config(**text, feed_forward_proj="gated-gelu", use_cache=False))
    return STDiT3(config), OpenSoraVAE(vae), encoder, byte_tokenizer(config.model_max_length)


def _pretrained(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, folder: Path | None
) -> tuple[nn.Module, nn.Module, nn.Module, Tokenize]:
    found = {repository: _find(repository, folder) for repository in (STDIT_REPO, VAE_REPO, TEXT_REPO)}
    missing = [repository for repository, place in found.items() if place is None]
    if missing:
        raise MissingWeightsError(
            f"pretrained weights of {spec.name} are not on this machine: {', '.join(missing)} are neither in "
            f"{folder or 'a folder you gave'} nor in the hub's local cache. Needed are {STDIT_REPO} (config.json, model.safetensors: "
            f"1.21 billion parameters, 4.8 GB in float32), {VAE_REPO} (the same two files: 0.39 billion, 1.6 GB) and {TEXT_REPO} (T5 encoder "
            "and tokenizer: 4.76 billion, 19 GB). Read the licence on each repository's card, then fetch each with `hf download "
            'REPOSITORY`. What works now: make("MovingShapes-HPS") (small trained weights come with the package) or '
            f'make("{spec.name}-...", weights="random", scale="tiny")'
        )
    place = {name: path for name, path in found.items() if path is not None}
    denoiser, vae = read_stdit3(place[STDIT_REPO]), read_vae(place[VAE_REPO])
    tokenizer = AutoTokenizer.from_pretrained(place[TEXT_REPO], local_files_only=True)
    encoder = T5EncoderModel.from_pretrained(place[TEXT_REPO], dtype=dtype, local_files_only=True)
    length = denoiser.config.model_max_length

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        batch = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return batch.input_ids, batch.attention_mask

    angles = denoiser.rope.freqs
    networks = denoiser.to(device=device, dtype=dtype), vae.to(device=device, dtype=dtype), encoder.to(device)
    if dtype != torch.float64:
        denoiser.rope.freqs = angles.to(device)  # rounding them to bfloat16 would blur late frames' positions
    return *networks, tokenize
