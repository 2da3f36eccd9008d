"""How rewards get their networks: the context they are built in, finding files, reading them safely, random weights.

Nothing here downloads: a file is in a folder the user names, in the hub's local cache, or part of the package.
Nothing is unpickled with code execution.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vdm_env import weights_folder
from vdm_env.checksums import check_file
from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.rewards.published import METRICS, PUBLISHED, files_of

WORLD_WEIGHTS = Path(__file__).resolve().parents[1] / "worlds" / "moving_shapes" / "weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardContext:
    """What a reward is built for and from."""

    world: Literal["moving_shapes"] | None = None
    """the embedded world, whose small reward networks are part of the package; None: the published networks"""
    weights: Literal["pretrained", "random"] = "pretrained"
    """random: the real architecture, drawn from `seed`, without any file; for tests, speed and memory work"""
    scale: Literal["full", "tiny"] = "full"
    """tiny shrinks the architecture; only with random weights"""
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    """of the network; pre-processing and scores are float32 or better"""
    folder: Path | None = None
    """where to look for weight files before the hub's cache; for the embedded world, instead of the package's own"""
    seed: int = 0
    """of random weights"""
    num_frames: int | None = None
    """frames of the videos that will be scored, where the network has to fit them; None: the network's own number"""
    dimension: str | None = None
    """which of its scores a reward that has several gives, as in "VideoScore:temporal"; None: all of them together"""

    def __post_init__(self) -> None:
        for key, allowed in (
            ("world", (None, "moving_shapes")),
            ("weights", ("pretrained", "random")),
            ("scale", ("full", "tiny")),
        ):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r} is unknown; expected one of {list(allowed)}")
        if self.scale == "tiny" and self.weights == "pretrained":
            raise ValueError("scale='tiny' has no pretrained weights; pass weights='random' with it")
        if not self.dtype.is_floating_point:
            raise ValueError(
                f"dtype={self.dtype} is no floating type; expected torch.float32, bfloat16, float16 or float64"
            )


def published(context: RewardContext) -> RewardContext:
    """The context for a network that exists only as published: an embedded world has no small one of its own."""
    return replace(context, world=None)


