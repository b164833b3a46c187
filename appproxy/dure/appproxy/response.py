"""Reads HTTP/1.1 responses, without sockets: bytes in, heads, pieces of body and ends out.

Strict where leniency would let two readers disagree on where a message ends: no bare CR or LF in heads,
no folded lines, one framing. A response that breaks this raises `Malformed` and the connection is done.

States: HEAD -> (1xx) HEAD | LENGTH | CHUNK_SIZE <-> CHUNK_DATA -> TRAILERS | UNTIL_CLOSE -> DONE.
101 ends in DONE with what follows in `excess`: those bytes are not HTTP any more.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

HEAD_BYTES_MAX = 64 * 1024
_CHUNK_LINE_BYTES_MAX = 4096
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?")
_HEADER_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_LENGTH = re.compile(rb"[0-9]{1,18}")

Headers = list[tuple[bytes, bytes]]


class Malformed(Exception):
    """Not a response that can be passed on safely. The message says why."""


class Cut(Exception):
    """The connection ended inside a response."""


@dataclass(frozen=True, slots=True)
class Head:
    """Status line and headers, as they came. `length` is None if the end shows only when it comes."""

    status: int
    reason: bytes
    headers: Headers
    length: int | None
    keep_alive: bool


@dataclass(frozen=True, slots=True)
class End:
    """The response is complete."""

    trailers: Headers


Event = Head | bytes | End


class _State(enum.Enum):
    HEAD = enum.auto()
    LENGTH = enum.auto()
    CHUNK_SIZE = enum.auto()
    CHUNK_DATA = enum.auto()
    CHUNK_END = enum.auto()
    TRAILERS = enum.auto()
    UNTIL_CLOSE = enum.auto()
    DONE = enum.auto()


class ResponseReader:
    """Reads the response to one request (interim responses before it included)."""

    def __init__(self, method: str) -> None:
        self._head_only = method == "HEAD"
        self._state = _State.HEAD
        self._buffer = b""
        self._left = 0
        self._started = False

    @property
    def started(self) -> bool:
        """Whether a byte of it has come."""
        return self._started

    @property
    def done(self) -> bool:
        return self._state is _State.DONE

    @property
    def excess(self) -> bytes:
        """Bytes that came after the end."""
        return self._buffer

    def feed(self, data: bytes) -> list[Event]:
        """What `data` completes, in order. Raises Malformed."""
        self._started = True
        self._buffer = self._buffer + data if self._buffer else data
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def feed_eof(self) -> list[Event]:
        """The connection was closed in order. Raises Cut if something was missing."""
        if self._state is not _State.UNTIL_CLOSE:
            raise Cut("the connection was closed before the response was complete")
        self._state = _State.DONE
        return [End([])]

    def _step(self, events: list[Event]) -> bool:
        """Takes one item out of the buffer; False if it holds no whole one."""
        state = self._state
        if state is _State.DONE or not self._buffer:
            return False
        if state is _State.HEAD:
            return self._read_head(events)
        if state is _State.UNTIL_CLOSE:
            events.append(self._buffer)
            self._buffer = b""
            return False
        if state in (_State.LENGTH, _State.CHUNK_DATA):
            piece, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
            self._left -= len(piece)
            events.append(piece)
            if self._left == 0:
                if state is _State.LENGTH:
                    self._finish(events, [])
                else:
                    self._state = _State.CHUNK_END
            return True
        if state is _State.CHUNK_END:
            if len(self._buffer) < 2 and self._buffer == b"\r":
                return False
            if not self._buffer.startswith(b"\r\n"):
                raise Malformed("a chunk is longer than its size")
            self._buffer = self._buffer[2:]
            self._state = _State.CHUNK_SIZE
            return True
        if state is _State.CHUNK_SIZE:
            return self._read_chunk_size()
        return self._read_trailers(events)

    def _read_head(self, events: list[Event]) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or end > HEAD_BYTES_MAX:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise Malformed(f"the head is longer than {HEAD_BYTES_MAX} bytes")
            return False
        lines = self._buffer[:end].split(b"\r\n")
        self._buffer = self._buffer[end + 4 :]
        match = _STATUS_LINE.fullmatch(lines[0])
        if match is None:
            raise Malformed(f"not a status line: {lines[0][:80]!r}")
        status = int(match[2])
        headers = _parse_headers(lines[1:])
        head = _frame(status, match[3] or b"", headers, minor=int(match[1]), head_only=self._head_only)
        events.append(head)
        if 100 <= status < 200 and status != 101:
            return True
        if status == 101 or self._head_only or status in (204, 304) or head.length == 0:
            self._finish(events, [])
        elif head.length is not None:
            self._state, self._left = _State.LENGTH, head.length
        elif any(name.lower() == b"transfer-encoding" for name, _ in headers):
            self._state = _State.CHUNK_SIZE
        else:
            self._state = _State.UNTIL_CLOSE
        return True

    def _read_chunk_size(self) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > _CHUNK_LINE_BYTES_MAX:
                raise Malformed("a chunk's size line is too long")
            return False
        match = _CHUNK_SIZE.fullmatch(self._buffer, 0, end)
        if match is None:
            raise Malformed(f"not a chunk size: {self._buffer[: min(end, 40)]!r}")
        self._left = int(match[1], 16)
        self._buffer = self._buffer[end + 2 :]
        self._state = _State.CHUNK_DATA if self._left else _State.TRAILERS
        return True

    def _read_trailers(self, events: list[Event]) -> bool:
        if self._buffer.startswith(b"\r\n"):
            self._buffer = self._buffer[2:]
            self._finish(events, [])
            return True
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise Malformed(f"the trailers are longer than {HEAD_BYTES_MAX} bytes")
            return False
        trailers = _parse_headers(self._buffer[:end].split(b"\r\n"))
        self._buffer = self._buffer[end + 4 :]
        self._finish(events, trailers)
        return True

    def _finish(self, events: list[Event], trailers: Headers) -> None:
        self._state = _State.DONE
        events.append(End(trailers))


def _parse_headers(lines: list[bytes]) -> Headers:
    headers: Headers = []
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)
        if match is None:
            raise Malformed(f"not a header line: {line[:80]!r}")
        headers.append((match[1], match[2].rstrip(b" \t")))
    return headers


def _frame(status: int, reason: bytes, headers: Headers, *, minor: int, head_only: bool) -> Head:
    """Finds where the body ends (RFC 9112, section 6.3), and whether the connection lives on."""
    lengths: set[bytes] = set()
    chunked = False
    tokens: set[bytes] = set()
    for name, value in headers:
        lowered = name.lower()
        if lowered == b"content-length":
            lengths.add(value)
        elif lowered == b"transfer-encoding":
            if chunked or value.lower() != b"chunked":
                raise Malformed(f"transfer encoding {value[:40]!r} is not `chunked`")
            chunked = True
        elif lowered == b"connection":
            tokens.update(token.strip().lower() for token in value.split(b","))
    if len(lengths) > 1 or any(not _LENGTH.fullmatch(length) for length in lengths):
        raise Malformed("its Content-Length is not one number")
    if chunked and (lengths or minor == 0):
        raise Malformed("it has both a length and chunks, or chunks in HTTP/1.0")
    length = int(lengths.pop()) if lengths else None
    bodiless = head_only or status < 200 or status in (204, 304)
    ends_by_itself = bodiless or chunked or length is not None
    keep_alive = ends_by_itself and b"close" not in tokens and (minor == 1 or b"keep-alive" in tokens)
    return Head(status, reason, headers, length, keep_alive)
