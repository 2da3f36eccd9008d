"""Where pretrained weights may lie on this machine, and the one error that says how to get them; no downloads.

Looked through, in this order: the folder (or the single file) that the environment variable VDM_WEIGHTS names, this
package's own folder for converted weights, and the hub's local cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from vdm_env.errors import MissingWeightsError
from vdm_env.weights_folder import VARIABLE, given_root, home, user_cache

UNWANTED = ("*.bin", "*.ckpt", "*.h5", "*.msgpack", "*.onnx*", "*.fp16.*", "*non_ema*")
"""Further copies of the weights in other formats, which releases keep beside the safetensors files that are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Where a model's weights are published."""

    model: str
    """name in environment ids, and of the sub-folder looked for in VDM_WEIGHTS"""
    repository: str
    """on the hub"""
    files: tuple[str, ...]
    """files, or patterns of files, to fetch"""
    size: str
    licence: str
    unwanted: tuple[str, ...] = UNWANTED
    """what patterns shall not fetch; a file that is named in full is always wanted"""
    needs: tuple[Published, ...] = ()
    """further repositories, without which this one is of no use"""


def find_folder(published: Published, fits: Callable[[Path], bool]) -> Path | None:
    """The first folder that `fits`: VDM_WEIGHTS, its sub-folders named like the model or repository, or the cache's."""
    roots = [root for root in dict.fromkeys((given_root(), home(), user_cache())) if root is not None]
    names = (published.model, published.repository, published.repository.split("/")[-1])
    places = [place for root in roots for place in (*(root / name for name in names), root)]
    return next((place for place in places if fits(place)), None)


def find_file(published: Published, file: str) -> Path | None:
    """A file of the repository: VDM_WEIGHTS itself, in or below it as `find_folder` looks, or in the hub's cache."""
    root = given_root()
    if root is not None and root.is_file() and root.suffix == Path(file).suffix:
        return root
    folder = find_folder(published, lambda place: (place / file).is_file())
    if folder is not None:
        return folder / file
    return find_cached(published, file)


def find_cached(published: Published, file: str) -> Path | None:
    """A file of the repository in the hub's local cache."""
    cached = try_to_load_from_cache(published.repository, file)
    return Path(cached) if isinstance(cached, str | Path) else None


def missing(*absent: Published) -> MissingWeightsError:
    """The error for weights that are in none of these places: all repositories that a model lacks, at least one."""
    root, first = given_root(), absent[0]
    others = [*absent[1:], *(needed for published in absent for needed in published.needs)]
    looked = (
        f"not in {VARIABLE}={root}{'' if root.exists() else ' (which does not exist)'}"
        if root
        else f"{VARIABLE} is not set"
    )
    return MissingWeightsError(
        f"pretrained weights of {first.model} are not on this machine ({looked}; nor in {home()} or the hub's local "
        f"cache). They are in the hub repository {_described(first)} "
        + "".join(f"Also needed is {_described(other)} " for other in others)
        + f"Fetch them once with `vdm-env download {first.model}`, or set {VARIABLE} to the folder that holds them. "
        'What works now, without any download: make("MovingShapes-HPS") (small trained weights come with the package) '
        f'and make("{first.model}-...", weights="random", scale="tiny")'
    )


def _described(published: Published) -> str:
    files = ", ".join(published.files)
    return f"{published.repository!r}: {files}; {published.size}. Licence: {published.licence}."
