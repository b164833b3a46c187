"""The stream to the manager, the table on disk, listeners: what changes while requests are served."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from pathlib import Path

import aiohttp
from aiohttp import web
from own_ports import free_port, free_ports
from proxy_fakes import (
    FakeManager,
    bench,
    exchange,
    listening,
    proxy,
    replica,
    route,
    run,
    target,
    until,
)

from dure.routing.v1 import routing_pb2 as pb


async def _ok(request: web.Request) -> web.Response:
    return web.Response(text="ok")


async def _status(http: aiohttp.ClientSession, url: str, **more: object) -> int:
    async with http.get(url, **more) as response:  # type: ignore[arg-type]
        await response.read()
        return response.status


def test_join_once_then_hello_says_who_it_is(tmp_path: Path) -> None:
    async def test() -> None:
        ports = free_ports(2)
        low, high = min(ports), max(ports)
        manager = FakeManager()
        await manager.start()
        with contextlib.closing(socket.socket()) as other:
            other.bind(("127.0.0.1", low))
            other.listen(1)
            for _ in range(2):
                manager.hellos.clear()
                async with proxy(tmp_path, manager.port, (low, high), joined=False) as running:
                    await until(lambda: manager.hellos)
                    hello = manager.hellos[-1]
                    assert hello.protocol_version == 1
                    assert (hello.port_pool.first, hello.port_pool.last) == (low, high)
                    assert (hello.proxy_group, hello.public_host) == ("default", "127.0.0.1")
                    assert hello.admin_url == f"http://127.0.0.1:{running.admin_port}"
                    assert low in hello.unavailable_ports
                    assert high not in hello.unavailable_ports
        assert manager.joins == 1
        await manager.stop()

    run(test)


def test_revocation_binds_within_a_second(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(route("e", b.port, port, public=False))
            headers = {"Authorization": f"Bearer {b.manager.token('e')}"}
            assert await _status(b.http, b.url, headers=headers) == 200
            await b.manager.set(route("e", b.port, port, public=False, revoked_tokens=["token-1"]))
            began = time.monotonic()
            while await _status(b.http, b.url, headers=headers) != 401:
                assert time.monotonic() - began < 1

    run(test)


def test_expiry_binds_without_a_manager(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(route("e", b.port, port, public=False))
            headers = {"Authorization": f"Bearer {b.manager.token('e', expires_in_s=2)}"}
            assert await _status(b.http, b.url, headers=headers) == 200
            await b.manager.stop()
            began = time.monotonic()
            while await _status(b.http, b.url, headers=headers) == 200:
                assert time.monotonic() - began < 3
                await asyncio.sleep(0.02)
            assert await _status(b.http, b.url, headers=headers) == 401

    run(test)


def test_draining_gets_nothing_new_and_is_reported_when_empty(tmp_path: Path) -> None:
    async def test() -> None:
        release, arrived = asyncio.Event(), asyncio.Event()

        async def slow(request: web.Request) -> web.Response:
            arrived.set()
            await release.wait()
            return web.Response(text="slow")

        async with bench(tmp_path) as b, replica(slow) as old, replica(_ok) as new:
            await b.serves(route("e", b.port, old))
            request = asyncio.create_task(b.http.get(b.url))
            await arrived.wait()
            await b.manager.set(route("e", b.port, target(old, draining=True), new))
            await b.applied()
            for _ in range(10):
                assert await _status(b.http, b.url) == 200
            assert not b.manager.reports[-1].drained
            began = time.monotonic()
            release.set()
            response = await request
            assert await response.text() == "slow"
            await until(lambda: f"replica-{old}" in b.manager.reports[-1].drained)
            assert time.monotonic() - began < 0.5

    run(test)


def test_bind_failure_is_reported_and_recovers(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            with contextlib.closing(socket.socket()) as other:
                # Beside connections of an earlier test, which the system keeps for a minute.
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                other.bind(("127.0.0.1", b.port))
                other.listen(1)
                await b.manager.set(route("e", b.port, port), route("f", b.ports[1], port))
                failure = (await until(lambda: b.manager.reports and b.manager.reports[-1].bind_failures))[0]
                assert (failure.endpoint_uid, failure.port) == ("e", b.port)
                assert "in use" in failure.detail
                await listening(b.ports[1])
            await until(lambda: not b.manager.reports[-1].bind_failures, 3)
            assert await _status(b.http, b.url) == 200

    run(test)


def test_a_removed_endpoint_loses_its_port_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(route("e", b.port, port))
            reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
            await b.manager.remove("e")
            await b.applied()
            writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            assert b" 404 " in await reader.readline()
            writer.close()
            began = time.monotonic()
            while time.monotonic() - began < 2:
                try:
                    await exchange(b.port, b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
                except ConnectionRefusedError:
                    return
            raise AssertionError("the port is still open")

    run(test)


def test_a_snapshot_that_breaks_off_changes_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(route("e", b.port, port))
            half = pb.TableUpdate(table_id="table-9", snapshot=True, routes=[route("x", b.ports[1], port)])
            b.manager.first_pieces = [half]
            hellos = len(b.manager.hellos)
            await b.manager.stop()
            await b.manager.start()
            await until(lambda: len(b.manager.hellos) >= hellos + 2)
            assert b.manager.hellos[-1].table_id == "table-1"
            assert b.manager.hellos[-1].revision_number == b.manager.revision
            assert await _status(b.http, b.url) == 200

    run(test)


def test_an_update_that_makes_no_sense_is_refused_and_a_snapshot_asked_for(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(route("e", b.port, port))
            bad = pb.TableUpdate(
                table_id="table-1",
                revision_number=99,
                complete=True,
                routes=[route("x", b.ports[1], port), route("y", b.ports[1], port)],
            )
            b.manager.first_pieces = [bad]
            hellos = len(b.manager.hellos)
            await b.manager.stop()
            await b.manager.start()
            await until(lambda: len(b.manager.hellos) >= hellos + 2)
            assert b.manager.hellos[hellos + 1].table_id == ""
            assert await _status(b.http, b.url) == 200
            await b.serves(route("z", b.ports[1], port))

    run(test)


def test_a_silent_manager_is_left_and_found_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(route("e", b.port, port))
            hellos = len(b.manager.hellos)
            b.manager.speaks.clear()
            await until(lambda: len(b.manager.hellos) > hellos, 9)
            assert await _status(b.http, b.url) == 200
            b.manager.speaks.set()
            await b.serves(route("f", b.ports[1], port))

    run(test)


def test_serves_from_disk_without_a_manager(tmp_path: Path) -> None:
    async def test() -> None:
        async with replica(_ok) as port:
            async with bench(tmp_path) as b:
                await b.serves(route("e", b.port, port, public=False))
                table = b.proxy.home / "table.pb"
                await until(table.exists)
                headers = {"Authorization": f"Bearer {b.manager.token('e')}"}
                ports = (min(b.ports), max(b.ports))
                url = b.url
            async with proxy(tmp_path, free_port(), ports) as again, aiohttp.ClientSession() as http:
                await listening(b.port)
                assert await _status(http, url, headers=headers) == 200
                assert await _status(http, url) == 401
                ready = await again.readyz()
                assert ready["status"] == "ready"
                assert ready["manager_connected"] is False
                assert ready["table_revision_number"] == b.manager.revision
                assert ready["table_age_s"] >= 0
            table.write_bytes(table.read_bytes()[:-3])
            async with proxy(tmp_path, free_port(), ports) as broken:
                ready = await broken.readyz()
                assert ready["status"] != "ready"

    run(test)


def test_subdomains(tmp_path: Path) -> None:
    async def test() -> None:
        async def who(request: web.Request) -> web.Response:
            return web.Response(text=f"{request.headers['X-Forwarded-Host']}")

        front = free_port()
        async with bench(tmp_path, domain="apps.example.org", port=front) as b, replica(who) as port:
            await b.manager.set(route("e", 0, port, label="chat-abc123"), route("f", 0, label="idle-1"))
            await b.applied()
            await listening(front)
            assert b.manager.hellos[0].subdomains == pb.Subdomains(domain="apps.example.org", port=front)
            url = f"http://127.0.0.1:{front}/"
            for host, status in (
                ("chat-abc123.apps.example.org", 200),
                ("Chat-ABC123.Apps.Example.Org:8443", 200),
                ("chat-abc123.apps.example.org.", 200),
                ("idle-1.apps.example.org", 503),
                ("other.apps.example.org", 404),
                ("apps.example.org", 404),
                ("a.chat-abc123.apps.example.org", 404),
                ("chat-abc123.apps.example.com", 404),
                ("127.0.0.1", 404),
            ):
                assert await _status(b.http, url, headers={"Host": host}) == status, host

    run(test)


def test_metrics_count_and_forget(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, replica(_ok) as port:
            await b.serves(route("e", b.port, port), route("f", b.ports[1], public=False))
            for _ in range(3):
                assert await _status(b.http, b.url) == 200
            assert await _status(b.http, f"http://127.0.0.1:{b.ports[1]}") == 401
            text = await b.proxy.metrics()
            labels = 'project="default",endpoint="name-e",endpoint_uid="e"'
            assert f'dure_proxy_requests_total{{{labels},class="2xx"}} 3' in text
            assert f"dure_proxy_request_duration_seconds_count{{{labels}}} 3" in text
            assert f"dure_proxy_sent_bytes_total{{{labels}}} 6" in text
            assert f'replica_uid="replica-{port}",class="2xx"}} 3' in text
            assert 'endpoint_uid="f",code="token_missing"} 1' in text
            assert "dure_proxy_manager_connected 1" in text
            await b.manager.remove("f")
            await b.applied()
            assert 'endpoint_uid="f"' not in await b.proxy.metrics()

    run(test)
