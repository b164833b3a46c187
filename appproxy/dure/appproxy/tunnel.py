"""After a 101: bytes both ways, as they are, with flow control.

WebSocket frames are not looked at: subprotocols, extensions, pings, close codes and frames of any size
pass, and at most what the sockets' buffers hold is kept here.
"""

from __future__ import annotations

import asyncio
from typing import cast

from aiohttp import web
from aiohttp.http_websocket import WebSocketReader

from dure.appproxy.upstream import Connection

# Neither side has sent a byte for this long: the other end is gone without a word.
TUNNEL_IDLE_MAX_S = 3600.0
# What is on its way to a replica when the client leaves (a close frame) gets this long.
_FLUSH_S = 5.0


class Tunnel:
    """Relays between a client's connection and a replica's until one of them ends."""

    def __init__(self, request: web.BaseRequest, connection: Connection) -> None:
        self._request = request
        self._connection = connection
        self._client_full = asyncio.Event()
        self._replica_full = asyncio.Event()
        self._ended = asyncio.Event()
        self._moved = False
        self.bytes_in = 0
        self.bytes_out = 0

    async def run(self) -> None:
        """Returns when either side has ended, or both were silent for TUNNEL_IDLE_MAX_S."""
        loop = asyncio.get_running_loop()
        relays = [
            asyncio.create_task(self._relieve_client()),
            asyncio.create_task(self._relieve_replica()),
        ]
        try:
            # aiohttp hands every byte that the client sends from now on to `feed_data`.
            self._request.protocol.set_parser(cast(WebSocketReader, self))
            self._connection.tunnel(self._from_replica, self._ended.set)
            while not self._ended.is_set():
                self._moved = False
                try:
                    async with asyncio.timeout(TUNNEL_IDLE_MAX_S):
                        await self._ended.wait()
                except TimeoutError:
                    if not self._moved:
                        return
        finally:
            for relay in relays:
                relay.cancel()
            self._connection.close()
            loop.call_later(_FLUSH_S, self._connection.abort)
            await asyncio.gather(*relays, return_exceptions=True)

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """What aiohttp calls with the client's bytes."""
        self._moved = True
        self.bytes_in += len(data)
        self._connection.write(data)
        if self._connection.writing_paused and not self._replica_full.is_set():
            self._replica_full.set()
            if self._request.transport is not None:
                self._request.transport.pause_reading()
        return False, b""

    def feed_eof(self) -> None:
        """What aiohttp calls when the client has gone."""
        self._ended.set()

    def _from_replica(self, data: bytes) -> None:
        self._moved = True
        self.bytes_out += len(data)
        transport = self._request.transport
        if transport is None or transport.is_closing():
            self._ended.set()
            return
        transport.write(data)
        if self._request.protocol.writing_paused and not self._client_full.is_set():
            self._client_full.set()
            self._connection.pause_reading()

    async def _relieve_client(self) -> None:
        while True:
            await self._client_full.wait()
            try:
                await self._request.writer.drain()
            except ConnectionError:
                self._ended.set()
                return
            self._client_full.clear()
            self._connection.resume_reading()

    async def _relieve_replica(self) -> None:
        while True:
            await self._replica_full.wait()
            await self._connection.drain()
            self._replica_full.clear()
            if self._request.transport is not None:
                self._request.transport.resume_reading()
