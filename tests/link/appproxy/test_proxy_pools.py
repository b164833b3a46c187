"""Traffic pools, through a real proxy: the shares hold, whatever happens to the replicas meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import aiohttp
import pytest
from aiohttp import web
from own_ports import free_port, free_ports
from proxy_fakes import Bench, bench, listening, proxy, replica, route, run, target, until

from dure.routing.v1 import routing_pb2 as pb

CONNECTIONS = 32
# Chi-square that one run in a thousand exceeds by chance, one degree of freedom.
CHI_SQUARE_MAX = 10.828


class _Answers(asyncio.Protocol):
    """Answers each request (of at most 8 bytes of body, which end with `.`) with a letter."""

    def __init__(self, letter: str) -> None:
        self._answer = f"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{letter}".encode()
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        while self._data.endswith(b".") or (not self._data.startswith(b"POST") and b"\r\n\r\n" in self._data):
            self._data = b""
            self._transport.write(self._answer)


@contextlib.asynccontextmanager
async def _letters(*letters: str) -> AsyncIterator[list[int]]:
    """A replica for each letter; their ports."""
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda letter=letter: _Answers(letter), "127.0.0.1", 0) for letter in letters
    ]
    try:
        yield [server.sockets[0].getsockname()[1] for server in servers]
    finally:
        for server in servers:
            server.close()


def _pools(**weights: int) -> list[pb.Pool]:
    """`r1=90, r2=10`."""
    return [pb.Pool(revision=int(name[1:]), weight=weight) for name, weight in weights.items()]


async def _ask(b: Bench, requests: int) -> Counter[str]:
    """So many requests, every other a POST, over CONNECTIONS connections; counts what came back."""
    counts: Counter[str] = Counter()
    left = itertools.count(requests, -1)

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
        try:
            while (number := next(left)) > 0:
                if number % 2:
                    writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                else:
                    writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nbody.")
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"HTTP/1.1 200 "):
                    counts[(await reader.readexactly(1)).decode()] += 1
                else:
                    counts[head.decode()] += 1
                    return
        finally:
            writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(connection())
    return counts


@pytest.mark.parametrize("weights", [(90, 10), (50, 50), (1, 99)])
def test_ten_thousand_requests_are_split_by_weight_while_replicas_come_and_go(
    tmp_path: Path, weights: tuple[int, int]
) -> None:
    requests = 10_000

    async def test() -> None:
        # Two replicas in one pool and three in the other: shares must not follow their number.
        async with bench(tmp_path) as b, _letters("1", "1", "2", "2", "2") as ports:
            revisions = [1, 1, 2, 2, 2]
            pools = _pools(r1=weights[0], r2=weights[1])

            def whole(*draining: int) -> pb.Route:
                targets = [
                    target(port, revision=revision, draining=port in draining)
                    for port, revision in zip(ports, revisions, strict=True)
                ]
                return route("e", b.port, *targets, pools=pools)

            await b.serves(whole())
            asking = asyncio.create_task(_ask(b, requests))
            changes = 0
            for leaving in itertools.cycle((ports[0], ports[2], ports[1], ports[4])):
                if asking.done():
                    break
                await b.manager.set(whole(leaving))
                uid = f"replica-{leaving}"
                await until(lambda uid=uid: uid in b.manager.reports[-1].drained)
                await b.manager.set(whole())
                await b.applied()
                changes += 1
            counts = await asking
            assert changes > 10
            # Nothing failed.
            assert counts.keys() <= {"1", "2"} and counts.total() == requests, counts
            expected = {"1": requests * weights[0] / 100, "2": requests * weights[1] / 100}
            chi_square = sum((counts[pool] - e) ** 2 / e for pool, e in expected.items())
            assert chi_square < CHI_SQUARE_MAX, (counts, chi_square)
            # Better than chance: the round is exact, and both pools could take requests all the time.
            assert all(abs(counts[pool] - e) <= 1 for pool, e in expected.items()), counts

    run(test, 60)


def test_weights_change_under_load_and_nothing_fails(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, _letters("1", "2") as (old, new):

            async def share(percent: int) -> Counter[str]:
                pools = _pools(r1=100 - percent, r2=percent)
                await b.serves(
                    route("e", b.port, target(old, revision=1), target(new, revision=2), pools=pools)
                )
                return await _ask(b, 1000)

            for percent in (0, 1, 10, 50, 90, 100):
                counts = await share(percent)
                assert counts.keys() <= {"1", "2"}
                # A change of weights may find a turn saved up.
                assert abs(counts["2"] - 10 * percent) <= 1, (percent, counts)

    run(test)


def test_dead_replicas_cost_neither_requests_nor_shares(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, _letters("1", "2") as (one, two):
            dead = free_ports(2)
            pools = _pools(r1=80, r2=20)
            await b.serves(
                route(
                    "e",
                    b.port,
                    *(target(port, revision=1) for port in (one, dead[0])),
                    target(two, revision=2),
                    pools=pools,
                )
            )
            # A request that met the dead one is repeated in its pool.
            assert await _ask(b, 1000) == {"1": 800, "2": 200}
            await b.serves(
                route(
                    "e",
                    b.port,
                    *(target(port, revision=1) for port in dead),
                    target(two, revision=2),
                    pools=pools,
                )
            )
            # The whole pool is dead: the other takes all, though a trial comes to the dead ones every second.
            assert await _ask(b, 1000) == {"2": 1000}

    run(test)


def test_a_pool_of_weight_zero_gets_nothing_until_it_is_needed(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, _letters("1", "2") as (blue, green):
            pools = _pools(r1=100, r2=0)
            both = [target(blue, revision=1), target(green, revision=2)]
            await b.serves(route("e", b.port, *both, pools=pools))
            assert await _ask(b, 500) == {"1": 500}
            leaving = [target(blue, revision=1, draining=True), target(green, revision=2)]
            await b.serves(route("e", b.port, *leaving, pools=pools))
            assert await _ask(b, 100) == {"2": 100}

    run(test)


def test_websockets_and_uploads_go_by_the_same_shares(tmp_path: Path) -> None:
    def pool_of(name: str):  # type: ignore[no-untyped-def]
        async def handler(request: web.Request) -> web.StreamResponse:
            if request.headers.get("Upgrade") is None:
                return web.Response(text=f"{name} {len(await request.read())}")
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            await socket.send_str(name)
            await socket.receive()
            return socket

        return handler

    async def test() -> None:
        async with bench(tmp_path) as b, replica(pool_of("1")) as one, replica(pool_of("2")) as two:
            await b.serves(
                route(
                    "e",
                    b.port,
                    target(one, revision=1),
                    target(two, revision=2),
                    pools=_pools(r1=75, r2=25),
                )
            )
            counts: Counter[str] = Counter()
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(40):
                    socket = await stack.enter_async_context(b.http.ws_connect(b.url))
                    counts[await socket.receive_str()] += 1
                # All are still open: what is under way does not change whose turn it is.
                assert counts == {"1": 30, "2": 10}

            async def upload() -> str:
                async def pieces() -> AsyncIterator[bytes]:
                    for _ in range(10):
                        yield b"x" * 30_000

                async with b.http.post(b.url, data=pieces()) as response:
                    return await response.text()

            texts = Counter(await asyncio.gather(*(upload() for _ in range(40))))
            assert texts == {"1 300000": 30, "2 300000": 10}

    run(test)


def test_the_table_on_disk_keeps_the_pools(tmp_path: Path) -> None:
    async def test() -> None:
        async with _letters("1", "2") as (one, two):
            async with bench(tmp_path) as b:
                targets = [target(one, revision=1), target(two, revision=2)]
                await b.serves(route("e", b.port, *targets, pools=_pools(r1=90, r2=10)))
                ports = (min(b.ports), max(b.ports))
                await until((b.proxy.home / "table.pb").exists)
            async with proxy(tmp_path, free_port(), ports) as again, aiohttp.ClientSession() as http:
                await listening(b.port)
                assert await _ask(Bench(b.manager, again, b.port, b.ports, http), 100) == {"1": 90, "2": 10}

    run(test)
