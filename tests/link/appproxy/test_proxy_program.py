"""`dure proxy` as a program: settings, signals, a kill."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import tomli
from aiohttp import web
from otlp_receiver import receiver
from own_ports import free_ports
from proxy_fakes import (
    JOIN_TOKEN,
    FakeManager,
    listening,
    read_head,
    replica,
    route,
    run_programs,
    until,
)

_PROGRAM = "from dure.appproxy.main import main; main()"


async def _start(*arguments: str, **environment: str) -> asyncio.subprocess.Process:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DURE_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PROGRAM,
        *arguments,
        env=kept | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def _fails(*arguments: str, **environment: str) -> str:
    process = await _start(*arguments, **environment)
    try:
        async with asyncio.timeout(15):
            _, stderr = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    assert process.returncode, "it ran"
    text = stderr.decode()
    assert "Traceback" not in text
    return text


@contextlib.asynccontextmanager
async def _running(*arguments: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await _start(*arguments, **environment)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def test_settings_are_recorded_and_a_killed_proxy_serves_from_disk(tmp_path: Path) -> None:
    async def ok(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def test() -> None:
        port, other = free_ports(2)
        manager = FakeManager()
        await manager.start()
        data = ("--data-dir", str(tmp_path))
        home = tmp_path / "proxies" / "edge"
        async with replica(ok) as target, aiohttp.ClientSession() as http:
            await manager.set(route("e", port, target))
            async with _running(
                *("--name", "edge", *data, "--manager", f"127.0.0.1:{manager.port}"),
                *("--ports", f"{min(port, other)}-{max(port, other)}", "--admin-port", "0"),
                DURE_JOIN_TOKEN=JOIN_TOKEN,
                DURE_QUEUE_SIZE="7",
            ) as process:
                await listening(port)
                await until((home / "table.pb").exists)
                assert int((tmp_path / "run" / "edge.pid").read_text()) == process.pid
                assert "already runs" in await _fails(*data)
                process.send_signal(signal.SIGKILL)
                await process.wait()
            recorded = tomli.loads((home / "settings.toml").read_text())
            assert recorded["queue_size"] == 7
            assert recorded["admin_port"] > 0
            assert "join_token" not in recorded
            assert (home / "identity.toml").stat().st_mode & 0o777 == 0o600
            await manager.stop()
            async with _running(*data) as process:
                await listening(port)
                async with http.get(f"http://127.0.0.1:{port}") as response:
                    assert await response.text() == "ok"
                async with http.get(f"http://127.0.0.1:{recorded['admin_port']}/readyz") as response:
                    assert (await response.json())["manager_connected"] is False
                # It finds the manager as soon as it is back.
                manager.hellos.clear()
                await manager.start()
                await until(lambda: manager.hellos, 3)
                assert manager.hellos[0].table_id == "table-1"
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(3):
                    await process.wait()
                assert process.returncode == 0
            assert not (tmp_path / "run" / "edge.pid").exists()
        await manager.stop()

    run_programs(test)


def test_a_signal_drains_and_a_second_one_does_not(tmp_path: Path) -> None:
    async def test() -> None:
        release, arrived = asyncio.Event(), asyncio.Semaphore(0)

        async def slow(request: web.Request) -> web.Response:
            arrived.release()
            await release.wait()
            return web.Response(text="in time")

        port, other = free_ports(2)
        manager = FakeManager()
        await manager.start()
        arguments = (
            "--data-dir",
            str(tmp_path),
            "--manager",
            f"127.0.0.1:{manager.port}",
            "--admin-port",
            "0",
        )
        arguments += ("--ports", f"{min(port, other)}-{max(port, other)}", "--join-token", JOIN_TOKEN)
        async with replica(slow) as target:
            await manager.set(route("e", port, target))
            for signals in (1, 2):
                async with _running(*arguments) as process:
                    await listening(port)
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                    await arrived.acquire()
                    process.send_signal(signal.SIGTERM)
                    while True:
                        with contextlib.closing(socket.socket()) as sock:
                            if sock.connect_ex(("127.0.0.1", port)):
                                break
                        await asyncio.sleep(0.01)
                    assert process.returncode is None
                    if signals == 1:
                        release.set()
                        head = await read_head(reader)
                        assert head.startswith(b"HTTP/1.1 200")
                        assert b"Connection: close" in head
                        release.clear()
                    else:
                        process.send_signal(signal.SIGINT)
                    async with asyncio.timeout(3):
                        await process.wait()
                    assert process.returncode == 0
                    writer.close()
            release.set()
        await manager.stop()

    run_programs(test)


def test_bad_settings_say_what_to_do(tmp_path: Path) -> None:
    async def test() -> None:
        data = ("--data-dir", str(tmp_path), "--join-token", "x")
        assert "--join-token" in await _fails("--data-dir", str(tmp_path))
        assert "--insecure" in await _fails(*data, "--bind", "0.0.0.0")
        assert "range of ports" in await _fails(*data, "--ports", "7200-7100")
        assert "not an IP address" in await _fails(*data, "--bind", "example.org")
        assert "is not a name" in await _fails(*data, "--name", "A b")
        assert "HOST:PORT" in await _fails(*data, "--manager", "localhost")
        assert "exclude each other" in await _fails(*data, "--ports", "7100-7101", "--domain", "a.b")
        with contextlib.closing(socket.socket()) as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(1)
            held = str(sock.getsockname()[1])
            assert "--admin-port" in await _fails(*data, "--admin-port", held)
        for name in ("a", "b"):
            (tmp_path / "proxies" / name).mkdir(parents=True)
            (tmp_path / "proxies" / name / "settings.toml").write_text("")
        assert "choose one with --name (a, b)" in await _fails(*data)

    run_programs(test, 60)


def test_a_refused_join_token_ends_the_program(tmp_path: Path) -> None:
    async def test() -> None:
        manager = FakeManager()
        await manager.start()
        first, second = sorted(free_ports(2))
        text = await _fails(
            *("--data-dir", str(tmp_path), "--join-token", "wrong", "--admin-port", "0"),
            *("--manager", f"127.0.0.1:{manager.port}", "--ports", f"{first}-{second}"),
        )
        assert "unknown join token" in text
        await manager.stop()

    run_programs(test)


def test_forwards_are_traced_within_the_clients_trace(tmp_path: Path) -> None:
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    seen: list[dict[str, str]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(dict(request.headers))
        return web.Response(status=500 if request.path == "/fails" else 200)

    async def test() -> None:
        port, other = free_ports(2)
        manager = FakeManager()
        await manager.start()
        try:
            async with receiver() as received, replica(handler) as target, aiohttp.ClientSession() as http:
                await manager.set(route("e", port, target))
                async with _running(
                    *("--data-dir", str(tmp_path), "--manager", f"127.0.0.1:{manager.port}"),
                    *("--ports", f"{min(port, other)}-{max(port, other)}", "--admin-port", "0"),
                    DURE_JOIN_TOKEN=JOIN_TOKEN,
                    **received.environ,
                ) as process:
                    await listening(port)
                    url = f"http://127.0.0.1:{port}"
                    headers = {"traceparent": f"00-{trace}-{caller}-01", "tracestate": "vendor=1"}
                    async with http.get(url + "/mine", headers=headers) as response:
                        assert response.status == 200
                    mine = await received.span(lambda span: span.trace == trace)
                    assert (mine.program, mine.name, mine.parent) == ("dure-proxy", "forward", caller)
                    assert mine.attributes["dure.endpoint"] == "name-e"
                    assert mine.attributes["dure.replica_uid"] == f"replica-{target}"
                    assert mine.attributes["http.response.status_code"] == 200 and not mine.failed
                    # The replica's part of the trace hangs below the proxy's.
                    assert seen[0]["traceparent"] == f"00-{trace}-{mine.id}-01"
                    assert seen[0]["tracestate"] == "vendor=1"
                    async with http.get(url + "/fails", headers={"traceparent": "00-what-ever"}) as response:
                        assert response.status == 500
                    failed = await received.span(lambda span: span.failed)
                    assert not failed.parent and failed.trace != trace
                    assert seen[1]["traceparent"].startswith(f"00-{failed.trace}-{failed.id}-")
                    process.send_signal(signal.SIGTERM)
                    async with asyncio.timeout(10):
                        assert await process.wait() == 0
        finally:
            await manager.stop()

    run_programs(test)
