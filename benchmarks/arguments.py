"""Command lines from dataclasses (tyro), with usage errors in one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

import tyro


def parse(kind: Any, arguments: Sequence[str] | None, program: str) -> Any:
    """An instance of a dataclass, or of one of a union of them, filled from the command line.

    Args:
        kind: the dataclass or union; its attribute docstrings are the help.
        arguments: without the program's name; None reads sys.argv.
        program: the name shown in help and errors.

    Raises:
        SystemExit: code 2 for arguments that do not fit, after one line on standard error; 0 after --help.
    """
    told = io.StringIO()
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(kind, args=given, prog=program)
    except SystemExit as stop:
        if not stop.code:
            raise
        print(f"{program}: {_first_line(told.getvalue())} (see {program} --help)", file=sys.stderr)
        raise SystemExit(2) from None


def one_line(error: BaseException) -> str:
    """What went wrong, as one line of text; the kind of error stands in front where its text alone may say little."""
    text = " ".join(str(error).split())
    if text and isinstance(error, ValueError | OSError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _first_line(text: str) -> str:
    """What tyro's boxed message says before its first ruler."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    rows = [line.strip("│ ") for line in plain.splitlines() if line.startswith("│")]
    message = []
    for row in rows:
        if re.fullmatch("─*", row):
            break
        message.append(row)
    return " ".join(message).strip(". ") or "wrong arguments"
