"""Revocations and expiries at proxies that were away, asleep or started anew."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
from aiohttp import web
from own_ports import free_port
from proxy_fakes import FakeManager, bench, listening, proxy, replica, route, run, until


async def _ok(request: web.Request) -> web.Response:
    return web.Response(text="ok")


async def _code(http: aiohttp.ClientSession, url: str, token: str) -> str:
    """`ok`, or the code of the refusal."""
    async with http.get(url, headers={"Authorization": f"BackendAI {token}"}) as response:
        return "ok" if response.status == 200 else str((await response.json())["error"]["code"])


async def _binds(http: aiohttp.ClientSession, url: str, token: str, code: str) -> None:
    """Within a second from now."""
    began = time.monotonic()
    while (now := await _code(http, url, token)) != code:
        assert time.monotonic() - began < 1, f"still {now}"
        await asyncio.sleep(0.005)


def test_a_revocation_binds_within_a_second_of_the_stream_being_back(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(route("e", b.port, port, public=False))
            token, other = b.manager.token("e"), b.manager.token("e", uid="token-2")
            assert await _code(b.http, b.url, token) == "ok"
            await b.manager.stop()
            streams = len(b.manager.hellos)
            revoked = route("e", b.port, port, public=False, revoked_tokens=["token-1"])
            await b.manager.set(revoked)
            # Away, the proxy goes on by what it knows.
            assert await _code(b.http, b.url, token) == "ok"
            await b.manager.start()
            await until(lambda: len(b.manager.hellos) > streams)
            await _binds(b.http, b.url, token, "token_revoked")
            assert await _code(b.http, b.url, other) == "ok"
            # And so with a manager that has started anew, whose table is another one.
            await b.manager.stop()
            streams = len(b.manager.hellos)
            b.manager.table_id = "table-2"
            revoked.revoked_tokens.append("token-2")
            await b.manager.set(revoked)
            await b.manager.start()
            await until(lambda: len(b.manager.hellos) > streams)
            await _binds(b.http, b.url, other, "token_revoked")
            assert await _code(b.http, b.url, token) == "token_revoked"

    run(test)


def test_a_proxy_started_from_its_disk_knows_the_revocation(tmp_path: Path) -> None:
    async def test() -> None:
        async with replica(_ok) as port:
            async with bench(tmp_path) as b:
                table = b.proxy.home / "table.pb"
                await b.serves(route("e", b.port, port, public=False))
                await until(table.exists)
                before = table.read_bytes()
                await b.manager.set(route("e", b.port, port, public=False, revoked_tokens=["token-1"]))
                await b.applied()
                await until(lambda: table.read_bytes() != before)
                token, other = b.manager.token("e"), b.manager.token("e", uid="token-2")
                expired = b.manager.token("e", uid="token-3", expires_in_s=-1)
                ports = (min(b.ports), max(b.ports))
                key, revision = b.manager.key, b.manager.revision
            nobody = free_port()
            async with proxy(tmp_path, nobody, ports), aiohttp.ClientSession() as http:
                await listening(b.port)
                assert await _code(http, b.url, token) == "token_revoked"
                assert await _code(http, b.url, expired) == "token_expired"
                assert await _code(http, b.url, other) == "ok"
            # Revoked while the proxy was down: its disk does not know, the stream tells it.
            manager = FakeManager()
            manager.key, manager.revision = key, revision
            both = ["token-1", "token-2"]
            await manager.set(route("e", b.port, port, public=False, revoked_tokens=both))
            manager.port = nobody
            async with proxy(tmp_path, nobody, ports), aiohttp.ClientSession() as http:
                await listening(b.port)
                assert await _code(http, b.url, other) == "ok"
                await manager.start()
                try:
                    await until(lambda: manager.hellos)
                    await _binds(http, b.url, other, "token_revoked")
                finally:
                    await manager.stop()

    run(test)


def test_expiry_binds_on_a_connection_that_stays_open(tmp_path: Path) -> None:
    """The signature is remembered, the time is looked at with every request."""

    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(route("e", b.port, port, public=False))
            token = b.manager.token("e", expires_in_s=2)
            ends = int(time.time() + 2)
            last_ok = first_refused = 0.0
            while not first_refused:
                code = await _code(b.http, b.url, token)
                if code == "ok":
                    last_ok = time.time()
                else:
                    assert code == "token_expired"
                    first_refused = time.time()
                assert time.time() < ends + 1
            assert last_ok < ends + 0.1 and first_refused >= ends - 1

    run(test)


def test_what_began_before_the_revocation_may_end(tmp_path: Path) -> None:
    async def test() -> None:
        arrived, go_on = asyncio.Event(), asyncio.Event()

        async def slow(request: web.Request) -> web.Response:
            arrived.set()
            await go_on.wait()
            return web.Response(text="done")

        async with bench(tmp_path) as b, replica(slow) as port:
            await b.serves(route("e", b.port, port, public=False))
            token = b.manager.token("e")
            asking = asyncio.create_task(_code(b.http, b.url, token))
            await arrived.wait()
            await b.manager.set(route("e", b.port, port, public=False, revoked_tokens=["token-1"]))
            await b.applied()
            assert await _code(b.http, b.url, token) == "token_revoked"
            go_on.set()
            assert await asking == "ok"

    run(test)
