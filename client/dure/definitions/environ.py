"""Environment variables that somebody asks for: which names and values there can be."""

from __future__ import annotations

import re
from collections.abc import Iterable

ENVIRON_MAX, ENVIRON_BYTES_MAX = 200, 64 * 1024


def wrong_variable(name: str, value: str) -> str:
    """What is wrong with a variable, empty if nothing."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        return "is not a name: letters, digits and `_`, no digit first"
    if name == "PORT" or name.startswith("DURE_"):
        return "is set by Dure itself; choose another name"
    return "must not contain a NUL character" if "\0" in value else ""


def too_large(variables: Iterable[tuple[str, str]]) -> str:
    """What is wrong with all of them together, empty if nothing."""
    sizes = [len(name.encode()) + len(value.encode()) for name, value in variables]
    if len(sizes) > ENVIRON_MAX:
        return f"has {len(sizes)} variables, expected at most {ENVIRON_MAX}"
    if sum(sizes) > ENVIRON_BYTES_MAX:
        return f"has {sum(sizes)} bytes of names and values, expected at most {ENVIRON_BYTES_MAX}"
    return ""
