"""A step from nothing to 1,000 requests/s on a service of 50 ms that is at zero, with a rule on concurrency.

Open loop: a request is sent every millisecond, however many still wait for their answer. Printed beside
what Knative's own performance tests demand for the same step: no errors, a p95 of at most 115 ms once
warm, and 10 s for the slowest.
"""

from __future__ import annotations

import asyncio
import collections
import tempfile
import time
from pathlib import Path

import aiohttp

from bench.world import cluster
from dure.client import Client
from dure.client.dev.cluster import DevCluster
from dure.v1 import endpoint_pb2, folder_pb2

# Answers by kind; when each that was good was sent and how long it took; replicas in the end.
Found = tuple[collections.Counter[str], list[tuple[float, float]], int]
RATE_PER_S, SECONDS, WARM_S = 1_000, 20, 10
KNATIVE_P95_MS, KNATIVE_WORST_S = 115, 10
DEFINITION = """
models:
  - name: step
    model_path: /models
    service:
      start_command: [python, server.py, "{port}"]
      port: 8000
      health_check: {path: /health, interval: 0.1, initial_delay: 0, max_retries: 100}
"""
# As little as answers after 50 ms, so that the machine's two cores are left to what is measured.
SERVER = """
import asyncio, sys
class Service(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        delay = 0 if data.startswith(b"GET /health") else 0.05
        asyncio.get_running_loop().call_later(delay, self.answer)
    def answer(self):
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
async def main():
    loop, port = asyncio.get_running_loop(), int(sys.argv[1])
    server = await loop.create_server(Service, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()
asyncio.run(main())
"""


async def step(client: Client) -> Found:
    endpoint = await client.endpoints.create(
        "step",
        model="step",
        replicas=0,
        scale_to_zero_after=300,
        resource_slots={"cpu": "0.2", "mem": "64m"},
        open_to_public=True,
    )
    limits = {"min_replicas": 1, "max_replicas": 4, "cooldown": 3}
    await client.rules.add("step", "busy", source="proxy", metric="concurrency", above=40, step=1, **limits)
    async for batch in client.endpoints.watch("step"):
        if any(found.status == endpoint_pb2.ENDPOINT_STATUS_IDLE for found in batch.endpoints):
            break
    counts: collections.Counter[str] = collections.Counter()
    times: list[tuple[float, float]] = []

    async def send(session: aiohttp.ClientSession, at_s: float) -> None:
        started = time.perf_counter()
        try:
            async with session.get(endpoint.address) as response:
                await response.read()
                counts[str(response.status)] += 1
                if response.status == 200:
                    times.append((at_s, time.perf_counter() - started))
        except (aiohttp.ClientError, TimeoutError) as error:
            counts[type(error).__name__] += 1

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        begun = time.perf_counter()
        sent: set[asyncio.Task[None]] = set()
        for number in range(RATE_PER_S * SECONDS):
            at_s = number / RATE_PER_S
            left_s = begun + at_s - time.perf_counter()
            if left_s > 0:
                await asyncio.sleep(left_s)
            task = asyncio.create_task(send(session, at_s))
            sent.add(task)
            task.add_done_callback(sent.discard)
        await asyncio.gather(*sent)
    most = (await client.endpoints.get("step")).desired_replicas
    await client.endpoints.delete("step")
    return counts, times, most


async def measure(running: DevCluster, source: Path) -> Found:
    async with running.client() as client:
        await client.folders.create("step", folder_pb2.FOLDER_USAGE_MODEL)
        await client.folders.upload("step", source)
        return await step(client)


async def run() -> Found:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        (source / "model-definition.yaml").write_text(DEFINITION)
        (source / "server.py").write_text(SERVER)
        async with cluster() as running:
            return await measure(running, source)


def main() -> None:
    counts, times, most = asyncio.run(run())
    first = min(times)[1]
    warm = sorted(took for at_s, took in times if at_s >= WARM_S)
    p95_ms, worst_s = warm[int(len(warm) * 0.95)] * 1000, max(took for _, took in times)
    failed = sum(count for kind, count in counts.items() if kind != "200")
    print(f"stepload: 0 -> {RATE_PER_S} requests/s for {SECONDS} s on a 50 ms service that is at zero")
    print(f"  failed {failed} of {sum(counts.values())} {dict(counts)}; up to {most} replica(s)")
    print(f"  first answer after {first:.2f} s; slowest {worst_s:.2f} s (Knative's gate {KNATIVE_WORST_S} s)")
    print(f"  p95 once warm ({WARM_S} s) {p95_ms:.0f} ms (Knative's gate {KNATIVE_P95_MS} ms)")
    kept = not failed and p95_ms <= KNATIVE_P95_MS and worst_s <= KNATIVE_WORST_S
    print(f"  bounds: {'kept' if kept else 'BROKEN'}")


if __name__ == "__main__":
    main()
