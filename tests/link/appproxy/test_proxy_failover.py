"""Replicas that die under load, restart, move: what can be retried does not fail."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import io
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web
from own_ports import free_port, free_ports
from proxy_fakes import (
    bench,
    listening,
    raw_replica,
    read_head,
    replica,
    route,
    run_programs,
    target,
    until,
)

_REPLICA = """
import asyncio, sys
from aiohttp import web
async def handler(request):
    await request.read()
    await asyncio.sleep(0.005)
    return web.Response(text=sys.argv[1])
async def main():
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1])).start()
    await asyncio.Event().wait()
asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def _process(port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _REPLICA, str(port))
    try:
        await listening(port)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def test_killed_replica_under_load_fails_no_get_and_no_unsent_post(tmp_path: Path) -> None:
    async def test() -> None:
        first, second = free_ports(2)
        async with bench(tmp_path) as b, _process(first) as victim, _process(second):
            await b.serves(route("e", b.port, first, second))
            answers: collections.Counter[tuple[str, int, str]] = collections.Counter()
            stop = asyncio.Event()

            async def load(method: str) -> None:
                while not stop.is_set():
                    async with b.http.request(method, b.url, data=b"x" if method == "POST" else None) as r:
                        text = await r.text()
                        answers[(method, r.status, text if r.status != 502 else "")] += 1

            async with asyncio.TaskGroup() as group:
                workers = [group.create_task(load(method)) for method in ("GET", "POST") for _ in range(8)]
                await until(lambda: min(answers[("GET", 200, str(p))] for p in (first, second)) > 20)
                in_flight_posts = 8
                victim.send_signal(signal.SIGKILL)
                await victim.wait()
                before = answers.total()
                await until(lambda: answers.total() > before + 500, 10)
                stop.set()
            assert all(worker.done() for worker in workers)
            failed = {key: count for key, count in answers.items() if key[1] != 200}
            assert not [key for key in failed if key[0] == "GET"], failed
            # A POST that the dead replica had taken is not repeated; later ones never reach it.
            assert sum(failed.values()) <= in_flight_posts, failed
            assert all(status == 502 for _, status, _ in failed)

    run_programs(test, 60)


def test_replacement_under_load_fails_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async def who(request: web.Request) -> web.Response:
            await request.read()
            return web.Response(text=str(request.transport.get_extra_info("sockname")[1]))  # type: ignore[union-attr]

        async with bench(tmp_path) as b, contextlib.AsyncExitStack() as stack:
            old = await stack.enter_async_context(replica(who))
            await b.serves(route("e", b.port, old))
            statuses: collections.Counter[int] = collections.Counter()
            stop = asyncio.Event()

            async def load() -> None:
                while not stop.is_set():
                    async with b.http.post(b.url, data=b"x") as response:
                        statuses[response.status] += 1

            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(load())
                for _ in range(3):
                    async with replica(who) as new:
                        await b.manager.set(route("e", b.port, target(old, draining=True), new))
                        await until(lambda old=old: f"replica-{old}" in b.manager.reports[-1].drained)
                        back = await stack.enter_async_context(replica(who))
                        await b.manager.set(route("e", b.port, target(new, draining=True), back))
                        await until(lambda new=new: f"replica-{new}" in b.manager.reports[-1].drained)
                        old = back
                await until(lambda: statuses.total() > 50)
                stop.set()
            assert set(statuses) == {200}

    run_programs(test)


def test_the_only_replica_restarts_within_the_search_time(tmp_path: Path) -> None:
    async def test() -> None:
        port = free_port()

        async def ok(request: web.Request) -> web.Response:
            return web.Response(text="back")

        async with bench(tmp_path) as b:
            await b.serves(route("e", b.port, port))
            request = asyncio.create_task(b.http.post(b.url, data=b"x" * 200_000))
            await b.reaches("dure_proxy_replica_connect_failures_total", 1)
            await b.reaches("dure_proxy_retries_total", 3)
            assert not request.done()
            async with replica(ok, port):
                response = await request
                assert (response.status, await response.text()) == (200, "back")

    run_programs(test)


def test_a_table_update_rescues_requests_that_search(tmp_path: Path) -> None:
    async def test() -> None:
        async def ok(request: web.Request) -> web.Response:
            return web.Response(text="new")

        async with bench(tmp_path) as b, replica(ok) as new:
            await b.serves(route("e", b.port, free_port()))
            request = asyncio.create_task(b.http.get(b.url))
            await b.reaches("dure_proxy_retries_total", 2)
            await b.manager.set(route("e", b.port, new))
            response = await request
            assert response.status == 200

    run_programs(test)


