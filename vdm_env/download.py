"""Fetching the published files of models and rewards, to where their loaders look: `vdm-env download VideoCrafter2`.

Exactly the files that a loader reads are fetched, with huggingface_hub, whose downloads go on where an interrupted one
stopped and leave alone what is there already. They go into the folder that VDM_WEIGHTS names, in a sub-folder called
like the repository, or else into the hub's local cache. The few files that are published elsewhere come from their own
address into `vdm_env.weights_folder.home()`; their checksum is tested where it is known.

What lies in a folder is compared with the checksum the hub gave for it, and gets a file of checksums, with which
loading compares it from then on (`vdm_env.checksums`). In the hub's cache the name of a file is its checksum already.

Nothing but this module ever uses the network.
"""

from __future__ import annotations

import argparse
import errno
import fnmatch
import importlib
import pkgutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from vdm_env import checksums, models, weights_folder
from vdm_env.errors import CorruptWeightsError, DownloadError
from vdm_env.models.local_weights import Published
from vdm_env.models.releases import Release
from vdm_env.registry import list_models, list_rewards
from vdm_env.rewards.published import PUBLISHED as REWARD_FILES

_CHUNK = 2**20
_TRANSPORT: type[Exception] = getattr(hub_errors, "HTTPError", OSError)
"""What the hub's client lets through from its HTTP library."""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetch:
    """Files of one repository."""

    repository: str
    files: tuple[str, ...]
    """names, or patterns of names"""
    size: str
    licence: str
    unwanted: tuple[str, ...] = ()
    """patterns of files that are not fetched, though a pattern of `files` fits them"""
    address: str | None = None
    """of the one file, where the repository is not on the hub"""
    sha256: str | None = None


def plan(name: str) -> list[Fetch]:
    """What a model or a reward needs; nothing for those whose weights come with the package.

    Args:
        name: as in environment ids, or the name of a release that several models share ("StableDiffusion1.5").

    Raises:
        ValueError: an unknown name, or a plug-in's, whose files are not known here.
    """
    name, released = name.partition(":")[0], _released()  # "VideoScore:temporal" is one score of a network
    if name in released:
        wanted: list[Published] = []
        for published in released[name]:
            wanted += [one for one in (published, *published.needs) if one not in wanted]
        return [
            Fetch(repository=p.repository, files=p.files, size=p.size, licence=p.licence, unwanted=p.unwanted)
            for p in wanted
        ]
    if name in REWARD_FILES:
        return [
            Fetch(
                repository=f.repository,
                files=f.files,
                size=f.size,
                licence=f.licence,
                address=f.address,
                sha256=f.sha256,
            )
            for f in REWARD_FILES[name]
        ]
    entry = models.MODELS.get(name)
    if entry is not None and entry.world is not None:
        return []
    from vdm_env.rewards import REWARDS

    if name in REWARDS:
        return []
    if name in (*list_models(), *list_rewards()):
        raise ValueError(f"{name} comes from another package, which says where its weights are")
    raise ValueError(
        f"{name!r} is no model and no reward; models: {', '.join(list_models())}; rewards: {', '.join(list_rewards())}"
    )


def _released() -> dict[str, list[Published]]:
    """What the modules of `vdm_env.models` say about published weights, by the model's name."""
    found: dict[str, list[Published]] = {}

    def note(value: Any) -> None:
        if isinstance(value, dict):
            for one in value.values():
                note(one)
        published = value.published if isinstance(value, Release) else value
        if isinstance(published, Published) and published not in found.setdefault(published.model, []):
            found[published.model].append(published)

    for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            note(value)
    return found


def destination(fetch: Fetch, folder: str | Path | None = None) -> Path | None:
    """The folder the files go to; None is the hub's local cache.

    Args:
        fetch: the files.
        folder: in whose sub-folder; what VDM_WEIGHTS names if None.
    """
    root = weights_folder.given_root() if folder is None else Path(folder)
    if root is not None and not root.is_file():  # VDM_WEIGHTS may be a single checkpoint
        return root / fetch.repository
    return weights_folder.home() / fetch.repository if fetch.address is not None else None


