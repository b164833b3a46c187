"""The side that faces clients: aiohttp's server, with the proxy's error answers and bounds."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from dure.appproxy.admission import refusal
from dure.appproxy.answers import answer
from dure.appproxy.forward import Forwarder
from dure.appproxy.upload import BadBody

log = logging.getLogger(__name__)

# A client connection without a request is closed after this.
KEEP_ALIVE_S = 75.0
# After an answer to a request whose body is still coming, the rest is read and dropped for this long.
_LINGER_S = 5.0
_READ_BUFFER_BYTES = 64 * 1024
_HEADERS_MAX = 256


class ClientConnection(web.RequestHandler):
    """One client's connection."""

    def __init__(self, server: Front, loop: asyncio.AbstractEventLoop, settings: dict[str, Any]) -> None:
        super().__init__(server, loop=loop, **settings)
        self.current: web.BaseRequest | None = None
        self._server = server
        self._unparsed_bytes = 0

    def data_received(self, data: bytes) -> None:
        # aiohttp bounds each line of a head and their number, not their sum: 16 MiB in all.
        if self.current is None:
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > self._server.head_bytes_max + 4 * _READ_BUFFER_BYTES:
                self.force_close()
                return
        super().data_received(data)
        # A message behind a body that has not ended is aiohttp's note of a parse error. It would be answered
        # after the request, which in turn waits for the rest of its body.
        current = self.current
        if current is not None and self._messages and not current.content.is_eof():
            current.content.set_exception(BadBody())

    def begin(self, request: web.BaseRequest) -> None:
        self.current = request
        self._unparsed_bytes = 0

    def end(self) -> None:
        self.current = None
        self._server.check_idle()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._unparsed_bytes = 0
        super().connection_lost(exc)
        self._server.check_idle()

    @property
    def busy(self) -> bool:
        """Whether a request is under way, or has come in part."""
        return self.current is not None or self._unparsed_bytes > 0

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what is not HTTP, and what the handler failed on, in the form of all other answers."""
        request_id = secrets.token_hex(16)
        if status >= 500:
            log.error("request %s failed", request_id, exc_info=exc)
            refused = refusal("internal", close=True)
        elif isinstance(exc, LineTooLong) or "Too many headers" in (message or ""):
            refused = refusal("head_too_large", close=True)
        else:
            sentence = (message or "").strip().split("\n")[0].rstrip(": ")
            refused = refusal("bad_request", f"the request is not well-formed: {sentence}"[:300], close=True)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has been sent already")
        return answer(refused, accept="", request_id=request_id)


class Front(web.Server):
    """Makes the connections. Hand it to `loop.create_server`."""

    def __init__(self, forwarder: Forwarder, *, head_bytes_max: int) -> None:
        super().__init__(self._handle, handler_cancellation=True)
        self.head_bytes_max = head_bytes_max
        self._forwarder = forwarder
        self._all_idle = asyncio.Event()
        self._settings: dict[str, Any] = {
            "keepalive_timeout": KEEP_ALIVE_S,
            "lingering_time": _LINGER_S,
            "auto_decompress": False,
            "access_log": None,
            "read_bufsize": _READ_BUFFER_BYTES,
            "max_line_size": head_bytes_max,
            "max_field_size": head_bytes_max,
            "max_headers": _HEADERS_MAX,
        }

    def __call__(self) -> web.RequestHandler:
        return ClientConnection(self, asyncio.get_running_loop(), self._settings)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, ClientConnection)
        connection.begin(request)
        try:
            return await self._forwarder.handle(request)
        finally:
            connection.end()

    async def drain(self, timeout_s: float, at_once: asyncio.Event) -> None:
        """Lets requests that are under way end, until `timeout_s` or `at_once`; then cuts the rest."""
        self._forwarder.draining = True
        for connection in self.connections:
            # Not the busy ones: aiohttp drops what a closing connection receives, a body included.
            if isinstance(connection, ClientConnection) and not connection.busy:
                connection.force_close()
        self.check_idle()
        waits = [asyncio.create_task(self._all_idle.wait()), asyncio.create_task(at_once.wait())]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        await self.shutdown(timeout=0.2)

    def check_idle(self) -> None:
        """Called whenever a connection may have become idle."""
        if self._forwarder.draining and not self._busy():
            self._all_idle.set()

    def _busy(self) -> bool:
        return any(isinstance(c, ClientConnection) and c.busy for c in self.connections)
