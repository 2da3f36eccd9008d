"""Are weight files what they were when they were fetched or written? Checksums in a file beside them, and structure.

`vdm-env download` and this package's own conversions write `SHA256SUMS` into the folder they fill: lines of a sha256
and a path, as `sha256sum -c SHA256SUMS` reads them. Loading compares every file it reads with the nearest such file
above it. In the hub's local cache a file's own name is its checksum, so nothing has to be written there. Files of
one's own have neither; of those only the structure is tested: a safetensors file by its header and length, a torch
archive by the checksum of each entry.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vdm_env.errors import CorruptWeightsError

MANIFEST = "SHA256SUMS"
_DEPTH = 4
"""Folders above a file in which its manifest may lie."""
_LINE = re.compile(r"^([0-9a-f]{64}) [ *](.+)$")
_BROKEN = (
    OSError, zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, RuntimeError, ValueError,
)  # fmt: skip
"""What the zip library raises for entries that cannot be read."""


def file_sha256(file: Path) -> str:
    """The sha256 of a file's content."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, str]:
    """{path below the folder: sha256}; {} where there is no manifest.

    Raises:
        CorruptWeightsError: a manifest with other lines than a sha256 and a path.
    """
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CorruptWeightsError(_unreadable(folder, str(error))) from error
    entries = [_LINE.match(line) for line in lines if line.strip()]
    for line, entry in zip((line for line in lines if line.strip()), entries, strict=True):
        if entry is None:
            raise CorruptWeightsError(_unreadable(folder, f"the line {line[:80]!r}"))
    return {entry[2]: entry[1] for entry in entries if entry is not None}


def _unreadable(folder: Path, reason: str) -> str:
    return (
        f"{folder / MANIFEST} is damaged ({reason}); expected a sha256 and a path in every line. Fetch the "
        "files again, or remove it, and nothing is compared with it"
    )


def write_manifest(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Adds the checksums of these files below the folder to its manifest, which appears whole or not at all.

    Returns:
        All that the manifest holds now.
    """
    try:
        known = read_manifest(folder)
    except CorruptWeightsError:
        known = {}  # a broken one is written anew; what it said of other files nobody can know
    entries = known | {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(entries.items()))
    handle, name = tempfile.mkstemp(prefix=f".{MANIFEST}-", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        os.chmod(name, 0o644)
        os.replace(name, folder / MANIFEST)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return entries


def expected_sha256(file: Path) -> tuple[str, Path] | None:
    """The checksum a file should have, and where that is written; None where nobody wrote one."""
    for folder in list(file.absolute().parents)[:_DEPTH]:
        digest = read_manifest(folder).get(file.absolute().relative_to(folder).as_posix())
        if digest is not None:
            return digest, folder / MANIFEST
    blob = file.resolve()  # in the hub's cache a link to a file that is named like its content's checksum
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name, blob
    return None


def told_by_hub(place: Path, file: Path) -> str | None:
    """What the hub gave for a file: the sha256 of a large one, git's checksum of a small one; None if it is not known.

    The hub's client notes it in the second line of a file of its own.
    """
    note = place / ".cache" / "huggingface" / "download" / f"{file.relative_to(place).as_posix()}.metadata"
    lines = note.read_text(encoding="utf-8").splitlines() if note.is_file() else []
    return lines[1] if len(lines) > 1 and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", lines[1]) else None


def like(told: str, file: Path) -> str:
    """The checksum of a file, of the kind that the hub told."""
    if len(told) == 64:
        return file_sha256(file)
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def check_file(file: Path) -> None:
    """Compares a file with its checksum, if there is one; tests the structure of safetensors files and torch archives.

    Raises:
        CorruptWeightsError: it is another one, truncated, or damaged; the message names it.
    """
    expected = expected_sha256(file)
    if expected is not None:
        digest = file_sha256(file)
        if digest != expected[0]:
            raise CorruptWeightsError(
                f"{file} ({file.stat().st_size} bytes) is truncated, damaged or another file: its sha256 is {digest}, "
                f"expected {expected[0]} by {expected[1]}. Delete it and fetch it again (a converted folder: delete it "
                "whole); if you changed it on purpose, remove its line there"
            )
    elif file.suffix in (".ckpt", ".pt", ".pth", ".bin") and zipfile.is_zipfile(file):
        _check_archive(file)
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise CorruptWeightsError(
                f"{file} is damaged or truncated ({error}); expected a complete safetensors file. "
                "Restore it: fetch or copy it again, then retry"
            ) from error


def _check_archive(file: Path) -> None:
    """A torch archive keeps a checksum of each tensor, which `torch.load` does not look at."""
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except _BROKEN as error:
        raise _damaged(file, str(error)) from error
    if bad is not None:
        raise _damaged(file, f"the checksum of its entry {bad} is wrong")


def _damaged(file: Path, reason: str) -> CorruptWeightsError:
    return CorruptWeightsError(
        f"{file} ({file.stat().st_size} bytes) is truncated, damaged, or not a torch archive ({reason}); delete it and "
        "fetch or copy it again"
    )
