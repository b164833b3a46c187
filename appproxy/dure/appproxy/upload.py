"""The body of a request on its way to a replica: streamed, counted, and replayable while it is small."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from dure.appproxy.admission import refusal
from dure.appproxy.live import Refused
from dure.appproxy.upstream import Connection

REPLAY_BYTES_MAX = 1024 * 1024
# A body up to this is read whole before a replica is chosen: a slow sender occupies none meanwhile.
READ_FIRST_BYTES_MAX = 64 * 1024
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class BadBody(Exception):
    """The rest of the body is not what HTTP allows; the connection cannot be used any more."""


class Upload:
    """One request's body. `send` may be called again, on another connection, while `replayable`."""

    def __init__(self, request: web.BaseRequest, *, bytes_max: int, stall_s: float) -> None:
        self._request = request
        self._bytes_max = bytes_max
        self._stall_s = stall_s
        self._kept = bytearray()
        self._expects = request.headers.get("Expect", "").lower() == "100-continue" and request.version >= (
            1,
            1,
        )
        self.size_bytes = 0
        self.replayable = True
        self.complete = not request.can_read_body
        self.refused: Refused | None = None
        length = request.headers.get("Content-Length")
        self.length = int(length) if length is not None else None
        self.chunked = request.headers.get("Transfer-Encoding") is not None
        if self.length is not None and self.length > bytes_max:
            raise self._too_large()

    async def read_first(self) -> None:
        """Reads a small body whole, or takes what is there already. Raises Refused."""
        content = self._request.content
        if not self.complete and content.is_eof():
            self._keep(content.read_nowait(-1))
            self.complete = True
        while not self.complete and self.length is not None and self.length <= READ_FIRST_BYTES_MAX:
            await self._read()
        if self.complete and self.chunked:
            # It is all here: a length says the same, and more servers understand it.
            self.chunked, self.length = False, self.size_bytes

    @property
    def ready(self) -> bytes:
        """What can be sent at once."""
        return bytes(self._kept)

    async def send(self, connection: Connection, progress: Callable[[], None]) -> None:
        """Sends what `ready` has not. On nonsense from the client: sets `refused`, ends the connection."""
        try:
            while not self.complete:
                piece = await self._read()
                if piece:
                    connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self.chunked else piece)
                    await connection.drain()
                    progress()
        except Refused as refused:
            self.refused = refused
            connection.abort()
            return
        except OSError:  # the client has gone, and its request will be cancelled
            connection.abort()
            return
        if self.chunked:
            connection.write(b"0\r\n\r\n")
        progress()

    async def _read(self) -> bytes:
        """The next piece; b"" at the end, with `complete` set. Raises Refused."""
        content = self._request.content
        if self._expects:
            self._expects = False
            if self._request.transport is not None and not content.total_bytes:
                self._request.transport.write(_CONTINUE)
        try:
            async with asyncio.timeout(self._stall_s):
                piece = await content.readany()
        except TimeoutError:
            raise Refused(refusal("request_timeout", close=True)) from None
        except (BadBody, HttpProcessingError, web.RequestPayloadError):
            raise Refused(
                refusal("bad_request", "the request's body is not well-formed", close=True)
            ) from None
        self._keep(piece)
        if content.at_eof():
            self.complete = True
        return piece

    def _keep(self, piece: bytes) -> None:
        self.size_bytes += len(piece)
        if self.size_bytes > self._bytes_max:
            raise self._too_large()
        if self.replayable and self.size_bytes <= REPLAY_BYTES_MAX:
            self._kept += piece
        else:
            self.replayable = False
            self._kept.clear()

    def _too_large(self) -> Refused:
        message = f"the request's body is larger than this proxy takes ({self._bytes_max} bytes)"
        return Refused(refusal("body_too_large", message, close=True))
