"""Prompts from a user's file: HPSv2's, VidProM's, WebVid's, or any list of texts.

Formats, by the file's ending: .txt (one prompt a line), .csv and .tsv (with a heading), .json (a list), .jsonl (one
value a line), .parquet (with pyarrow, which the extra `parquet` installs). Values of .json and .jsonl are texts, or
objects with a column of texts.

A .json file may name its splits: {"train": [...], "validation": [...], "test": [...]}, each a list as above. Else the
split of a text depends on the text alone: a hash of it, in lower case and with single spaces, is a number in
[0, 1), whose lowest part is the test split and the next the validation split. So neither the order of the file, nor
`limit`, nor texts added later move a prompt from one split to another.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from vdm_env.prompts import SPLITS

SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
SPLITS_FILE = 'a .json file that names its splits, {"train": [...], "test": [...]}'
COLUMNS = ("prompt", "caption", "name", "text")
"""Looked for in this order where no column is named."""
_MAX_CELL = 2**24
"""Characters of a table's cell; the csv module's own limit of 2**17 is for smaller things than scraped captions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSource:
    """A published prompt set that is read from the user's copy; places and licences are from memory, not confirmed."""

    place: str
    file: str
    column: str
    """where rows have several; a list of plain texts has none"""
    licence: str


FROM_FILES: dict[str, FileSource] = {
    "HPSv2": FileSource(
        place="the hub dataset 'zhwang/HPDv2'",
        file="benchmark/*.json (lists of texts) or train.json",
        column="prompt",
        licence="Apache-2.0 by its page; read it first",
    ),
    "VidProM": FileSource(
        place="the hub dataset 'WenhaoWang/VidProM'",
        file="VidProM_unique.csv",
        column="prompt",
        licence="CC-BY-NC 4.0 (arXiv:2403.06098), not for commercial use",
    ),
    "WebVid": FileSource(
        place="WebVid (Bain et al. 2021, arXiv:2104.00650), where you hold a copy",
        file="results_2M_train.csv",
        column="name",
        licence="no longer handed out by its authors; its terms are for research",
    ),
}


def is_prompt_file(given: str | Path) -> bool:
    """Whether something given as prompts is meant as a file: a path, or a text that ends like one."""
    return isinstance(given, Path) or Path(given).suffix.lower() in SUFFIXES


def read_prompts(
    path: str | Path,
    *,
    source: str | None = None,
    column: str | None = None,
    limit: int | None = None,
    validation: float = 0.05,
    test: float = 0.05,
    encoding: str = "utf-8-sig",
) -> dict[str, list[str]]:
    """Texts of a file by split, in the file's order, without repetitions; for `make(..., prompts=...)`.

    Args:
        path: a file; its ending says the format.
        source: one of `FROM_FILES`, whose column is then read.
        column: of the texts; the first of `COLUMNS` that there is if None.
        limit: most texts read, counted without repetitions.
        validation: share of the validation split, in [0, 1).
        test: share of the test split, in [0, 1).
        encoding: of a text file; "utf-8-sig" is UTF-8 with or without a mark at its start.

    Returns:
        {"train": [...], "validation": [...], "test": [...]}; a split that no text fell into is left out. Of a .json
        file that names its splits those, of which `limit` counts each by itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown format, source or column, damaged contents, another encoding, shares that do not fit, a
            text in two of the splits that a file names, or no text at all.
        ImportError: a parquet file without pyarrow.
    """
    path = Path(path)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit={limit!r}: expected a whole number of at least 1, or None for the whole file")
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise ValueError(f"validation={validation}, test={test}: expected shares of at least 0, below 1 together")
    try:
        "a".encode(encoding)
    except LookupError as error:
        raise ValueError(f"encoding={encoding!r} is not known; expected one such as utf-8 or latin-1") from error
    if source is not None:
        if source not in FROM_FILES:
            raise ValueError(f"unknown source {source!r}; expected one of {', '.join(FROM_FILES)}, or None")
        column = column or FROM_FILES[source].column
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    seen: dict[str, str] = {}
    said = False
    try:
        for named, raw in _texts(path, column, encoding):
            text, said = " ".join(raw.split()), said or named is not None
            key = text.casefold()
            if named is not None and seen.get(key, named) != named:
                raise ValueError(f"{path} has {text!r} in its splits {seen[key]} and {named}; splits are disjoint")
            if not text or key in seen:
                continue
            split = seen[key] = named or split_of(text, validation=validation, test=test)
            if named is None or limit is None or len(splits[split]) < limit:
                splits[split].append(text)
            if named is None and len(seen) == limit:
                break
    except UnicodeError as error:
        raise ValueError(
            f"{path} is not written in {encoding} ({error}); pass its encoding, for example encoding='latin-1' "
            "(--prompt-encoding latin-1)"
        ) from error
    except csv.Error as error:
        raise ValueError(f"{path} is no table of its ending {path.suffix} ({error}); write it again as CSV") from error
    if not seen:
        raise ValueError(f"{path} has no prompt; expected at least one non-empty text")
    if not splits["train"]:
        ways = f"for so few pass validation=0, test=0, give them as a list, or write {SPLITS_FILE}"
        raise ValueError(
            f"none of the {len(seen)} prompts of {path} falls into the train split; "
            + ('give it a list "train"' if said else ways)
        )
    return {name: texts for name, texts in splits.items() if texts}


