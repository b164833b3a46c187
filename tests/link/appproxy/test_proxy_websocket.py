"""WebSocket through the proxy: the frames pass as they are."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from proxy_fakes import bench, raw_replica, read_head, replica, route, run, target, until


async def _echo(request: web.Request) -> web.StreamResponse:
    if request.headers.get("Upgrade") is None:
        return web.Response(text="plain")
    socket = web.WebSocketResponse(protocols=("chat.v2", "chat.v1"), autoping=False, max_msg_size=1 << 28)
    await socket.prepare(request)
    async for message in socket:
        if message.type is aiohttp.WSMsgType.PING:
            await socket.pong(message.data)
        elif message.type is aiohttp.WSMsgType.TEXT:
            if message.data == "close":
                await socket.close(code=4321, message=b"as asked")
            await socket.send_str(message.data + request.headers.get("Authorization", "!"))
        elif message.type is aiohttp.WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


def test_text_binary_ping_large_frames_and_close_codes(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_echo) as port:
            await b.serves(route("e", b.port, port, public=False))
            headers = {"Authorization": f"Bearer {b.manager.token('e')}"}
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await b.http.ws_connect(b.url)
            assert refused.value.status == 401
            async with b.http.ws_connect(
                b.url,
                headers=headers,
                protocols=("chat.v1",),
                autoping=False,
                max_msg_size=1 << 28,
                compress=15,
            ) as socket:
                assert socket.protocol == "chat.v1"
                assert socket.compress
                await socket.send_str("hello")
                assert await socket.receive_str() == "hello!"
                await socket.ping(b"p")
                pong = await socket.receive()
                assert (pong.type, pong.data) == (aiohttp.WSMsgType.PONG, b"p")
                large = bytes(range(256)) * 32_768  # 8 MiB, more than any buffer on the way
                await socket.send_bytes(large)
                assert await socket.receive_bytes() == large
                await socket.send_str("close")
                message = await socket.receive()
                assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 4321)
            assert socket.close_code == 4321
            async with b.http.get(b.url, headers=headers) as response:
                assert await response.text() == "plain"

    run(test)


def test_first_frames_right_behind_the_handshake(tmp_path: Path) -> None:
    async def test() -> None:
        async def eager(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nfirst"
            )
            writer.write((await reader.readexactly(5)).upper())

        async with bench(tmp_path) as b, raw_replica(eager) as port:
            await b.serves(route("e", b.port, port))
            reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
            writer.write(
                b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\nearly"
            )
            head = await read_head(reader)
            assert head == (
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
            )
            assert await reader.read(-1) == b"firstEARLY"
            writer.close()

    run(test)


def test_declined_upgrade_leaves_the_connection_usable(tmp_path: Path) -> None:
    async def test() -> None:
        async def handler(request: web.Request) -> web.Response:
            return web.Response(status=426 if "Upgrade" in request.headers else 200)

        async with bench(tmp_path) as b, replica(handler) as port:
            await b.serves(route("e", b.port, port))
            reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
            upgrade = b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
            writer.write(upgrade + b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            assert (await read_head(reader)).startswith(b"HTTP/1.1 426 ")
            assert (await read_head(reader)).startswith(b"HTTP/1.1 200 ")
            writer.close()

    run(test)


def test_a_slow_reader_holds_back_the_sender(tmp_path: Path) -> None:
    async def test() -> None:
        sent = 0

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await read_head(reader)
            writer.write(b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
            for _ in range(1000):
                writer.write(b"x" * 100_000)
                await writer.drain()
                sent += 100_000

        async with bench(tmp_path) as b, raw_replica(flood) as port:
            await b.serves(route("e", b.port, port))
            reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
            await read_head(reader)
            before = -1
            while before != sent:
                before = sent
                await asyncio.sleep(0.3)
            assert sent < 30_000_000
            async with asyncio.timeout(10):
                got = len(await reader.readexactly(50_000_000))
            assert got == 50_000_000
            writer.close()

    run(test)


def test_draining_waits_for_the_socket_to_close(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_echo) as port:
            await b.serves(route("e", b.port, port))
            socket = await b.http.ws_connect(b.url)
            await b.manager.set(route("e", b.port, target(port, draining=True)))
            await b.applied()
            assert not any(report.drained for report in b.manager.reports)
            await socket.send_str("still here")
            assert await socket.receive_str() == "still here!"
            await socket.close()
            await until(lambda: f"replica-{port}" in b.manager.reports[-1].drained, 1.0)

    run(test)
