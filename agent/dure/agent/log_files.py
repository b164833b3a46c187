"""Reads the log of a kernel, as `shim.log` writes it: from a line on, through rotations, while it grows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from dure.agent.shim.log import BEFORE, LINE_BYTES_MAX, NEWEST

PIECE_BYTES = 64 * 1024
LEFT_OUT = "the session writes faster than its log is read: lines were left out"

Line = tuple[int, bytes]


def parse(raw: bytes) -> Line:
    """Time in Unix milliseconds and text of a line as it stands in the file; time 0 if it has none."""
    stamp, space, text = raw.partition(b" ")
    if not (space and stamp.isdigit() and len(stamp) < 20):
        return 0, raw
    return int(stamp), text.removesuffix(b"\r")


def last_lines(folder: Path, bytes_max: int) -> bytes:
    """The end of what a session wrote, whole lines where there are several."""
    text = b""
    for name in (BEFORE, NEWEST):
        try:
            with open(folder / name, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                # A line may be a single character, and its time has 14.
                file.seek(max(0, size - 16 * bytes_max))
                data = file.read(16 * bytes_max)
        except FileNotFoundError:
            continue
        ends = data.endswith(b"\n")
        lines = data.removesuffix(b"\n").split(b"\n") if data else []
        if size > len(data):
            # Begins somewhere in a line, and its first digits may be gone.
            lines = lines[1:] or [data]
        text += b"\n".join(parse(line)[1] for line in lines) + (b"\n" if ends else b"")
    if len(text) <= bytes_max:
        return text
    text = text[-bytes_max - 1 :]
    _, line_break, rest = text.partition(b"\n")
    return rest if line_break and rest else text[1:]


class LogCursor:
    """A place in a log. `locate` tells the folder where the log is now, None if it is not kept any more.

    Blocks on files only; one call at a time. `notice` is what its reader should be told next.
    """

    def __init__(self, locate: Callable[[], Path | None]) -> None:
        self._locate = locate
        self._fd = -1
        # The file after it, held from when it is first seen: two rotations on, its name is no longer its own.
        self._ahead = -1
        self._rest = b""
        self._not_before_ms = 0
        self._left_bytes: int | None = None
        self.notice = ""

    def begin(self, *, tail_lines: int = 0, not_before_ms: int = 0, follow: bool = True) -> None:
        """Goes to the first line wanted. Without `follow` it ends where the log ends now."""
        self._not_before_ms = not_before_ms
        files = [fd for fd in (self._open(BEFORE), self._open(NEWEST)) if fd >= 0]
        if len(files) == 2 and os.fstat(files[0]).st_ino == os.fstat(files[1]).st_ino:
            # Rotated between the two.
            os.close(files.pop())
        wanted, first, offset = tail_lines, 0, 0
        for index in reversed(range(len(files))):
            if tail_lines:
                offset, wanted = _lines_back(files[index], wanted)
                first = index
                if not wanted:
                    break
        sizes = [os.fstat(fd).st_size for fd in files]
        for index, fd in enumerate(files):
            if index != first:
                os.close(fd)
        if files:
            self._fd = files[first]
            os.lseek(self._fd, offset, os.SEEK_SET)
        if not follow:
            self._left_bytes = sum(sizes[first:]) - offset

    def has_more(self) -> bool:
        """Whether `read` would find something; cheap."""
        if self._fd < 0:
            return self._inode(NEWEST) is not None
        position = os.lseek(self._fd, 0, os.SEEK_CUR)
        return os.fstat(self._fd).st_size > position or not self._is_newest()

    def read(self) -> list[Line]:
        """The next lines; none at the end of what is there, or when all that was wanted was read."""
        while True:
            data = self._read_piece()
            if not data:
                return []
            *whole, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > LINE_BYTES_MAX * 2:
                # Not written by the shim: what has no end must not fill the memory.
                whole, self._rest = [*whole, self._rest], b""
            lines = self._wanted(whole)
            if lines or self._left_bytes == 0:
                return lines

    def rest(self) -> list[Line]:
        """The line that has no end yet: for the very end of the reading."""
        rest, self._rest = self._rest, b""
        return self._wanted([rest]) if rest else []

    def close(self) -> None:
        for fd in (self._fd, self._ahead):
            if fd >= 0:
                os.close(fd)
        self._fd = self._ahead = -1

    def _read_piece(self) -> bytes:
        if self._left_bytes == 0:
            return b""
        if self._fd < 0:
            self._fd = self._open(BEFORE)
            self._fd = self._fd if self._fd >= 0 else self._open(NEWEST)
        while self._fd >= 0:
            count = PIECE_BYTES if self._left_bytes is None else min(PIECE_BYTES, self._left_bytes)
            newest = self._is_newest()
            if not newest and self._ahead < 0:
                self._ahead = self._following()
            # After that look: what was written before the rotation is all in the file.
            data = os.read(self._fd, count)
            if data:
                if self._left_bytes is not None:
                    self._left_bytes -= len(data)
                return data
            if newest or not self._next_file():
                return b""
            if self._rest:
                return b"\n"
        return b""

    def _next_file(self) -> bool:
        following, self._ahead = self._ahead, -1
        if following < 0:
            following = self._following()
        if following < 0:
            # More than one was written since the last look; what is still kept goes on with the older.
            following = self._open(BEFORE)
            if following < 0:
                return False
            if os.fstat(following).st_ino == os.fstat(self._fd).st_ino:
                # In the middle of a rotation: the newest is not there yet.
                os.close(following)
                return False
            self.notice = LEFT_OUT
        os.close(self._fd)
        self._fd = following
        return True

    def _following(self) -> int:
        """The file that was begun when this one was full, -1 if it has no name of its own any more."""
        own = os.fstat(self._fd).st_ino
        while self._inode(BEFORE) == own:
            following = self._open(NEWEST)
            if following < 0:
                return -1
            if self._inode(BEFORE) == own:
                return following
            os.close(following)
        return -1

    def _is_newest(self) -> bool:
        # Between two steps of a rotation there is none.
        return self._inode(NEWEST) in (None, os.fstat(self._fd).st_ino)

    def _inode(self, name: str) -> int | None:
        folder = self._locate()
        if folder is None:
            return None
        try:
            return os.stat(folder / name).st_ino
        except FileNotFoundError:
            return None

    def _open(self, name: str) -> int:
        folder = self._locate()
        if folder is None:
            return -1
        try:
            return os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return -1

    def _wanted(self, raw: Iterable[bytes]) -> list[Line]:
        lines = [parse(one) for one in raw]
        if self._not_before_ms:
            lines = [line for line in lines if line[0] >= self._not_before_ms]
        return lines


def _lines_back(fd: int, count: int) -> tuple[int, int]:
    """Where the last `count` lines of a file begin, and how many more are wanted before it."""
    position = os.fstat(fd).st_size
    if not position:
        return 0, count
    at_end = True
    while position > 0:
        start = max(0, position - PIECE_BYTES)
        block = os.pread(fd, position - start, start)
        index = len(block) - (at_end and block.endswith(b"\n"))
        at_end = False
        while (index := block.rfind(b"\n", 0, index)) >= 0:
            count -= 1
            if not count:
                return start + index + 1, 0
        position = start
    return 0, count - 1
