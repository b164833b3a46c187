"""The log of a session: its output line by line, each line after the time at which it began.

    1732361688123 a line of the session
    1732361688124 another

`log` is the newest file, `log.1` the one before it; what is older is gone. A line is written as soon as
its beginning is known and goes on where it stands, so that nothing is lost when the machine goes down.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

FILE_BYTES_MAX = 8 * 1024 * 1024
LINE_BYTES_MAX = 16 * 1024
NEWEST, BEFORE = "log", "log.1"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class LineLog:
    """Keeps the newest lines in a folder. Never raises: a full disk must not stop a session."""

    def __init__(
        self, folder: str, bytes_max: int = FILE_BYTES_MAX, clock_ms: Callable[[], int] = now_ms
    ) -> None:
        self._newest = f"{folder}/{NEWEST}"
        self._before = f"{folder}/{BEFORE}"
        self._bytes_max = bytes_max
        self._clock_ms = clock_ms
        self._time_ms = 0
        self._fd = -1
        self._size = 0
        # Bytes of the line that has no end yet; None at the start of a line.
        self._column: int | None = None

    def write(self, data: bytes) -> None:
        """Takes a piece of output, cut anywhere."""
        if not data:
            return
        try:
            self._write(data)
        except OSError:
            return

    def _write(self, data: bytes) -> None:
        if self._fd < 0:
            self._open()
        # Readers go on after the newest line that they have seen: a clock set back must not confuse them.
        self._time_ms = max(self._time_ms, self._clock_ms())
        stamp = b"%d " % self._time_ms
        lines = data.split(b"\n")
        column = self._column
        if (column or 0) + len(lines[0]) > LINE_BYTES_MAX or max(map(len, lines)) > LINE_BYTES_MAX:
            lines = list(_cut(lines, column or 0))
        ends = not lines[-1]
        if ends:
            lines.pop()
        text = (b"" if column is not None else stamp) + (b"\n" + stamp).join(lines) + (b"\n" if ends else b"")
        self._column = None if ends else len(lines[-1]) + ((column or 0) if len(lines) == 1 else 0)
        if self._size and self._size + len(text) > self._bytes_max:
            # At the end of a line, so that each file can be read by itself.
            head = 0 if column is None else text.find(b"\n") + 1
            if column is None or head:
                self._append(text[:head])
                self._rotate()
                text = text[head:]
        self._append(text)

    def _append(self, text: bytes) -> None:
        if text:
            self._size += os.write(self._fd, text)

    def _rotate(self) -> None:
        os.close(self._fd)
        self._fd = -1
        os.replace(self._newest, self._before)
        self._open()

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self._newest, flags, 0o600)
        self._size = os.fstat(self._fd).st_size
        if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n" and self._column is None:
            # Left by a start that was broken off.
            self._append(b"\n")


def _cut(lines: list[bytes], column: int) -> Iterator[bytes]:
    """Cuts long lines; the first goes on after `column` bytes."""
    for line in lines:
        room = LINE_BYTES_MAX - column
        while len(line) > room:
            yield line[:room]
            line, room = line[room:], LINE_BYTES_MAX
        yield line
        column = 0