def describe(name: str, fetches: Sequence[Fetch], folder: str | Path | None = None) -> Iterator[str]:
    """Lines about what would be fetched, from where to where, how large it is and under which licence."""
    if not fetches:
        yield f"{name}: nothing to fetch, it needs no published weights"
    for fetch in fetches:
        place = destination(fetch, folder)
        yield f"{name}: {fetch.repository}" + (f" ({fetch.address})" if fetch.address else "")
        yield f"  files    {', '.join(fetch.files)}"
        yield f"  size     {fetch.size}"
        yield f"  licence  {fetch.licence}"
        yield f"  to       {place or 'the local cache of the hub'}"


def download(
    name: str, *, folder: str | Path | None = None, dry_run: bool = False, say: Callable[[str], None] = print
) -> list[Path]:
    """Fetches what a model or a reward needs, after saying what that is.

    Args:
        name: of a model or a reward.
        folder: where to, see `destination`; set VDM_WEIGHTS to it afterwards.
        dry_run: only say it; nothing uses the network.
        say: takes each line.

    Returns:
        The folder of each repository; [] after a dry run, or where nothing is needed.

    Raises:
        ValueError: an unknown name.
        DownloadError: no network, no access, no room, or a file the repository does not have; the message says what to
            do. Running it again goes on where it stopped.
    """
    fetches = plan(name)
    for line in describe(name, fetches, folder):
        say(line)
    if dry_run:
        return []
    return [_from_address(name, f, folder) if f.address is not None else _from_hub(name, f, folder) for f in fetches]


def _from_hub(name: str, fetch: Fetch, folder: str | Path | None) -> Path:
    place = destination(fetch, folder)
    unwanted = [p for p in fetch.unwanted if not any(fnmatch.fnmatch(file, p) for file in fetch.files)]
    page = f"the page of {fetch.repository} on the hub"
    try:
        got = huggingface_hub.snapshot_download(
            fetch.repository, allow_patterns=list(fetch.files), ignore_patterns=unwanted or None, local_dir=place
        )
    except GatedRepoError as error:
        raise DownloadError(
            f"{fetch.repository} is gated: accept its licence on {page}, log in with `hf auth login` (or set "
            f"HF_TOKEN), then run `vdm-env download {name}` again"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"the hub shows no repository {fetch.repository}: it was renamed, or it is private; look at {page}, log in "
            "with `hf auth login` if you have access, or put the files into a folder and set "
            f"{weights_folder.VARIABLE} to it"
        ) from error
    except LocalEntryNotFoundError as error:
        raise _no_network(name, fetch, error) from error
    except (OSError, _TRANSPORT) as error:
        if getattr(error, "errno", None) not in _DISK:
            raise _no_network(name, fetch, error) from error
        raise DownloadError(
            f"{fetch.repository} could not be written to {place or 'the local cache of the hub'} ({error}); it needs "
            f"{fetch.size}. Make room or name another folder with --folder, then run it again: it goes on where it "
            "stopped"
        ) from error
    there = [path.relative_to(got).as_posix() for path in Path(got).rglob("*") if path.is_file()]
    absent = [pattern for pattern in fetch.files if not fnmatch.filter(there, pattern)]
    if absent:
        raise DownloadError(
            f"{fetch.repository} has no {', '.join(absent)}: the repository was changed since this version was made; "
            f"look at {page}, and report it"
        )
    if place is not None:
        fetched = [name for name in there if any(fnmatch.fnmatch(name, pattern) for pattern in fetch.files)]
        kept = [name for name in fetched if not any(fnmatch.fnmatch(name, p) for p in unwanted)]
        _note_checksums(name, place, [place / f for f in kept if not f.startswith(".") and f != checksums.MANIFEST])
    return Path(got)


