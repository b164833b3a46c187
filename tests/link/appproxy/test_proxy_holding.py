"""Requests for an endpoint at zero: held, reported, let go, refused."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from proxy_fakes import Bench, bench, exchange, replica, route, run, until

from dure.appproxy import holding
from dure.routing.v1 import routing_pb2 as pb


def _idle(uid: str, port: int, hold_ms: int = 20_000, **more: Any) -> pb.Route:
    return route(uid, port, unavailability=pb.UNAVAILABILITY_IDLE, hold_ms=hold_ms, **more)


async def _ok(request: web.Request) -> web.Response:
    return web.Response(text=f"{request.path} {len(await request.read())}")


async def _get(b: Bench, path: str = "/", url: str = "") -> tuple[int, str]:
    async with b.http.get((url or b.url) + path) as response:
        return response.status, await response.text()


async def _gauge(b: Bench, metric: str, value: int) -> None:
    """Waits until a metric, summed over its labels, is exactly so much."""
    deadline = time.monotonic() + 5
    while True:
        lines = [line for line in (await b.proxy.metrics()).split("\n") if line.startswith(metric + "{")]
        found = sum(float(line.rpartition(" ")[2]) for line in lines)
        if found == value:
            return
        assert time.monotonic() < deadline, f"{metric} is {found}, not {value}"
        await asyncio.sleep(0.01)


def _held(b: Bench, uid: str = "e") -> bool:
    return any(uid in report.held for report in b.manager.reports)


def test_a_request_is_held_reported_at_once_and_answered_when_a_replica_serves(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(_idle("e", b.port))
            began_s = time.monotonic()
            request = asyncio.create_task(_get(b, "/hello"))
            await until(lambda: _held(b))
            # The next report of its own accord would come after a second or two.
            assert time.monotonic() - began_s < 0.5
            # Woken, but not there yet: it is held on.
            await b.serves(route("e", b.port, unavailability=pb.UNAVAILABILITY_STARTING, hold_ms=20_000))
            assert not request.done()
            await b.manager.set(route("e", b.port, port, hold_ms=20_000))
            assert await request == (200, "/hello 0")
            count = len(b.manager.reports)
            await until(lambda: any(not report.held for report in b.manager.reports[count:]))
            await _gauge(b, "dure_proxy_held_requests", 0)

    run(test)


def test_while_requests_wait_every_report_names_the_endpoint(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(_idle("e", b.port))
            request = asyncio.create_task(_get(b))
            await until(lambda: _held(b))
            count = len(b.manager.reports)
            await until(lambda: len(b.manager.reports) >= count + 3)
            reports = b.manager.reports[count:]
            assert all(list(report.held) == ["e"] for report in reports)
            seen = [m for report in reports for m in report.measurements if m.endpoint_uid == "e"]
            assert seen and all(m.queue == 1 and m.concurrency == 1 for m in seen)
            await b.manager.set(route("e", b.port, port))
            assert (await request)[0] == 200

    run(test)


def test_the_oldest_go_first_and_no_more_at_once_than_a_replica_takes(tmp_path: Path) -> None:
    async def test() -> None:
        order: list[str] = []
        at_once = most = 0

        async def slow(request: web.Request) -> web.Response:
            nonlocal at_once, most
            order.append(request.path)
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0.01)
            at_once -= 1
            return web.Response()

        async with bench(tmp_path, requests_per_replica=2) as b, replica(slow) as port:
            await b.serves(_idle("e", b.port))
            requests = []
            for number in range(10):
                requests.append(asyncio.create_task(_get(b, f"/{number}")))
                await b.reaches("dure_proxy_held_requests", number + 1)
            await b.manager.set(route("e", b.port, port))
            assert [status for status, _ in await asyncio.gather(*requests)] == [200] * 10
        assert most == 2
        # Connections to the replica are made two at a time, so neighbours may change places.
        places = [int(path[1:]) for path in order]
        assert all(abs(place - number) <= 1 for number, place in enumerate(places)), places

    run(test)


def test_after_the_time_it_is_refused_with_retry_after(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b:
            await b.serves(_idle("e", b.port, hold_ms=200))
            began_s = time.monotonic()
            async with b.http.get(b.url) as response:
                body = await response.json()
                assert (response.status, body["error"]["code"]) == (503, "starting")
                assert int(response.headers["Retry-After"]) > 0
            assert 0.2 <= time.monotonic() - began_s < 2
            await _gauge(b, "dure_proxy_held_requests", 0)

    run(test)


def test_the_time_is_one_for_the_request_however_often_replicas_come_and_go(tmp_path: Path) -> None:
    async def test() -> None:
        # A replica that takes one request, which stays: the other waits, then is held again.
        stay = asyncio.Event()

        async def stuck(request: web.Request) -> web.Response:
            await stay.wait()
            return web.Response()

        async with bench(tmp_path, requests_per_replica=1) as b, replica(stuck) as port:
            await b.serves(_idle("e", b.port, hold_ms=600))
            began_s = time.monotonic()
            first, second = (asyncio.create_task(_get(b)) for _ in range(2))
            await b.reaches("dure_proxy_held_requests", 2)
            await b.manager.set(route("e", b.port, port, hold_ms=600))
            await b.reaches("dure_proxy_queued_requests", 1)
            await b.manager.set(_idle("e", b.port, hold_ms=600))
            await b.reaches("dure_proxy_held_requests", 1)
            await asyncio.wait((first, second), return_when=asyncio.FIRST_COMPLETED)
            assert 0.6 <= time.monotonic() - began_s < 1.5
            stay.set()
            assert sorted(status for status, _ in await asyncio.gather(first, second)) == [200, 503]

    run(test)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (pb.UNAVAILABILITY_STOPPED, "stopped"),
        (pb.UNAVAILABILITY_BLOCKED, "blocked"),
        (pb.UNAVAILABILITY_TERMINATING, "terminating"),
    ],
)
def test_what_will_not_come_is_not_waited_for(
    tmp_path: Path, reason: pb.Unavailability.ValueType, code: str
) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b:
            await b.serves(_idle("e", b.port))
            request = asyncio.create_task(_get(b))
            await b.reaches("dure_proxy_held_requests", 1)
            await b.manager.set(route("e", b.port, unavailability=reason, hold_ms=20_000))
            status, text = await request
            assert status == 503 and code in text
            assert (await _get(b))[0] == 503

    run(test)


def test_an_endpoint_that_goes_away_lets_go_of_its_requests(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b:
            await b.serves(_idle("e", b.port))
            request = asyncio.create_task(_get(b))
            await b.reaches("dure_proxy_held_requests", 1)
            await b.manager.remove("e")
            assert (await request)[0] == 404

    run(test)


def test_a_client_that_leaves_leaves_nothing_behind(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(_idle("e", b.port))
            requests = [asyncio.create_task(_get(b, f"/{number}")) for number in range(20)]
            await b.reaches("dure_proxy_held_requests", 20)
            for request in requests[:19]:
                request.cancel()
            await _gauge(b, "dure_proxy_held_requests", 1)
            await b.manager.set(route("e", b.port, port))
            assert (await requests[19])[0] == 200
            await _gauge(b, "dure_proxy_in_flight_requests", 0)
            assert 'class="2xx"} 1\n' in await b.proxy.metrics()

    run(test)


def test_the_body_is_read_only_when_the_replica_is_there(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(_idle("e", b.port))
            reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
            writer.write(
                b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n"
                b"Connection: close\r\n\r\n"
            )
            await b.reaches("dure_proxy_held_requests", 1)
            early = asyncio.create_task(reader.readline())
            await b.manager.set(route("e", b.port, port))
            assert await early == b"HTTP/1.1 100 Continue\r\n"
            writer.write(b"hello")
            assert b"/x 5" in await reader.read()
            writer.close()

    run(test)


HELD = 200


def test_beyond_the_room_requests_are_refused_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path, held_requests=HELD) as b, replica(_ok) as port:
            await b.serves(_idle("e", b.port), _idle("f", b.ports[1]))
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as http:

                async def get() -> int:
                    async with http.get(b.url) as response:
                        if response.status == 503:
                            assert (await response.json())["error"]["code"] == "hold_full"
                            assert int(response.headers["Retry-After"]) > 0
                        return response.status

                requests = [asyncio.create_task(get()) for _ in range(HELD + 5)]
                await b.reaches("dure_proxy_refusals_total", 5)
                # Another endpoint's room is not that one's.
                other = asyncio.create_task(_get(b, url=f"http://127.0.0.1:{b.ports[1]}"))
                await b.reaches("dure_proxy_held_requests", HELD + 1)
                await b.manager.set(route("e", b.port, port), route("f", b.ports[1], port))
                statuses = await asyncio.gather(*requests)
                assert sorted(statuses) == [200] * HELD + [503] * 5
                assert (await other)[0] == 200

    run(test)


def test_large_heads_fill_the_room_too(tmp_path: Path) -> None:
    async def test() -> None:
        room = holding.Holding()
        waits = [asyncio.create_task(room.wait("e", 1024 * 1024)) for _ in range(100)]
        await until(lambda: room.held().get("e") == 100)
        with pytest.raises(holding.Full):
            await room.wait("e", 1)
        # Two more endpoints' worth, and all together are full.
        waits += [asyncio.create_task(room.wait("f", 1024 * 1024)) for _ in range(100)]
        waits += [asyncio.create_task(room.wait("g", 1024 * 1024)) for _ in range(56)]
        await until(lambda: sum(room.held().values()) == 256)
        with pytest.raises(holding.Full):
            await room.wait("h", 1)
        room.free("f")
        await until(lambda: room.held().get("f") == 100 - holding.AT_ONCE_MAX)
        # One that goes takes one along; one whose client leaves as it is let go does so too.
        room.pass_on("f")
        await until(lambda: room.held().get("f") == 99 - holding.AT_ONCE_MAX)
        room.pass_on("f")
        waits[100 + holding.AT_ONCE_MAX + 1].cancel()
        await until(lambda: room.held().get("f") == 97 - holding.AT_ONCE_MAX)
        # At zero again, those left wait on; freed once more, all can go.
        room.keep("f")
        room.pass_on("f")
        await asyncio.sleep(0)
        assert room.held().get("f") == 97 - holding.AT_ONCE_MAX
        room.free("f")
        while room.held().get("f"):
            room.pass_on("f")
            await asyncio.sleep(0)
        done = await asyncio.gather(*waits[100:200], return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in done) == 1
        again = asyncio.create_task(room.wait("h", 1))
        await until(lambda: room.held().get("h") == 1)
        for wait in (*waits, again):
            wait.cancel()
        await asyncio.gather(*waits, again, return_exceptions=True)
        assert room.held() == {}

    run(test)


def test_an_upgrade_to_websocket_is_held_too(tmp_path: Path) -> None:
    async def echo(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(message.data)
        return socket

    async def test() -> None:
        async with bench(tmp_path) as b, replica(echo) as port:
            await b.serves(_idle("e", b.port))
            connecting = asyncio.ensure_future(b.http.ws_connect(b.url))
            await b.reaches("dure_proxy_held_requests", 1)
            await b.manager.set(route("e", b.port, port))
            async with await connecting as socket:
                await socket.send_str("x")
                assert await socket.receive_str(timeout=5) == "x"

    run(test)


def test_a_token_is_asked_for_before_anything_is_woken(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b:
            await b.serves(_idle("e", b.port, public=False))
            assert (await _get(b))[0] == 401
            count = len(b.manager.reports)
            await until(lambda: len(b.manager.reports) >= count + 2)
            assert not _held(b)
            # Nor does it keep an endpoint awake: nobody who may use it has come.
            assert not any(m.arrived for report in b.manager.reports for m in report.measurements)

    run(test)


def test_idle_without_a_time_to_hold_is_starting(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b:
            await b.serves(_idle("e", b.port, hold_ms=0))
            status, text = await _get(b)
            assert status == 503 and '"starting"' in text

    run(test)


def test_without_a_manager_the_table_on_disk_holds_too(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(_idle("e", b.port, hold_ms=300), route("f", b.ports[1], port, hold_ms=300))
            await b.manager.stop()
            text = await exchange(b.port, b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            assert text.startswith(b"HTTP/1.1 503") and b"starting" in text
            assert (await _get(b, url=f"http://127.0.0.1:{b.ports[1]}"))[0] == 200

    run(test)