def test_idempotent_requests_are_repeated_and_posts_are_not(tmp_path: Path) -> None:
    async def test() -> None:
        seen: list[bytes] = []

        async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await read_head(reader)
            seen.append(head.split(b" ")[0])
            if b"Content-Length: 500000" in head:
                await reader.readexactly(500_000)
            elif b"Content-Length: 2000000" in head:
                await reader.readexactly(2_000_000)

        async def ok(request: web.Request) -> web.Response:
            return web.Response(text=str(len(await request.read())))

        async with bench(tmp_path) as b, raw_replica(closes) as bad, replica(ok) as good:
            # By weight, a request with no other under way goes to the bad one first.
            await b.serves(route("e", b.port, target(bad, weight=100), good))
            for method, size, status in (
                ("GET", 0, 200),
                ("PUT", 5, 200),
                ("DELETE", 0, 200),
                ("PUT", 500_000, 200),
                ("PUT", 2_000_000, 502),
                ("POST", 0, 502),
                ("POST", 5, 502),
            ):
                seen.clear()
                async with b.http.request(method, b.url, data=io.BytesIO(b"x" * size)) as response:
                    text = await response.text()
                    assert response.status == status, (method, size, text)
                    if status == 200:
                        assert text == str(size)
                    else:
                        assert "upstream_closed" in text
                assert seen == [method.encode()]
            metrics = await b.proxy.metrics()
            assert (
                'dure_proxy_retries_total{project="default",endpoint="name-e",endpoint_uid="e"} 4' in metrics
            )

    run_programs(test)


def test_a_replica_that_closes_idle_connections_costs_no_request(tmp_path: Path) -> None:
    async def test() -> None:
        async def impatient(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            await writer.drain()

        async with bench(tmp_path) as b, raw_replica(impatient) as port:
            await b.serves(route("e", b.port, port))
            for number in range(200):
                async with b.http.post(b.url, data=b"") as response:
                    assert response.status == 200, number

    run_programs(test)


def test_unreachable_targets_are_reported_and_left_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async def ok(request: web.Request) -> web.Response:
            return web.Response()

        dead = free_port()
        async with bench(tmp_path) as b, replica(ok) as good:
            await b.serves(route("e", b.port, dead, good))
            for _ in range(50):
                async with b.http.get(b.url) as response:
                    assert response.status == 200
            await until(lambda: f"127.0.0.1:{dead}" in b.manager.reports[-1].unreachable_targets)
            text = await b.proxy.metrics()
            line = next(x for x in text.split("\n") if "connect_failures" in x and f"replica-{dead}" in x)
            assert int(line.rpartition(" ")[2]) <= 3

    run_programs(test)


def test_large_bodies_pass_in_bounded_memory(tmp_path: Path) -> None:
    size = 50_000_000

    async def test() -> None:
        async def handler(request: web.Request) -> web.StreamResponse:
            total = 0
            async for piece in request.content.iter_any():
                total += len(piece)
            response = web.StreamResponse(headers={"Content-Length": str(total)})
            await response.prepare(request)
            for _ in range(total // 100_000):
                await response.write(b"y" * 100_000)
            return response

        async with bench(tmp_path) as b, replica(handler) as port:
            await b.serves(route("e", b.port, port))

            async def upload() -> AsyncIterator[bytes]:
                for _ in range(size // 100_000):
                    yield b"x" * 100_000

            for headers in ({}, {"Content-Length": str(size)}):
                before = _rss_bytes()
                received = 0
                async with b.http.post(b.url, data=upload(), headers=headers) as response:
                    assert response.status == 200
                    async for piece in response.content.iter_any():
                        received += len(piece)
                assert received == size
                # Client, proxy and replica share this process.
                assert _rss_bytes() - before < 25_000_000

    run_programs(test, 60)


def test_a_slow_client_holds_back_the_replica(tmp_path: Path) -> None:
    async def test() -> None:
        sent = 0

        async def flood(request: web.Request) -> web.StreamResponse:
            nonlocal sent
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(1000):
                await response.write(b"x" * 100_000)
                sent += 100_000
            return response

        async with bench(tmp_path) as b, replica(flood) as port:
            await b.serves(route("e", b.port, port))
            reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            await read_head(reader)
            before = -1
            while before != sent:
                before = sent
                await asyncio.sleep(0.3)
            assert 0 < sent < 30_000_000
            writer.close()

    run_programs(test)


def _rss_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
