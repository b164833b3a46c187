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


class RotatedLog:
    """Keeps the newest bytes of a stream: `path`, and `path.1` before it. Never raises: a full disk must
    not stop a session."""

    def __init__(self, path: str, bytes_max: int) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._fd = -1
        self._size = 0
        self._open()

    def write(self, data: bytes) -> None:
        try:
            if self._size + len(data) > self._bytes_max and self._size > 0:
                os.close(self._fd)
                self._fd = -1
                os.replace(self._path, f"{self._path}.1")
                self._open()
            if self._fd < 0:
                self._open()
            self._size += os.write(self._fd, data)
        except OSError:
            return

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size
