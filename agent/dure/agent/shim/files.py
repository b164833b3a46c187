"""Files that the shim and the agent exchange: written whole or not at all."""

from __future__ import annotations

import json
import os
from typing import Any


def write_json(path: str, content: dict[str, Any]) -> None:
    write_bytes(path, json.dumps(content).encode())


def write_bytes(path: str, content: bytes) -> None:
    """No fsync: the page cache survives every process, and after a crash of the machine nothing runs."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb", opener=_private) as file:
        file.write(content)
    os.replace(temporary, path)


def read_json(path: str) -> dict[str, Any] | None:
    """None if there is no such file, or nothing whole in it."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (FileNotFoundError, ValueError):
        # Not JSON: the machine went down before it reached the disk.
        return None
    return content if isinstance(content, dict) else None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
