"""Requests and answers through the proxy, byte for byte where it matters."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web
from proxy_fakes import bench, exchange, raw_replica, read_head, replica, route, run


async def _echo(request: web.Request) -> web.Response:
    body = await request.read()
    return web.json_response(
        {
            "method": request.method,
            "path": request.raw_path,
            "headers": [[k, v] for k, v in request.headers.items()],
            "body": body.decode(),
        }
    )


def test_get_and_post_reach_the_replica(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_echo) as port:
            await b.serves(route("e", b.port, port))
            async with b.http.get(b.url + "/a%2Fb?q=%20x") as response:
                assert response.status == 200
                seen = await response.json()
            assert seen["method"] == "GET"
            assert seen["path"] == "/a%2Fb?q=%20x"
            async with b.http.post(b.url + "/p", data=b"hello") as response:
                seen = await response.json()
            assert seen["body"] == "hello"

    run(test)


def _raw_answer(answer: bytes, seen: list[bytes]):  # type: ignore[no-untyped-def]
    """A replica that keeps the head it gets and answers with given bytes, then closes."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_head(reader))
        writer.write(answer)
        await writer.drain()

    return handler


def test_request_headers_are_cleaned_and_kept_in_order(tmp_path: Path) -> None:
    async def test() -> None:
        seen: list[bytes] = []
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        async with bench(tmp_path) as b, raw_replica(_raw_answer(answer, seen)) as port:
            await b.serves(route("e", b.port, port, public=False))
            token = b.manager.token("e")
            await exchange(
                b.port,
                b"GET /x?y=%41 HTTP/1.1\r\nHost: Example:80\r\nB: 1\r\nA: 2\r\nB: 3\r\n"
                b"Authorization: bearer " + token.encode() + b"\r\n"
                b"Connection: close, X-Secret\r\nX-Secret: s\r\nKeep-Alive: 5\r\nTE: trailers\r\n"
                b"Proxy-Authorization: x\r\nUpgrade: h2c\r\nX-Forwarded-For: 10.9.9.9\r\n"
                b"X-Forwarded-Proto: gopher\r\nX_Forwarded_Host: evil\r\nX-Request-Id: abc-1\r\n"
                b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"
                b"tracestate: v=1\r\nCaf: \xe9\r\n\r\n",
            )
        lines = seen[0].split(b"\r\n")
        assert lines == [
            b"GET /x?y=%41 HTTP/1.1",
            b"Host: Example:80",
            b"B: 1",
            b"A: 2",
            b"B: 3",
            b"tracestate: v=1",
            b"Caf: \xe9",
            b"X-Forwarded-For: 10.9.9.9, 127.0.0.1",
            b"X-Forwarded-Proto: http",
            b"X-Forwarded-Host: Example:80",
            b"X-Request-Id: abc-1",
            b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            b"",
            b"",
        ]

    run(test)


def test_insane_request_id_and_traceparent_are_replaced(tmp_path: Path) -> None:
    async def test() -> None:
        seen: list[bytes] = []
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        async with bench(tmp_path) as b, raw_replica(_raw_answer(answer, seen)) as port:
            await b.serves(route("e", b.port, port))
            got = await exchange(
                b.port,
                b"GET / HTTP/1.1\r\nHost: h\r\nX-Request-Id: a b\r\ntraceparent: 00-0-0-0\r\n"
                b"tracestate: v=1\r\nConnection: close\r\n\r\n",
            )
        headers = dict(line.split(b": ", 1) for line in seen[0].split(b"\r\n")[1:] if line)
        assert len(headers[b"X-Request-Id"]) == 32
        assert len(headers[b"traceparent"]) == 55
        assert b"tracestate" not in headers
        assert b"X-Request-Id: " + headers[b"X-Request-Id"] in got

    run(test)


def test_response_passes_as_it_is(tmp_path: Path) -> None:
    async def test() -> None:
        answer = (
            b"HTTP/1.1 299 Quite fine\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\nX-Hop: 1\r\n"
            b"Connection: X-Hop\r\nKeep-Alive: timeout=5\r\nContent-Encoding: gzip\r\nCaf: \xe9\r\n"
            b"Content-Length: 3\r\n\r\n\x1f\x8b\x00"
        )
        async with bench(tmp_path) as b, raw_replica(_raw_answer(answer, [])) as port:
            await b.serves(route("e", b.port, port))
            got = await exchange(
                b.port, b"GET / HTTP/1.1\r\nHost: h\r\nX-Request-Id: r\r\nConnection: close\r\n\r\n"
            )
        assert got == (
            b"HTTP/1.1 299 Quite fine\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\nContent-Encoding: gzip\r\n"
            b"Caf: \xe9\r\nContent-Length: 3\r\nX-Request-Id: r\r\nConnection: close\r\n\r\n\x1f\x8b\x00"
        )

    run(test)


