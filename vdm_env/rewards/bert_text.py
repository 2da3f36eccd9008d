"""BERT's word pieces, for the networks that read their text with them: ImageReward and Grounding DINO."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

VOCABULARY_FILE = "vocab.txt"


def bert_tokenizer(vocabulary: dict[str, int]) -> Any:
    """A transformers `BertTokenizer` (lower case) over that vocabulary."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab=vocabulary, do_lower_case=True)


def read_vocabulary(path: Path) -> dict[str, int]:
    """The vocabulary of a `vocab.txt`: one piece a line, numbered from 0.

    Raises:
        CorruptWeightsError: a special token is missing.
    """
    from vdm_env.errors import CorruptWeightsError

    pieces = path.read_text(encoding="utf-8").splitlines()
    missing = sorted({"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - set(pieces))
    if missing:
        raise CorruptWeightsError(f"{path} is no vocabulary of BERT: it lacks {missing}; fetch the file again")
    return {piece: i for i, piece in enumerate(pieces)}


def letters() -> dict[str, int]:
    """A vocabulary of single characters, for networks with random weights: it needs no file.

    Special tokens, full stop and question mark have BERT's own numbers, which Grounding DINO looks for.
    """
    special = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*characters, *(f"##{c}" for c in characters)]
    return {piece: 1100 + i for i, piece in enumerate(pieces)} | special


LETTERS_SIZE = 1300
"""above every number of `letters()`"""
