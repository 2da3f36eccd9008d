"""Open-Sora 1.2's released files: where they lie, reading them strictly, and the cleaning and tokens of its prompts.

Three repositories belong together: the network and the autoencoder (a `config.json` and a `model.safetensors` each,
under the names of the original classes, which are also ours) and a T5-XXL encoder with its tokenizer.

Verified: names and shapes against state dicts of the original classes, small and full size, and the networks against
their outputs. Not verified: the released files themselves, which were not available.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftfy
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from vdm_env.checksums import check_file
from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.models import local_weights
from vdm_env.models.base import Condition
from vdm_env.models.loading import load_folder
from vdm_env.models.local_weights import Published
from vdm_env.models.opensora_vae import OpenSoraVAE, VideoVAEConfig
from vdm_env.models.stdit3 import STDiT3, STDiT3Config
from vdm_env.models.visiting import visiting

NAME = "OpenSora1.2"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_LICENCE = "the one on the repository's page, not confirmed here; read it before anything but research"


def _published(repository: str, files: tuple[str, ...], size: str, **more: Any) -> Published:
    return Published(model=NAME, repository=repository, files=files, size=size, licence=_LICENCE, **more)


PUBLISHED = {
    "network": _published(
        "hpcai-tech/OpenSora-STDiT-v3", (_CONFIG, _WEIGHTS), "1.21 billion parameters, 4.8 GB in float32"
    ),
    "vae": _published(
        "hpcai-tech/OpenSora-VAE-v1.2", (_CONFIG, _WEIGHTS), "0.39 billion parameters, 1.6 GB in float32"
    ),
    "text": _published(
        "DeepFloyd/t5-v1_1-xxl",
        ("*",),
        "4.76 billion parameters in the encoder, 19 GB in float32",
        unwanted=("*.h5", "*.msgpack"),  # its weights are in .bin files
    ),
}
_MARKS = {"network": "caption_channels", "vae": "", "text": "d_model"}
"""An entry that a part's config.json has and the other parts' have not: files of all three bear the same names."""
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Texts to token ids and mask, both int64 [B,L]."""


# --------------------------------------------------------------------------------------------------------------- text

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
    """The text T5 is given: the release asks for an aesthetic score of 6.5, then cleans twice.

    Deviation: no motion or camera scores, which the release adds when they are asked for.
    """
    return clean_text(clean_text(f"{prompt} aesthetic score: 6.5."))


def byte_tokenizer(length: int) -> Tokenize:
    """Bytes as token ids, where the real vocabulary is a file that random weights come without."""

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens = [byte + 3 for byte in text.encode()][: length - 1] + [
                1
            ]  # 0, 1, 2: padding, end and unknown, as in T5
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids, (ids != 0).long()

    return tokenize


