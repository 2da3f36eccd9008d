"""Prompt sets by name, and prompts from a user's own file.

The sets that come with the package, each with disjoint train, validation and test splits:

    activities  "a(n) [animal] [activity]": 45 common animals, each riding a bike, playing chess and washing dishes, the
                construction of Black et al. 2023 (DDPO, arXiv:2305.13301), which VADER took over for videos. Held out
                are animals: none of validation or test occurs in training.
    actions     somebody doing one of the 13 activities that VADER trains the action reward on (Prabhudesai et al. 2024,
                arXiv:2407.08737); the class is in the words, see `vdm_env.rewards.action`. Held out are people and
                places; every activity is in every split.
    objects     scenes that ask for a book, the object that the object-removal rewards look for.
    scenes      landscapes, cities, animals, crafts and fantasy, for rewards of general quality.

Deviation: the texts of actions, objects and scenes are this package's own, because the papers name few of theirs.
Not verified: the animals of activities against DDPO's own list.

Published sets that are too large or not free to be part of a package (`FROM_FILES`) are read from the user's copy by
`read_prompts`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdm_env.prompt_sets.files import FROM_FILES, SUFFIXES, is_prompt_file, read_prompts
from vdm_env.prompts import SPLITS, PromptBook

FOLDER = Path(__file__).parent
Splits = dict[str, list[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """A set that comes with the package."""

    summary: str
    splits: Callable[[Any], Splits]
    """from the contents of its data file to the texts"""


def an(noun: str) -> str:
    """The noun with its article; by the first letter, which is right for the nouns of this folder."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _activities(data: Any) -> Splits:
    return {s: [f"{an(animal)} {do}" for animal in data["animals"][s] for do in data["activities"]] for s in SPLITS}


def _actions(data: Any) -> Splits:
    return {s: [scene.format(do) for scene in data["scenes"][s] for do in data["activities"]] for s in SPLITS}


PROMPT_SETS: dict[str, PromptSet] = {
    "activities": PromptSet(summary="45 animals riding a bike, playing chess, washing dishes", splits=_activities),
    "actions": PromptSet(summary="people at the 13 activities of the action reward", splits=_actions),
    "objects": PromptSet(summary="scenes with a book, for object removal", splits=dict),
    "scenes": PromptSet(summary="landscapes, cities, animals, crafts, fantasy", splits=dict),
}


def list_prompt_sets() -> dict[str, str]:
    """One line about each set, by its name for `make(..., prompts=name)`."""
    return {name: entry.summary for name, entry in PROMPT_SETS.items()}


def prompt_set(name: str) -> PromptBook:
    """A set of the package as a new book.

    Raises:
        ValueError: an unknown name, or that of a published set which is read from a file; the message says how.
    """
    if name in FROM_FILES:
        source = FROM_FILES[name]
        raise ValueError(
            f"the prompts of {name} are not part of the package ({source.licence}); get {source.file} of "
            f"{source.place} and give its path: prompts='path/to/file', or "
            f"prompts=read_prompts('path/to/file', source={name!r}) of vdm_env.prompt_sets"
        )
    if name not in PROMPT_SETS:
        raise ValueError(
            f"unknown prompt set {name!r}; the package has {', '.join(PROMPT_SETS)}. A list of texts is written "
            f"prompts=[{name!r}], and a file ends in {', '.join(SUFFIXES)}"
        )
    data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return PromptBook(PROMPT_SETS[name].splits(data))


def prompts_from(named: str | Path, **options: Any) -> PromptBook:
    """The book of a set's name, or of a file; what `make(..., prompts=...)` takes as a text.

    Args:
        named: a name of `PROMPT_SETS`, or a path.
        options: of `read_prompts`, for a file.

    Raises:
        ValueError, FileNotFoundError, ImportError: see `prompt_set` and `read_prompts`; options for a set.
    """
    if is_prompt_file(named):
        return PromptBook(read_prompts(named, **options))
    book = prompt_set(str(named))
    if options:
        raise ValueError(f"prompts={str(named)!r} is a set of the package, for which {sorted(options)} say nothing")
    return book


__all__ = [
    "FROM_FILES",
    "PROMPT_SETS",
    "PromptSet",
    "list_prompt_sets",
    "prompt_set",
    "prompts_from",
    "read_prompts",
]
