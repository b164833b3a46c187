"""From nothing: a request to an endpoint at zero, until its answer. One at a time, and 25 endpoints at once.

The model needs 0.3 s of its own before it listens. Bounds: 1.5 s for one, 5 s for the slowest of 25.
Knative's own performance tests ask for a p95 of 2 s where 25 start at once, with images that are there.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from bench.world import cluster
from dure.client import Client
from dure.client.dev.cluster import DevCluster
from dure.v1 import endpoint_pb2, folder_pb2

ALONE, AT_ONCE = 8, 25
ALONE_BOUND_S, AT_ONCE_BOUND_S = 1.5, 5.0
OWN_START_S = 0.3
WAIT_MAX_S = 60.0
DEFINITION = """
models:
  - name: sleeper
    model_path: /models
    service:
      start_command: [python, -S, server.py, "{port}"]
      port: 8000
      health_check: {path: /health, interval: 0.1, initial_delay: 0, max_retries: 100}
"""
# Little to import: 25 interpreters share two cores, and their start is no merit or fault of ours.
SERVER = f"""
import socket, sys, time
time.sleep({OWN_START_S})
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=64)
while True:
    connection, _ = listener.accept()
    connection.settimeout(1)
    try:
        if connection.recv(65536):
            answer = b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok"
            connection.sendall(answer)
    except OSError:
        pass
    connection.close()
"""


async def asleep(client: Client, names: list[str]) -> dict[str, str]:
    """Endpoints at zero that a request wakes: address by name."""
    slots = {"cpu": "0.04", "mem": "32m"}
    made = {}
    for name in names:
        endpoint = await client.endpoints.create(
            name,
            model="sleeper",
            replicas=0,
            scale_to_zero_after=300,
            resource_slots=slots,
            open_to_public=True,
        )
        made[name] = endpoint.address
    waiting = set(names)
    async with asyncio.timeout(WAIT_MAX_S):
        async for batch in client.endpoints.watch():
            for endpoint in batch.endpoints:
                if endpoint.status == endpoint_pb2.ENDPOINT_STATUS_IDLE:
                    waiting.discard(endpoint.name.rpartition("/")[2])
            if not waiting:
                break
    return made


async def ask(session: aiohttp.ClientSession, address: str) -> float:
    """Seconds until the answer. It may take a moment until the proxy listens at a new address."""
    async with asyncio.timeout(WAIT_MAX_S):
        while True:
            began_s = time.monotonic()
            try:
                async with session.get(address) as response:
                    text = await response.text()
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.05)
                continue
            assert (response.status, text) == (200, "ok"), (response.status, text)
            return time.monotonic() - began_s


async def measure(running: DevCluster, source: Path) -> tuple[list[float], list[float]]:
    """Seconds of those woken one at a time, and of those woken at once."""
    async with (
        running.client() as client,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        await client.folders.create("sleeper", folder_pb2.FOLDER_USAGE_MODEL)
        await client.folders.upload("sleeper", source)
        alone = []
        for name, address in (await asleep(client, [f"one-{n}" for n in range(ALONE)])).items():
            alone.append(await ask(session, address))
            await client.endpoints.delete(name)
        addresses = await asleep(client, [f"many-{n}" for n in range(AT_ONCE)])
        at_once = await asyncio.gather(*(ask(session, address) for address in addresses.values()))
        return alone, at_once


async def run() -> tuple[list[float], list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        (source / "model-definition.yaml").write_text(DEFINITION)
        (source / "server.py").write_text(SERVER)
        async with cluster() as running:
            return await measure(running, source)


def main() -> None:
    alone, at_once = asyncio.run(run())
    print(f"waking: a request to an endpoint at zero, whose model takes {OWN_START_S:g} s to start")
    for label, found, bound_s in (
        ("one at a time", alone, ALONE_BOUND_S),
        ("all at once", at_once, AT_ONCE_BOUND_S),
    ):
        p95 = sorted(found)[max(0, round(len(found) * 0.95) - 1)]
        print(
            f"  {len(found):>2} {label:<14} median {statistics.median(found):.2f} s, p95 {p95:.2f} s, "
            f"worst {max(found):.2f} s; bound {bound_s:g} s: {'kept' if max(found) < bound_s else 'BROKEN'}"
        )
