"""Replicas come and go by what is measured, and every step explains itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from system.cluster import Cluster, load

from dure.client import Client
from dure.v1.endpoint_pb2 import Endpoint

SLOTS = {"cpu": "0.2", "mem": "96m"}
# Takes 50 ms for a request; shows how many it has under way, and what was set by PUT.
SERVER = """
import http.server, os, sys, threading, time
state = {"waiting": 0.0, "answered": 0}
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/health":
            return self.answer(b"ok")
        if self.path == "/metrics":
            lines = "# TYPE app:waiting gauge\\napp:waiting %s\\n" % state["waiting"]
            return self.answer(lines.encode())
        if self.path == "/burn":
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                pass
        else:
            time.sleep(0.05)
        self.answer(str(os.getpid()).encode())
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()
    def do_PUT(self):
        state["waiting"] = float(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(b"")
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
DEFINITION = """
models:
  - name: slow
    model_path: /models
    service:
      start_command: [python, -u, server.py, "{port}"]
      port: 8000
      health_check: {path: /health, interval: 0.2, initial_delay: 0, max_wait_time: 5.0, max_retries: 50}
"""


@pytest.fixture(scope="module", autouse=True)
def model(dure: Cluster) -> None:
    dure.model("slow", DEFINITION, SERVER)


def with_client(dure: Cluster, body: Callable[[Client], Any]) -> None:
    async def run() -> None:
        async with Client.from_context(dure.data_dir / "context.toml") as client:
            await body(client)

    asyncio.run(run())


async def seen(
    client: Client, name: str, condition: Callable[[Endpoint], bool], timeout_s: float
) -> Endpoint:
    newest = None
    try:
        async with asyncio.timeout(timeout_s):
            async for batch in client.endpoints.watch(name):
                for newest in batch.endpoints:
                    if condition(newest):
                        return newest
    except TimeoutError:
        found = await client.rules.explain(name)
        raise AssertionError(f"not within {timeout_s} s: {newest}\n{found}") from None
    raise AssertionError("a watch does not end")


async def created(client: Client, name: str, replicas: int = 1, **fields: Any) -> Endpoint:
    await client.endpoints.create(
        name, model="slow", replicas=replicas, resource_slots=SLOTS, open_to_public=True, **fields
    )
    return await client.endpoints.wait(name, timeout_s=60)


async def gone(client: Client, name: str) -> None:
    await client.endpoints.delete(name)
    await client.endpoints.wait_gone(name, timeout_s=60)


def test_a_load_scales_up_and_its_end_scales_down(dure: Cluster) -> None:
    async def body(client: Client) -> None:
        endpoint = await created(client, "loaded")
        limits = {"min_replicas": 1, "max_replicas": 3, "cooldown": 2}
        await client.rules.add(
            "loaded", "busy", source="proxy", metric="concurrency", above=3, step=1, **limits
        )
        await client.rules.add(
            "loaded", "calm", source="proxy", metric="concurrency", below=1, step=-1, window=3, **limits
        )
        async with load(endpoint.address, workers=12) as counts:
            grown = await seen(client, "loaded", lambda e: e.ready_replicas == 3, 45)
            assert (grown.replica_count, grown.desired_replicas) == (1, 3)
            await asyncio.sleep(1)
        assert set(counts) == {"200"}, counts
        await seen(client, "loaded", lambda e: e.desired_replicas == 1 and e.ready_replicas == 1, 45)
        found = await client.rules.explain("loaded")
        steps = [(d.from_replicas, d.to_replicas, d.cause) for d in reversed(found.decisions)]
        assert steps[:2] == [(1, 2, "busy"), (2, 3, "busy")]
        assert steps[-2:] == [(3, 2, "calm"), (2, 1, "calm")]
        times = [decision.time.ToMilliseconds() for decision in reversed(found.decisions)]
        assert times[1] - times[0] >= 2_000, "the cooldown was kept"
        assert all("concurrency is" in decision.reason for decision in found.decisions)
        await gone(client, "loaded")

    with_client(dure, body)


def test_what_is_idle_goes_to_zero_and_a_request_wakes_it(dure: Cluster) -> None:
    async def body(client: Client) -> None:
        endpoint = await created(client, "sleepy", scale_to_zero_after=3)
        idle = await seen(client, "sleepy", lambda e: e.status == 4 and not e.replicas, 40)
        assert (idle.desired_replicas, idle.replica_count) == (0, 1)
        async with aiohttp.ClientSession() as session:
            started = time.monotonic()
            answers = await asyncio.gather(*(_get(session, endpoint.address) for _ in range(20)))
            took_s = time.monotonic() - started
        assert {status for status, _ in answers} == {200}, answers
        assert took_s < 15, "held, not refused; how fast is a matter of `make bench`"
        found = await client.rules.explain("sleepy")
        assert [d.cause for d in reversed(found.decisions)][:2] == ["idle", "request"]
        # The user's zero is another one: nothing wakes it.
        await client.endpoints.update("sleepy", replicas=0)
        await seen(client, "sleepy", lambda e: e.status == 3 and not e.replicas, 40)
        async with aiohttp.ClientSession() as session:
            status, text = await _get(session, endpoint.address)
        assert (status, "stopped" in text) == (503, True)
        await gone(client, "sleepy")

    with_client(dure, body)


async def _get(session: aiohttp.ClientSession, address: str) -> tuple[int, str]:
    async with session.get(address, timeout=aiohttp.ClientTimeout(total=60)) as response:
        return response.status, await response.text()


def test_what_replicas_show_of_themselves_scales_them(dure: Cluster) -> None:
    async def body(client: Client) -> None:
        endpoint = await created(client, "shown")
        kept = await client.rules.add(
            "shown", source="inference-framework", metric="app:waiting", above=5, step=2, cooldown=1,
            max_replicas=3,
        )  # fmt: skip
        assert kept.warnings

        async def known() -> bool:
            found = await client.rules.explain("shown")
            return any(metric.name == "app:waiting" for metric in found.metrics)

        async with asyncio.timeout(15):
            while not await known():
                await asyncio.sleep(0.2)
        async with aiohttp.ClientSession() as session:
            async with session.put(endpoint.address, data=b"9") as response:
                assert response.status == 200
            await seen(client, "shown", lambda e: e.ready_replicas == 3, 30)
        (decision,) = (await client.rules.explain("shown")).decisions
        assert "app:waiting is 9, > 5: 1 -> 3" in decision.reason
        again = await client.rules.add(
            "shown", source="inference-framework", metric="app:waitin", above=5, step=1
        )
        assert "`app:waitin`" in again.warnings[0] and "app:waiting" in again.warnings[0]
        await gone(client, "shown")

    with_client(dure, body)


def test_what_kernels_use_scales_them(dure: Cluster) -> None:
    async def body(client: Client) -> None:
        endpoint = await created(client, "hot")
        await client.rules.add(
            "hot", source="kernel", metric="cpu_util", above=40, step=1, max_replicas=2, cooldown=1
        )
        async with aiohttp.ClientSession() as session:
            stop = asyncio.Event()

            async def burn() -> None:
                while not stop.is_set():
                    await _get(session, f"{endpoint.address}/burn")

            burning = [asyncio.create_task(burn()) for _ in range(2)]
            try:
                await seen(client, "hot", lambda e: e.desired_replicas == 2, 40)
            finally:
                stop.set()
                await asyncio.gather(*burning)
        (decision,) = (await client.rules.explain("hot")).decisions
        assert "cpu_util is" in decision.reason
        await gone(client, "hot")

    with_client(dure, body)