def test_redirect_is_not_followed_and_head_has_no_body(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/r":
            return web.Response(status=302, headers={"Location": "/elsewhere"})
        if request.path == "/304":
            return web.Response(status=304, headers={"ETag": '"1"'})
        return web.Response(body=b"x" * 10)

    async def test() -> None:
        async with bench(tmp_path) as b, replica(handler) as port:
            await b.serves(route("e", b.port, port))
            async with b.http.get(b.url + "/r", allow_redirects=False) as response:
                assert (response.status, response.headers["Location"]) == (302, "/elsewhere")
            async with b.http.head(b.url + "/h") as response:
                assert response.headers["Content-Length"] == "10"
                assert await response.read() == b""
            async with b.http.get(b.url + "/304") as response:
                assert (response.status, response.headers["ETag"]) == (304, '"1"')
            async with b.http.get(b.url + "/h") as response:
                assert await response.read() == b"x" * 10

    run(test)


def test_chunks_trailers_and_interim_responses(tmp_path: Path) -> None:
    async def test() -> None:
        answer = (
            b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
            b"3;ext=1\r\nabc\r\n0\r\nX-Sum: 9\r\nContent-Length: 5\r\n\r\n"
        )
        async with bench(tmp_path) as b, raw_replica(_raw_answer(answer, [])) as port:
            await b.serves(route("e", b.port, port))
            got = await exchange(
                b.port, b"GET / HTTP/1.1\r\nHost: h\r\nX-Request-Id: r\r\nConnection: close\r\n\r\n"
            )
            assert got == (
                b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
                b"HTTP/1.1 200 OK\r\nX-Request-Id: r\r\nTransfer-Encoding: chunked\r\n"
                b"Connection: close\r\n\r\n"
                b"3\r\nabc\r\n0\r\nX-Sum: 9\r\n\r\n"
            )
            old = await exchange(b.port, b"GET / HTTP/1.0\r\nHost: h\r\nX-Request-Id: r\r\n\r\n")
            assert old == b"HTTP/1.1 200 OK\r\nX-Request-Id: r\r\nConnection: close\r\n\r\nabc"

    run(test)


def test_response_until_close_and_http_1_0_replica(tmp_path: Path) -> None:
    async def test() -> None:
        answer = b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\nall of it"
        async with bench(tmp_path) as b, raw_replica(_raw_answer(answer, [])) as port:
            await b.serves(route("e", b.port, port))
            for _ in range(2):
                async with b.http.get(b.url) as response:
                    assert await response.read() == b"all of it"
                    assert response.headers["Server"] == "old"

    run(test)


def test_each_event_arrives_before_the_next_is_sent(tmp_path: Path) -> None:
    async def test() -> None:
        seen = asyncio.Semaphore(0)

        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for number in range(20):
                await response.write(f"data: {number}\n\n".encode())
                await seen.acquire()  # the client has it
            await response.write_eof()
            return response

        async with bench(tmp_path) as b, replica(handler) as port:
            await b.serves(route("e", b.port, port))
            loop = asyncio.get_running_loop()
            async with b.http.get(b.url) as response:
                assert response.headers["Content-Type"] == "text/event-stream"
                began = loop.time()
                for number in range(20):
                    assert await response.content.readuntil(b"\n\n") == f"data: {number}\n\n".encode()
                    seen.release()
                assert await response.content.read() == b""
            # Nagle or delayed acknowledgements would cost 40 ms an event.
            assert loop.time() - began < 0.4

    run(test)


def test_upload_is_streamed_both_ways_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            async for piece in request.content.iter_any():
                await response.write(piece.upper())
            return response

        async with bench(tmp_path) as b, replica(handler) as port:
            await b.serves(route("e", b.port, port))
            reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
            writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
            head = await read_head(reader)
            assert head.startswith(b"HTTP/1.1 200 OK")
            for word in (b"one", b"two", b"three"):
                writer.write(b"%x\r\n%b\r\n" % (len(word), word))
                assert await reader.readuntil(b"\r\n") == b"%x\r\n" % len(word)
                assert await reader.readexactly(len(word) + 2) == word.upper() + b"\r\n"
            writer.write(b"0\r\n\r\n")
            assert await reader.readexactly(5) == b"0\r\n\r\n"
            writer.close()

    run(test)


def test_expect_continue(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_echo) as port:
            await b.serves(route("e", b.port, port), route("closed", b.ports[1], port, public=False))
            for size in (5, 200_000):
                reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
                writer.write(
                    b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n" % size
                )
                assert await read_head(reader) == b"HTTP/1.1 100 Continue\r\n\r\n"
                writer.write(b"x" * size)
                assert (await read_head(reader)).startswith(b"HTTP/1.1 200")
                writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", b.ports[1])
            writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
            refused = await read_head(reader)
            writer.close()
            assert refused.startswith(b"HTTP/1.1 401")
            assert b"100 Continue" not in refused
            assert b"Connection: close" in refused

    run(test)


def test_client_that_leaves_cancels_the_request_at_the_replica(tmp_path: Path) -> None:
    async def test() -> None:
        came, gone = asyncio.Event(), asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            came.set()
            if answers:
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
            try:
                await reader.read()
            finally:
                gone.set()

        answers = False
        async with bench(tmp_path) as b, raw_replica(handler) as port:
            await b.serves(route("e", b.port, port))
            for answers in (False, True):
                came.clear()
                gone.clear()
                reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
                writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                await came.wait()
                if answers:
                    await read_head(reader)
                writer.close()
                async with asyncio.timeout(1):
                    await gone.wait()

    run(test)


def test_replica_that_dies_in_a_response_breaks_the_clients_connection(tmp_path: Path) -> None:
    async def test() -> None:
        request = b"GET / HTTP/1.%d\r\nHost: h\r\nX-Request-Id: r\r\n\r\n"
        for answer, body in (
            (b"Content-Length: 10\r\n\r\nabc", b"abc"),
            (b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"3\r\nabc\r\n"),
        ):
            answer = b"HTTP/1.1 200 OK\r\n" + answer
            async with bench(tmp_path) as b, raw_replica(_raw_answer(answer, [])) as port:
                await b.serves(route("e", b.port, port))
                # What came is passed on, and the framing shows that the rest is missing.
                got = await exchange(b.port, request % 1)
                assert got.partition(b"\r\n\r\n")[2] == body
                if b"chunked" in answer:
                    # To an HTTP/1.0 client only a reset shows it.
                    with pytest.raises(ConnectionResetError):
                        await exchange(b.port, request % 0)
                    assert 'class="aborted"} 2' in await b.proxy.metrics()

    run(test)


def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    async def test() -> None:
        async def handler(request: web.Request) -> web.Response:
            if request.path == "/1":
                await asyncio.sleep(0.05)
            return web.Response(text=request.path)

        async with bench(tmp_path) as b, replica(handler) as port:
            await b.serves(route("e", b.port, port))
            got = await exchange(
                b.port,
                b"".join(b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n" % n for n in range(1, 5))
                + b"GET /5 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
            )
        assert [part[:2] for part in got.split(b"\r\n\r\n")[1:]] == [b"/1", b"/2", b"/3", b"/4", b"/5"]

    run(test)


def test_early_answer_to_a_long_upload(tmp_path: Path) -> None:
    async def test() -> None:
        answer = b"HTTP/1.1 413 Too Big\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        async with bench(tmp_path) as b, raw_replica(_raw_answer(answer, [])) as port:
            await b.serves(route("e", b.port, port))
            reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
            writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 900000\r\n\r\n" + b"x" * 100_000)
            head = await read_head(reader)
            assert head.startswith(b"HTTP/1.1 413 Too Big\r\n")
            writer.close()

    run(test)


def test_an_answer_that_nobody_asked_for_reaches_nobody(tmp_path: Path) -> None:
    async def test() -> None:
        asked: list[bytes] = []
        poisoned = asyncio.Event()

        async def poisons(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                asked.append(await read_head(reader))
                good = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"
                evil = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
                if len(asked) % 2:
                    writer.write(good + evil)
                else:
                    writer.write(good)
                    await asyncio.sleep(0.05)
                    writer.write(evil)
                poisoned.set()

        async with bench(tmp_path) as b, raw_replica(poisons) as port:
            await b.serves(route("e", b.port, port))
            for _ in range(6):
                poisoned.clear()
                async with b.http.post(b.url) as response:
                    assert await response.read() == b"good"
                await poisoned.wait()
            assert len(asked) == 6

    run(test)