def warn_random(name: str) -> None:
    """Says that scores of a reward mean nothing because its weights are random."""
    warnings.warn(
        f"reward {name!r} has random weights: its scores mean nothing; for tests, speed and memory work only",
        stacklevel=3,
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside (network initialisation) come from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def frozen(module: nn.Module, context: RewardContext) -> Any:
    """The module on the context's device and dtype, in evaluation mode, its weights constant.

    Gradients pass to the input.
    """
    return module.requires_grad_(False).eval().to(device=context.device, dtype=context.dtype)


def find_files(context: RewardContext, name: str, repository: str, files: Sequence[str], how: str = "") -> list[Path]:
    """Paths of the files of a repository of `published.py`. Never downloads; `how` says how to fetch them by hand.

    Looked through, in this order: `context.folder`, the folder that VDM_WEIGHTS names, this package's own folder, the
    hub's local cache. In a folder a file lies in a sub-folder called like the repository (`HPSv2` or `xswu/HPSv2`), in
    `context.folder` also directly.

    Raises:
        MissingWeightsError: a file is in none of them.
    """
    from huggingface_hub import try_to_load_from_cache

    short = repository.split("/")[-1]
    roots = [Path(root) for root in (context.folder, weights_folder.given_root(), weights_folder.home()) if root]
    places = [root / part for root in roots for part in (repository, short)]
    places += [Path(context.folder)] if context.folder is not None else []
    found: list[Path] = []
    for file in files:
        path: Any = next((p / file for p in places if (p / file).is_file()), None)
        path = path or try_to_load_from_cache(repository, file)
        if not isinstance(path, str | Path):
            raise _missing(name, repository, files, file, roots, how)
        found.append(Path(path))
    return found


def _missing(
    name: str, repository: str, files: Sequence[str], file: str, roots: Sequence[Path], how: str
) -> MissingWeightsError:
    known = files_of(repository, file)
    kind = "metric" if name in METRICS else "reward"
    about = f" ({known.size}; licence: {known.licence})" if known else ""
    needed = known.files if known and all(known.has(one) for one in files) else files  # parts that an index names, too
    how = how or (f"`curl -L -O {known.address}`" if known and known.address else "")
    ways = [f"with `vdm-env download {name}`"] if known in PUBLISHED.get(name.partition(":")[0], ()) else []
    fetch = ", ".join([*ways, *([f"by hand with {how}"] if how else [])])
    check = f" (sha256 {known.sha256})" if known and known.sha256 else ""
    looked = ", ".join(str(root) for root in dict.fromkeys(roots))
    return MissingWeightsError(
        f"{kind} {name!r} needs {', '.join(needed)} of the repository {repository!r}{about}; {file} is neither in "
        f"{looked} nor in the hub's local cache. Fetch it once {fetch}{check}, or put "
        f"the files into a folder of the repository's name in the folder that {weights_folder.VARIABLE} names. "
        "Without any download there are the environment 'MovingShapes-HPS', whose small networks are part of "
        "this package, and weights='random'"
    )


def find_transformers(context: RewardContext, name: str, repository: str) -> Path:
    """The folder with config.json and weights in one of the two forms that `load_transformers` reads.

    Raises:
        MissingWeightsError: see `find_files`.
    """
    try:
        files = find_files(context, name, repository, ["config.json", "model.safetensors"])
    except MissingWeightsError as missing:
        try:
            files = find_files(context, name, repository, ["config.json", "pytorch_model.bin"])
        except MissingWeightsError:
            raise missing from None
    return files[0].parent


def world_folder(context: RewardContext, name: str, *parts: str) -> Path:
    """A folder of the embedded world's weights.

    Raises:
        MissingWeightsError: it is not there.
    """
    folder = Path(context.folder or WORLD_WEIGHTS).joinpath(*parts)
    if not folder.is_dir():
        raise MissingWeightsError(
            f"reward {name!r} of MovingShapes needs the folder {folder}, which is part of the package; reinstall it, "
            "or train the networks anew with `python -m vdm_env.worlds.moving_shapes.pretrain_rewards`"
        )
    return folder


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch checkpoint, read without code execution.

    A checkpoint's `state_dict` entry is taken where it has one.

    Raises:
        CorruptWeightsError: truncated, damaged, or a pickle that would have to run code.
    """
    content = read_checkpoint(path)
    return as_tensors(content.get("state_dict", content) if isinstance(content, dict) else content, path)


def read_checkpoint(path: Path) -> Any:
    """Whatever a .safetensors file or a torch checkpoint holds, read without code execution.

    Raises:
        CorruptWeightsError: truncated, damaged, not the file that was fetched (see `vdm_env.checksums`), or a pickle
            that would have to run code.
    """
    try:
        check_file(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (CorruptWeightsError, FileNotFoundError, PermissionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged pickle, of the old format above all, can raise anything
        raise corrupt(path, error) from error


def as_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The content, a dictionary of tensors.

    Raises:
        CorruptWeightsError: it is anything else.
    """
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CorruptWeightsError(
            f"{path} holds {type(content).__name__}, expected a dictionary of tensors; fetch the file again"
        )
    return content


def corrupt(path: Path, error: Exception) -> CorruptWeightsError:
    """The error for a file that cannot be read."""
    size = path.stat().st_size if path.is_file() else 0
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CorruptWeightsError(
        f"{path} ({size} bytes) is truncated, damaged, or cannot be read without running code from it ({reason}); "
        "delete it and fetch or restore it"
    )


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies tensors into the module; every name and every shape must fit.

    Raises:
        CorruptWeightsError: a missing, unexpected or misshapen tensor.
    """
    # Buffers that older releases stored and newer ones compute.
    tensors = {k: v for k, v in tensors.items() if not k.endswith("position_ids")}
    wanted = module.state_dict()
    wrong = {
        "missing": sorted(set(wanted) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(wanted)),
        "of another shape": [
            f"{k} {list(v.shape)} instead of {list(wanted[k].shape)}"
            for k, v in tensors.items()
            if k in wanted and v.shape != wanted[k].shape
        ],
    }
    if any(wrong.values()):
        detail = "; ".join(f"{what}: {_first(names)}" for what, names in wrong.items() if names)
        raise CorruptWeightsError(
            f"{path} does not fit {type(module).__name__}: {detail}; it is another architecture or incomplete, "
            "fetch it again"
        )
    module.load_state_dict(tensors, strict=True)


def _first(names: Sequence[str], count: int = 8) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no load report of transformers; what matters of it becomes an error here."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_transformers(
    model_class: Any, folder: Path, *, renamed: Mapping[str, str] | None = None, fresh: str = "", **config_changes: Any
) -> Any:
    """A transformers model, float32, from a folder with config.json and model.safetensors (or pytorch_model.bin).

    Strict: names and shapes must all fit, after transformers' own translation of older names.

    Args:
        model_class: of transformers.
        folder: with the files.
        renamed: {pattern: name}, a translation that some releases of transformers lack.
        fresh: ending of names that a file may leave out: they stay as transformers initialises them.
        config_changes: fields of the configuration that are not as stored.

    Raises:
        MissingWeightsError: a file is not there.
        CorruptWeightsError: a file cannot be used.
    """
    weights = next((folder / f for f in ("model.safetensors", "pytorch_model.bin") if (folder / f).is_file()), None)
    if weights is None or not (folder / "config.json").is_file():
        raise MissingWeightsError(
            f"{folder} should hold config.json and model.safetensors; restore or fetch the folder again"
        )
    try:
        config = model_class.config_class.from_pretrained(folder, local_files_only=True, **config_changes)
    except (OSError, ValueError, TypeError) as error:
        raise corrupt(folder / "config.json", error) from error
    read_tensors(weights)  # a damaged file gets its clear error here; reading is memory-mapped and cheap
    with seeded(0), _quiet():
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            key_mapping=None if renamed is None else dict(renamed),
        )
    if fresh:
        info["missing_keys"] = {name for name in info["missing_keys"] if not str(name).endswith(fresh)}
    wrong = {
        k: sorted(map(str, info[k]))[:4] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]
    }
    wrong = {k: v for k, v in wrong.items() if not all("position_ids" in name for name in v)}
    if wrong:
        raise CorruptWeightsError(
            f"{weights} does not fit {model_class.__name__}: {wrong}; it is another architecture or incomplete, "
            "fetch it again"
        )
    return model
