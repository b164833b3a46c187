"""Reads a stream of server-sent events: bytes in, however they were cut, data of events out."""

from __future__ import annotations

import codecs

EVENT_BYTES_MAX = 1024 * 1024


class TooLong(Exception):
    """An event of more than EVENT_BYTES_MAX; the stream is of no use any more."""


class EventReader:
    """Comments, ids, names and retry times are passed over: here only data matters."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0
        self._data: list[str] = []
        self._size_bytes = 0
        self._begun = False

    def feed(self, piece: bytes) -> list[str]:
        """The data of the events that `piece` completes. Raises TooLong."""
        self._buffer += piece
        if not self._begun:
            if len(self._buffer) < len(codecs.BOM_UTF8) and codecs.BOM_UTF8.startswith(self._buffer):
                return []
            self._begun = True
            if self._buffer.startswith(codecs.BOM_UTF8):
                del self._buffer[: len(codecs.BOM_UTF8)]
        return self._events(last=False)

    def end(self) -> list[str]:
        """The data of an event that the end of the stream completes, though it has no empty line."""
        events = self._events(last=True)
        self._line(bytes(self._buffer), events)
        self._line(b"", events)
        self._buffer.clear()
        return events

    def _events(self, *, last: bool) -> list[str]:
        events: list[str] = []
        start = 0
        while (end := self._line_end(max(start, self._searched))) is not None:
            if self._buffer[end] == 0x0D:
                if end + 1 == len(self._buffer) and not last:
                    break  # a line feed that belongs to it may follow
                following = end + 2 if self._buffer[end + 1 : end + 2] == b"\n" else end + 1
            else:
                following = end + 1
            self._line(bytes(self._buffer[start:end]), events)
            start = self._searched = following
        del self._buffer[:start]
        self._searched = len(self._buffer) if end is None else end - start
        if len(self._buffer) + self._size_bytes > EVENT_BYTES_MAX:
            raise TooLong
        return events

    def _line_end(self, start: int) -> int | None:
        found = [at for at in (self._buffer.find(b"\n", start), self._buffer.find(b"\r", start)) if at >= 0]
        return min(found) if found else None

    def _line(self, line: bytes, events: list[str]) -> None:
        if not line:
            if self._data:
                events.append("\n".join(self._data))
            self._data, self._size_bytes = [], 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))
            self._size_bytes += len(value)
