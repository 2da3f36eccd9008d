"""Where pretrained weights may lie on this machine, and the one error that says how to get them; no downloads.

Looked through, in this order: the folder (or the single file) that the environment variable VDM_WEIGHTS names, this
package's own folder for converted weights, and the hub's local cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from vdm_env.errors import MissingWeightsError

VARIABLE = "VDM_WEIGHTS"


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


def given_root() -> Path | None:
    """What VDM_WEIGHTS names, or None."""
    value = os.environ.get(VARIABLE)
    return Path(value).expanduser() if value else None


def home() -> Path:
    """Folder for converted weights: VDM_WEIGHTS if it is a folder, else `vdm_env/weights` in the user's cache."""
    root = given_root()
    if root is not None and root.is_dir():
        return root
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vdm_env" / "weights"


def find_folder(published: Published, fits: Callable[[Path], bool]) -> Path | None:
    """The first folder that `fits`: VDM_WEIGHTS, its sub-folders named like the model or repository, or the cache's."""
    roots = [root for root in (given_root(), home()) if root is not None]
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


def missing(published: Published, also: Iterable[str] = ()) -> MissingWeightsError:
    """The error for weights that are in none of these places.

    Args:
        published: what was looked for.
        also: further sentences, for a model that needs more than one repository.
    """
    root = given_root()
    name, files = published.model, " ".join(published.files)
    looked = (
        f"not in {VARIABLE}={root}{'' if root.exists() else ' (which does not exist)'}"
        if root
        else f"{VARIABLE} is not set"
    )
    return MissingWeightsError(
        f"pretrained weights of {name} are not on this machine ({looked}; nor in {home()} or the hub's local cache). "
        f"They are in the hub repository {published.repository!r}: {', '.join(published.files)}; {published.size}. "
        f"Licence: {published.licence}. "
        + "".join(f"{sentence} " for sentence in also)
        + f"Fetch them once with `hf download {published.repository} {files}`, or set "
        f"{VARIABLE} to the folder that holds them. What works now, without any download: "
        'make("MovingShapes-HPS") (small trained weights come with the package) and '
        f'make("{name}-...", weights="random", scale="tiny")'
    )