def split_of(text: str, *, validation: float, test: float) -> str:
    """The split of a text, by its hash; see the head of this file."""
    digest = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    return "test" if place < test else "validation" if place < test + validation else "train"


# -------------------------------------------------------------------------------------------------------- formats


def _texts(path: Path, column: str | None, encoding: str) -> Iterator[tuple[str | None, str]]:
    """Each text with the split that the file says it is in, None where it says nothing."""
    if path.suffix.lower() == ".json" and path.is_file():
        values = _parse(path.read_text(encoding=encoding), path, "the file")
        named = isinstance(values, dict) and bool(values) and set(values) <= set(SPLITS)
        for name, part in values.items() if named else [(None, values)]:
            if not isinstance(part, list):
                kind = type(part).__name__
                raise ValueError(f"{path} holds {kind}, expected a list of texts or of objects, or {SPLITS_FILE}")
            yield from ((name, text) for text in _column(path, iter(part), column))
    else:
        yield from ((None, text) for text in _unsplit(path, column, encoding))


def _unsplit(path: Path, column: str | None, encoding: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {suffix or 'nothing'!r}; prompts are read from {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected one with prompts, ending in {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        yield from _parquet(path, column)
        return
    with path.open(encoding=encoding, newline="" if suffix in (".csv", ".tsv") else None) as file:
        if suffix == ".txt":
            yield from file
        elif suffix in (".csv", ".tsv"):
            before = csv.field_size_limit(_MAX_CELL)  # of the whole process, so it is put back
            try:
                rows = csv.DictReader(file, delimiter="," if suffix == ".csv" else "\t")
                chosen = choose_column(path, list(rows.fieldnames or ()), column)
                yield from (row[chosen] or "" for row in rows)
            finally:
                csv.field_size_limit(before)
        else:
            lines = (_parse(line, path, f"line {n}") for n, line in enumerate(file, start=1) if line.strip())
            yield from _column(path, lines, column)


def _parse(text: str, path: Path, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} of {path} is no JSON ({error}); write or fetch it again") from error


def _column(path: Path, values: Iterator[Any], column: str | None) -> Iterator[str]:
    """Texts of plain texts, or of objects, of which the first one's names count."""
    first = next(values, None)
    if first is None:
        return
    chosen = choose_column(path, list(first), column) if isinstance(first, Mapping) else None
    for value in chain([first], values):
        text = value.get(chosen) if isinstance(value, Mapping) and chosen is not None else value
        if not isinstance(text, str):
            expected = f"an object with a text {chosen!r}" if chosen else "a text"
            raise ValueError(f"{path} has {str(value)[:80]!r} where {expected} is expected; repair the file")
        yield text


def choose_column(path: Path, there: list[str], wanted: str | None) -> str:
    """The column of the texts.

    Raises:
        ValueError: the wanted one is not there, or none was named and none is known by its name.
    """
    if wanted is not None and wanted in there:
        return wanted
    if wanted is None:
        if len(there) == 1:
            return there[0]
        for name in COLUMNS:
            if name in there:
                return name
    asked = f"no column {wanted!r}" if wanted is not None else f"no column called {', '.join(COLUMNS)}"
    raise ValueError(
        f"{path} has {asked}; it has {', '.join(map(repr, there)) or 'none'}: name one with column=... "
        "(--prompt-column ...)"
    )


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            f"{path} is a parquet file, which needs pyarrow: pip install 'vdm-env[parquet]', or convert it to CSV"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"{path} is no parquet file ({error}); fetch it again") from error
    chosen = choose_column(path, names, column)
    batches = iter(file.iter_batches(columns=[chosen]))
    while True:
        try:  # the contents are read here, row group by row group
            batch = next(batches, None)
            texts = [] if batch is None else batch.column(0).to_pylist()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
        if batch is None:
            return
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{path} has {str(text)[:80]!r} in {chosen!r}, which is no text; name another column")
            yield text or ""
