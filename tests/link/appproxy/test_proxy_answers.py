"""Every answer that the proxy gives itself, with its status and code."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from own_ports import free_port
from proxy_fakes import (
    KEY_ID,
    bench,
    exchange,
    raw_replica,
    read_head,
    replica,
    route,
    run,
    target,
    until,
)

from dure.routing.v1 import routing_pb2 as pb
from dure.wire.tokens import Claims, sign


async def _ok(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(text="ok", headers={"X-Authorization": request.headers.get("Authorization", "none")})


def test_tokens(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            revoked = ["revoked"]
            await b.serves(
                route("e", b.port, port, public=False, revoked_tokens=revoked),
                route("o", b.ports[1], port, public=True),
            )
            make = b.manager.token
            strange = sign(Claims("t", "e", 0, 4102444800), Ed25519PrivateKey.generate(), KEY_ID)
            unknown = sign(Claims("t", "e", 0, 4102444800), b.manager.key, "other-key")
            cases: list[tuple[str | None, int, str]] = [
                (None, 401, "token_missing"),
                ("Basic abc", 401, "token_scheme"),
                ("token", 401, "token_scheme"),
                ("Bearer", 401, "token_malformed"),
                ("Bearer a.b.c", 401, "token_malformed"),
                ("BackendAI " + "x" * 5000, 401, "token_malformed"),
                ("Bearer eyJhIjoxfQ." + "e30.e30", 401, "token_malformed"),
                (f"Bearer {strange}", 401, "token_bad_signature"),
                (f"Bearer {unknown}", 401, "token_bad_signature"),
                (f"BackendAI {make('e', expires_in_s=-1)}", 401, "token_expired"),
                (f"BackendAI {make('e', uid='revoked')}", 401, "token_revoked"),
                (f"Bearer {make('o')}", 403, "token_other_endpoint"),
            ]
            for authorization, status, code in cases:
                headers = {"Authorization": authorization} if authorization else {}
                async with b.http.post(b.url, headers=headers, data=b"abc") as response:
                    body = await response.json()
                    assert (response.status, body["error"]["code"]) == (status, code), authorization
                    assert body["error"]["request_id"] == response.headers["X-Request-Id"]
                    assert body["error"]["message"]
                    challenges = response.headers.getall("WWW-Authenticate", [])
                    wanted = ['Bearer realm="dure"', 'BackendAI realm="dure"'] if status == 401 else []
                    assert challenges == wanted
            for scheme in ("BackendAI", "Bearer", "backendai", "BEARER"):
                async with b.http.get(b.url, headers={"Authorization": f"{scheme} {make('e')}"}) as response:
                    assert response.status == 200
                    assert response.headers["X-Authorization"] == "none"
            for authorization, kept in (
                ("Bearer sk-model-key", True),
                ("Basic abc", True),
                (f"Bearer {make('e')}", False),
                (f"Bearer {strange}", False),
                (f"BackendAI {make('o')}", False),
            ):
                headers = {"Authorization": authorization}
                async with b.http.get(f"http://127.0.0.1:{b.ports[1]}", headers=headers) as response:
                    assert response.status == 200
                    assert response.headers["X-Authorization"] == (authorization if kept else "none")
            two = await exchange(
                b.port,
                b"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer x\r\nAuthorization: Bearer y\r\n"
                b"Connection: close\r\n\r\n",
            )
            assert b"token_malformed" in two

    run(test)


def test_keep_alive_survives_refusals(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(route("e", b.port, port, public=False))
            reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
            for _ in range(3):
                writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello")
                head = await read_head(reader)
                assert head.startswith(b"HTTP/1.1 401")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
            token = b.manager.token("e").encode()
            writer.write(
                b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nAuthorization: Bearer "
                + token
                + b"\r\n\r\nhello"
            )
            assert (await read_head(reader)).startswith(b"HTTP/1.1 200")
            writer.close()

    run(test)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (pb.UNAVAILABILITY_STARTING, "starting"),
        (pb.UNAVAILABILITY_UNHEALTHY, "unhealthy"),
        (pb.UNAVAILABILITY_BLOCKED, "blocked"),
        (pb.UNAVAILABILITY_STOPPED, "stopped"),
        (pb.UNAVAILABILITY_TERMINATING, "terminating"),
    ],
)
def test_unavailable(tmp_path: Path, reason: pb.Unavailability, code: str) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b:
            await b.serves(
                route("e", b.port, unavailability=reason, unavailability_detail="because of <this>"),
                route("d", b.ports[1], target(1, draining=True), unavailability=reason),
            )
            async with b.http.get(b.url) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) > 0
                assert (await response.json())["error"]["code"] == code
            browser = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
            async with b.http.get(b.url, headers=browser) as response:
                assert response.content_type == "text/html"
                page = await response.text()
            assert "because of &lt;this&gt;" in page and code in page
            async with b.http.get(f"http://127.0.0.1:{b.ports[1]}") as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, code)

    run(test)


def test_queue_full_and_queue_timeout(tmp_path: Path) -> None:
    async def test() -> None:
        release, arrived = asyncio.Event(), asyncio.Semaphore(0)

        async def slow(request: web.Request) -> web.Response:
            arrived.release()
            await release.wait()
            return web.Response(text=request.path)

        async with (
            bench(tmp_path, queue_size=1, queue_wait_s=0.3, requests_per_replica=1) as b,
            replica(slow) as port,
        ):
            await b.serves(route("e", b.port, port))

            async def get(path: str) -> tuple[int, str]:
                async with b.http.get(b.url + path) as response:
                    return response.status, await response.text()

            first = asyncio.create_task(get("/1"))
            await arrived.acquire()
            second = asyncio.create_task(get("/2"))
            await b.reaches("dure_proxy_queued_requests", 1)
            status, body = await get("/3")
            assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full")
            status, body = await second
            assert (status, json.loads(body)["error"]["code"]) == (503, "queue_timeout")
            third = asyncio.create_task(get("/4"))
            await b.reaches("dure_proxy_queued_requests", 1)
            release.set()
            assert await first == (200, "/1")
            assert await third == (200, "/4")

    run(test)


def test_who_waits_is_told_when_the_endpoint_stops(tmp_path: Path) -> None:
    async def test() -> None:
        release, arrived = asyncio.Event(), asyncio.Semaphore(0)

        async def slow(request: web.Request) -> web.Response:
            arrived.release()
            await release.wait()
            return web.Response(text="ok")

        async with bench(tmp_path, requests_per_replica=1) as b, replica(slow) as port:
            await b.serves(route("e", b.port, port))

            async def get() -> int:
                async with b.http.get(b.url) as response:
                    return response.status

            first = asyncio.create_task(get())
            await arrived.acquire()
            second = asyncio.create_task(get())
            await b.reaches("dure_proxy_queued_requests", 1)
            await b.manager.set(route("e", b.port, unavailability=pb.UNAVAILABILITY_STOPPED))
            assert await second == 503
            release.set()
            assert await first == 200

    run(test)


def test_unreachable_closed_late_and_nonsense(tmp_path: Path) -> None:
    async def test() -> None:
        async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")

        async def two_framings(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            )

        async with (
            bench(tmp_path, first_byte_timeout_s=0.4) as b,
            raw_replica(closes) as p1,
            raw_replica(silent) as p2,
            raw_replica(nonsense) as p3,
            raw_replica(two_framings) as p4,
        ):
            for port, status, code in (
                (free_port(), 502, "upstream_unreachable"),
                (p1, 502, "upstream_closed"),
                (p2, 504, "upstream_timeout"),
                (p3, 502, "upstream_invalid"),
                (p4, 502, "upstream_invalid"),
            ):
                await b.serves(route("e", b.port, port))
                for method in ("GET", "POST"):
                    async with b.http.request(method, b.url) as response:
                        assert (response.status, (await response.json())["error"]["code"]) == (status, code)

    run(test)


def test_sizes(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            bench(tmp_path, body_bytes_max=100_000, head_bytes_max=4096) as b,
            replica(_ok) as port,
        ):
            await b.serves(route("e", b.port, port))

            async def pieces(total: int):  # type: ignore[no-untyped-def]
                for _ in range(total // 1000):
                    yield b"x" * 1000

            async with b.http.post(b.url, data=pieces(100_000)) as response:
                assert response.status == 200
            async with b.http.post(b.url, data=pieces(101_000)) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (413, "body_too_large")
            async with b.http.post(b.url, data=b"x" * 100_001) as response:
                assert response.status == 413
            one = b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 5000 + b"\r\n\r\n"
            many = (
                b"GET / HTTP/1.1\r\nHost: h\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(300)) + b"\r\n"
            )
            wide = b"GET / HTTP/1.1\r\nHost: h\r\n" + b"".join(
                b"X%d: %b\r\n" % (n, b"y" * 900) for n in range(6)
            )
            long = b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nHost: h\r\n\r\n"
            for data in (one, many, wide + b"\r\n", long):
                got = await exchange(b.port, data)
                assert b" 431 " in got.split(b"\r\n")[0], data[:40]
                assert b'"head_too_large"' in got
            with pytest.raises(ConnectionError):
                got = await exchange(b.port, b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * 100_000)
                assert b" 431 " not in got, "a head without end was taken in whole"
                raise ConnectionResetError

    run(test)


@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +5\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\n0\n\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nA : b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nA: b\nC: d\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nA: b\rC: d\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nA: b\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nHost: i\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / x HTTP/1.1\r\nHost: h\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_smuggling_is_refused(tmp_path: Path, data: bytes) -> None:
    async def test() -> None:
        served: list[str] = []

        async def handler(request: web.Request) -> web.Response:
            await request.read()
            served.append(request.path)
            return web.Response(text="ok")

        async with bench(tmp_path) as b, replica(handler) as port:
            await b.serves(route("e", b.port, port))
            got = await exchange(b.port, data)
            assert got.split(b" ")[1] == b"400", got
            assert b'"bad_request"' in got
            assert served == []

    run(test)


def test_bad_chunk_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    async def test() -> None:
        began, ended = asyncio.Event(), asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            try:
                while await reader.read(1000):
                    began.set()
            finally:
                ended.set()

        async with bench(tmp_path) as b, raw_replica(handler) as port:
            await b.serves(route("e", b.port, port))
            reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
            writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
            await began.wait()
            writer.write(b"zz\r\n")
            async with asyncio.timeout(2):
                assert (await read_head(reader)).startswith(b"HTTP/1.1 400")
                await ended.wait()
            writer.close()

    run(test)


def test_a_key_that_left_the_table_signs_no_more(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(route("e", b.port, port, public=False))
            headers = {"Authorization": f"Bearer {b.manager.token('e')}"}
            async with b.http.get(b.url, headers=headers) as response:
                assert response.status == 200
            b.manager.key = Ed25519PrivateKey.generate()
            b.manager.table_id = "table-2"
            hellos = len(b.manager.hellos)
            await b.manager.stop()
            await b.manager.start()
            await until(lambda: len(b.manager.hellos) > hellos)
            reports = len(b.manager.reports)
            await until(lambda: len(b.manager.reports) > reports + 1)
            async with b.http.get(b.url, headers=headers) as response:
                assert (await response.json())["error"]["code"] == "token_bad_signature"

    run(test)
