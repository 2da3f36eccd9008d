"""Command lines from dataclasses (tyro), with usage errors in one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import tyro

# Options of dataclasses inside are named like the others; an option that is not given has no value, whatever it says.
_STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)

_WIDTH = 80


def parse(kind: Any, arguments: Sequence[str] | None, program: str, default: Any = None) -> Any:
    """An instance of a dataclass, or of one of a union of them, filled from the command line.

    Args:
        kind: the dataclass or union; its attribute docstrings are the help.
        arguments: without the program's name; None reads sys.argv.
        program: the name shown in help and errors.
        default: an instance whose values stand where no argument is given; None: the dataclass's own defaults.

    Raises:
        SystemExit: code 2 for arguments that do not fit, after one line on standard error; 0 after --help.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    start: dict[str, Any] = {} if default is None else {"default": default}
    # Of one encoding always, which decides how the parser draws what is read below.
    said, told = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
            return tyro.cli(kind, args=given, prog=program, config=_STYLE, **start)
    except SystemExit as stop:
        if not stop.code:
            print(_help(_text(said)), end="")
            raise
        refuse(program, f"{_first_line(_text(told))} (see {program} --help)")


def _text(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.read())


def _help(text: str) -> str:
    """The parser's help with its description wrapped, and without boxes where standard output cannot show them."""
    lines = [
        part
        for line in text.splitlines()
        for part in ([line] if line.startswith(("│", "╭", "╰")) else textwrap.wrap(line, _WIDTH) or [""])
    ]
    try:
        "│".encode(sys.stdout.encoding or "utf-8")
        return "\n".join([*lines, ""])
    except UnicodeEncodeError:
        return "\n".join([*lines, ""]).translate(str.maketrans("│─╭╮╰╯", "|-++++"))


def refuse(program: str, message: str) -> Any:
    """Ends the program after one line on standard error: exit code 2, wrong usage.

    Raises:
        SystemExit: always.
    """
    print(f"{program}: {message}", file=sys.stderr)
    raise SystemExit(2) from None


def one_line(error: BaseException) -> str:
    """What went wrong, as one line of text; the kind of error stands in front where its text alone may say little."""
    text = " ".join(str(error).split())
    if text and isinstance(error, ValueError | OSError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _first_line(text: str) -> str:
    """What tyro's boxed message says before its first ruler, and the option it thinks was meant."""
    rows = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    rulers = [place for place, row in enumerate(rows) if re.fullmatch("─*", row)]
    message = " ".join(rows[: rulers[0]] if rulers else rows).strip(". ")
    message = message.partition(" Got errors:")[0].strip(". ")
    meant = next((place + 1 for place, row in enumerate(rows) if row.startswith("Perhaps you meant")), None)
    if meant is not None and meant < len(rows):
        message += f"; did you mean {rows[meant].split()[0].rstrip(',')}?"
    return message or "wrong arguments"