@dataclass(frozen=True, kw_only=True)
class T5Text:
    """Prompts to T5 states `text` [B,L,D] and `mask` [B,L], cleaned and padded as in the release.

    Every prompt is embedded once by the environment, which keeps the result; the encoder (4.8 billion parameters) is on
    the device only meanwhile.
    """

    encoder: Any
    tokenize: Tokenize
    device: torch.device

    def visit(self) -> AbstractContextManager[None]:
        """Inside, the encoder stays on the device from one call to the next."""
        return visiting(self.encoder, self.device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Condition:
        ids, mask = (v.to(self.device) for v in self.tokenize([release_prompt(p) for p in prompts]))
        with self.visit():
            return {"text": self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, "mask": mask}


# -------------------------------------------------------------------------------------------------------------- files


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CorruptWeightsError: truncated, damaged, or not the file that was fetched (see `vdm_env.checksums`).
    """
    check_file(file)
    return load_file(file)


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Puts the tensors into the module; every name and shape must be the architecture's.

    A module made on the meta device takes them over as they are, type included.

    Raises:
        CorruptWeightsError: with the list of missing, unexpected and mis-shaped tensors.
    """
    own = module.state_dict()
    shapes = [
        f"{name} {list(value.shape)} instead of {list(own[name].shape)}"
        for name, value in tensors.items()
        if name in own and value.shape != own[name].shape
    ]
    wrong = {
        "missing": sorted(set(own) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(own)),
        "mis-shaped": shapes,
    }
    if any(wrong.values()):
        listed = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise CorruptWeightsError(
            f"{source} does not fit {type(module).__name__} of {len(own)} tensors: {listed}. Fetch it again, "
            "together with the config.json that belongs to it"
        )
    module.load_state_dict(dict(tensors), strict=True, assign=any(value.is_meta for value in own.values()))


def read_stdit3(folder: Path) -> STDiT3:
    """The network of a release folder: `config.json` and `model.safetensors`.

    Raises:
        MissingWeightsError: a file is absent.
        CorruptWeightsError: a file is damaged, or the tensors are not those of the architecture that the config
            describes.
    """
    config, weights = _release_files(folder, "network")
    try:
        with torch.device("meta"):  # no memory and no time for values that are replaced at once
            network = STDiT3(STDiT3Config.of(read_json(config)))
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CorruptWeightsError(
            f"{config} does not describe a network that can be built ({error}); fetch or copy it again"
        ) from error
    load_exactly(network, read_tensors(weights), str(weights))
    return network


def read_vae(folder: Path, config: VideoVAEConfig | None = None) -> OpenSoraVAE:
    """The autoencoder of a release folder: `model.safetensors` holds both stages, scale and shift.

    Args:
        folder: with `config.json` and `model.safetensors`.
        config: sizes; the release's if None (its `config.json` does not list them).

    Raises:
        MissingWeightsError: a file is absent.
        CorruptWeightsError: a file is damaged, or the tensors are not the architecture's.
    """
    _, weights = _release_files(folder, "vae")
    with torch.device("meta"):
        vae = OpenSoraVAE(config or VideoVAEConfig())
    load_exactly(vae, read_tensors(weights), str(weights))
    return vae


def hub_tokenizer(folder: Path, length: int) -> Tokenize:
    """The tokenizer of a release folder, padding and cutting to `length` tokens.

    Raises:
        CorruptWeightsError: its files are incomplete or damaged.
    """
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix in (".json", ".txt", ".model"):
            check_file(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        raise CorruptWeightsError(
            f"{folder} does not hold a tokenizer ({error}); fetch or copy it again, then retry"
        ) from error

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        batch = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return batch.input_ids, batch.attention_mask

    return tokenize


def read_text(folder: Path, length: int, dtype: torch.dtype, *, device: torch.device | str) -> T5Text:
    """The T5 encoder and its tokenizer from their folder, padding to `length` tokens.

    Args:
        folder: with `config.json`, the weights, and the tokenizer's files.
        length: in tokens.
        dtype: of the encoder.
        device: where it runs; it rests in main memory.

    Raises:
        MissingWeightsError: a file is absent.
        CorruptWeightsError: a file is damaged, or the tensors are not those that the config describes.
    """
    encoder = load_folder(T5EncoderModel, folder, device="cpu", dtype=dtype)
    return T5Text(encoder=encoder, tokenize=hub_tokenizer(folder, length), device=torch.device(device))


def find_release() -> dict[str, Path]:
    """Folders of "network", "vae" and "text".

    Raises:
        MissingWeightsError: naming every repository that is not on this machine.
    """
    found = {part: _find(part) for part in PUBLISHED}
    absent = [PUBLISHED[part] for part, place in found.items() if place is None]
    if absent:
        raise local_weights.missing(*absent)
    return {part: place for part, place in found.items() if place is not None}


def _find(part: str) -> Path | None:
    def fits(place: Path) -> bool:
        config = place / _CONFIG
        if not config.is_file() or (part != "text" and not (place / _WEIGHTS).is_file()):
            return False
        entries = read_json(config)
        others = [mark for other, mark in _MARKS.items() if other != part and mark]
        return (not _MARKS[part] or _MARKS[part] in entries) and not any(mark in entries for mark in others)

    cached = local_weights.find_cached(PUBLISHED[part], _CONFIG)
    if (folder := local_weights.find_folder(PUBLISHED[part], fits)) is not None:
        return folder
    return cached.parent if cached is not None and fits(cached.parent) else None


def read_json(file: Path) -> dict[str, Any]:
    """A configuration file.

    Raises:
        CorruptWeightsError: it is no JSON of names and values, or not the file that was fetched.
    """
    check_file(file)
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise CorruptWeightsError(f"{file} is no JSON ({error}); fetch or copy it again") from error
    if not isinstance(content, dict):
        raise CorruptWeightsError(f"{file} holds a {type(content).__name__}, no names and values; fetch it again")
    return content


def _release_files(folder: Path, part: str) -> tuple[Path, Path]:
    files = folder / _CONFIG, folder / _WEIGHTS
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise MissingWeightsError(
            f"no {' and '.join(absent)} in {folder}; expected the files of the repository {PUBLISHED[part].repository}"
        )
    return files
