"""What is wrong with a file: where exactly, what was found, what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from dure.wire.errors import InvalidInput, Violation

PROBLEMS_MAX = 100
SHOWN_MAX = 60


@dataclass(frozen=True)
class Problem:
    """One error of a file. Lines count from 1, 0 is the file as a whole; `key` may be empty."""

    file: str
    line: int
    key: str
    message: str

    @property
    def place(self) -> str:
        """`file:line: key`."""
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.key}" if self.key else where

    @property
    def violation(self) -> Violation:
        return Violation(self.place, self.message)


def invalid(problems: Iterable[Problem]) -> InvalidInput:
    """One error that says all of `problems` (at least one)."""
    return InvalidInput.of([problem.violation for problem in problems])


def decode(content: bytes, file: str, bytes_max: int) -> str | Problem:
    """The text of a file, or what keeps it from being one. A byte order mark is dropped."""
    if len(content) > bytes_max:
        return Problem(file, 0, "", f"is larger than {bytes_max // 1024} KiB; nothing of it was read")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Problem(file, 1, "", "is UTF-16 text, expected UTF-8; save it with that encoding")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"found the byte 0x{content[error.start]:02x}, expected UTF-8 text"
        return Problem(file, line, "", found)


def shown(text: str) -> str:
    """A piece of a file in a message: one line, bounded, and always text that can be sent."""
    line = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return line if len(line) <= SHOWN_MAX else f"{line[:SHOWN_MAX]}..."


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant: `startCommand` and `Start-Command` mean `start_command`."""
    by_form = {_form(candidate): candidate for candidate in known}
    close = difflib.get_close_matches(_form(word[:200]), list(by_form), n=1, cutoff=0.6)
    return by_form[close[0]] if close else None


def unknown(word: str, known: Iterable[str]) -> str:
    """`; did you mean `x`?`, else the list of what is known."""
    candidates = list(known)
    near = nearest(word, candidates)
    return f"did you mean `{near}`?" if near else f"known: {', '.join(candidates)}"


def _form(word: str) -> str:
    return "".join(letter for letter in word.lower() if letter not in "-_ .")
