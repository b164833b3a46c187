"""On which line each key of a TOML text stands. The parser does not tell, and a problem needs its line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import tomli

_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"|\#[^\n]*|\n|[\[\]{}=,]|[^\s\"'\#\[\]{}=,]+|[^\S\n]+",
    re.DOTALL,
)
Path = tuple[str, ...]


def key_lines(text: str) -> Mapping[Path, int]:
    """Line of the first mention of each table and key. `text` must be right TOML.

    Keys of inline tables are not among them: `line_of` gives the line of what they stand in.
    """
    lines: dict[Path, int] = {}
    table: Path = ()
    for line, statement in _statements(text):
        if statement.startswith("["):
            table = _path(statement.strip("[] \t"))
            added = table
        else:
            added = table + _path(_key(statement))
        for length in range(1, len(added) + 1):
            lines.setdefault(added[:length], line)
    return lines


def line_of(path: Path, lines: Mapping[Path, int]) -> int:
    """Line of a key, or of the nearest thing around it; 1 if nothing of it is there."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return 1


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Each header and each assignment with its first line, without comments."""
    line, first, depth, tokens = 1, 1, 0, list[str]()
    for match in _TOKEN.finditer(f"{text}\n"):
        token = match[0]
        if token in "[{" and token:
            depth += 1
        elif token in "]}":
            depth -= 1
        if token == "\n" and depth == 0:
            if statement := "".join(tokens).strip():
                yield first, statement
            tokens.clear()
        elif not token.startswith("#"):
            if not tokens:
                first = line
            if tokens or token.strip():
                tokens.append(token)
        line += token.count("\n")


def _key(statement: str) -> str:
    """What stands before the `=`, which may be in quotes itself."""
    taken = []
    for match in _TOKEN.finditer(statement):
        if match[0] == "=":
            break
        taken.append(match[0])
    return "".join(taken)


def _path(key: str) -> Path:
    """Parts of a dotted key, by the parser itself."""
    parts: list[str] = []
    try:
        value = tomli.loads(f"{key} = 0")
    except tomli.TOMLDecodeError:
        return (key,)
    while isinstance(value, dict):
        (part,) = value
        parts.append(part)
        value = value[part]
    return tuple(parts)