def _note_checksums(name: str, place: Path, files: Sequence[Path]) -> None:
    """Writes the checksums of fetched files beside them, if they are what the hub says or what was fetched before."""
    try:
        before = checksums.read_manifest(place)
    except CorruptWeightsError:
        before = {}
    for file in files:
        told, was = checksums.told_by_hub(place, file), before.get(file.relative_to(place).as_posix())
        if (checksums.like(told, file) != told) if told else (was is not None and checksums.file_sha256(file) != was):
            file.unlink()
            source = "the hub gives" if told else "it was fetched with"
            raise DownloadError(
                f"{file} is damaged: its checksum is not the one {source}. It was removed; run "
                f"`vdm-env download {name}` again"
            )
    try:
        checksums.write_manifest(place, files)
    except OSError as error:
        raise DownloadError(
            f"the checksums of {place} could not be written ({error}); make room, then run it again"
        ) from error


def _no_network(name: str, fetch: Fetch, error: Exception) -> DownloadError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DownloadError(
        f"{fetch.address or fetch.repository} could not be reached ({reason}). Without a network: run "
        f"`vdm-env download {name} --folder weights` on a machine that has one, copy that folder here and set "
        f"{weights_folder.VARIABLE} to it. "
        'What works now, without any download: make("MovingShapes-HPS")'
    )


def _from_address(name: str, fetch: Fetch, folder: str | Path | None) -> Path:
    place = destination(fetch, folder)
    assert place is not None and fetch.address is not None  # files from an address never go to the hub's cache
    file = place / PurePosixPath(fetch.files[0]).name
    if file.is_file():
        return place
    part = file.with_name(f"{file.name}.part")
    place.mkdir(parents=True, exist_ok=True)
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(fetch.address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request) as answer:
            goes_on = start > 0 and answer.status == 206  # a server may ignore the range and send all of it
            length = answer.headers.get("Content-Length")
            with part.open("ab" if goes_on else "wb") as out:
                whole = None if length is None else out.tell() + int(length)
                while chunk := answer.read(_CHUNK):
                    out.write(chunk)
        if whole is not None and part.stat().st_size < whole:
            raise ConnectionError(f"it broke off after {part.stat().st_size} of {whole} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # there is nothing after what is there already
            raise _no_network(name, fetch, error) from error
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise _no_network(name, fetch, error) from error
    if fetch.sha256 is not None:
        digest = checksums.file_sha256(part)
        if digest != fetch.sha256:
            part.unlink()
            raise DownloadError(
                f"what {fetch.address} sent is damaged or another file (sha256 {digest}, expected {fetch.sha256}); "
                "run it again"
            )
    part.replace(file)
    checksums.write_manifest(place, [file])
    return place


def main(arguments: Sequence[str] | None = None) -> int:
    """`vdm-env download NAME...`. Returns the exit code: 0 done, 1 a download failed, 2 an unknown name.

    Raises:
        SystemExit: code 2 for arguments the parser refuses, 0 after --help.
    """
    parser = argparse.ArgumentParser(prog="vdm-env download", description="Fetch published weights.")
    parser.add_argument("names", nargs="+", metavar="NAME", help="models or rewards, as in environment ids")
    parser.add_argument("--folder", help="where to; set VDM_WEIGHTS to it afterwards")
    parser.add_argument("--dry-run", action="store_true", help="only list files, sizes and licences")
    given = parser.parse_args(arguments)
    return fetch_all(given.names, folder=given.folder, dry_run=given.dry_run)


def fetch_all(names: Sequence[str], *, folder: str | Path | None = None, dry_run: bool = False) -> int:
    """`download` for each name, with errors as one line; the exit code of `main`."""
    for name in names:
        try:
            places = download(name, folder=folder, dry_run=dry_run)
        except (ValueError, DownloadError) as error:
            print(f"vdm-env download: {error}", file=sys.stderr)
            return 2 if isinstance(error, ValueError) else 1
        for place in places:
            print(f"{name}: in {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
