"""Prompt sets with disjoint train, validation and test splits.

A `PromptBook` numbers texts: `prompt_id` in observations is the number of a text, and stays so for the life of the
book. Texts given at a reset are added to the end and belong to no split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

SPLITS = ("train", "validation", "test")


class PromptBook(Sequence[str]):
    """Texts by number, and which numbers belong to which split.

    Args:
        splits: texts of each split, from "train", "validation" and "test"; a plain list of texts serves as all three
            at once.

    Raises:
        ValueError: no prompts, an empty text, an unknown split, or a text in two splits.
    """

    def __init__(self, splits: Mapping[str, Sequence[str]] | Sequence[str]) -> None:
        self._texts: list[str] = []
        self._ids: dict[str, int] = {}
        self._splits: dict[str, list[int]] = {}
        if isinstance(splits, str):
            raise ValueError(f"prompts must be a list of texts, got one text {splits!r}; write prompts=[{splits!r}]")
        if isinstance(splits, Mapping):
            unknown = sorted(set(splits) - set(SPLITS))
            if unknown:
                raise ValueError(f"unknown prompt splits {unknown}; expected some of {list(SPLITS)}")
            for name, texts in splits.items():
                again = [t for t in texts if t in self._ids]
                if again:
                    raise ValueError(
                        f"prompt {again[0]!r} of split {name!r} is in another split too; splits are disjoint"
                    )
                self._splits[name] = self.add(texts)
        else:
            ids = self.add(list(splits))
            self._splits = dict.fromkeys(SPLITS, list(dict.fromkeys(ids)))

    def add(self, texts: Sequence[str]) -> list[int]:
        """Numbers of the texts; new ones are appended.

        Raises:
            ValueError: an empty list, or a text that is empty or no string.
        """
        if isinstance(texts, str) or len(texts) == 0:
            raise ValueError(f"expected a non-empty list of prompt texts, got {texts!r}; give at least one text")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"every prompt must be a non-empty text, got {text!r}")
        for text in texts:
            if text not in self._ids:
                self._ids[text] = len(self._texts)
                self._texts.append(text)
        return [self._ids[t] for t in texts]

    def ids(self, split: str) -> list[int]:
        """Numbers of a split's texts.

        Raises:
            ValueError: the book has no such split.
        """
        if split not in self._splits:
            raise ValueError(
                f"no prompt split {split!r}; this set has {list(self._splits)}: take one of these, or prompts that "
                f"have a split {split!r}"
            )
        return list(self._splits[split])

    def sha256(self, split: str) -> str:
        """Hash of a split's texts in order, so that results on different prompts are never compared."""
        return hashlib.sha256("\n".join(self[i] for i in self.ids(split)).encode()).hexdigest()

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int or slice, as in any sequence
        return self._texts[index]

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)
