"""From a load that crosses a rule's threshold to the rule's firing, and on to traffic at the new replica.

Intervals are the default ones. Bounds: 2 s until it fires; 3 s more than the model's own start until the new
replica takes traffic.
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
from dure.v1 import folder_pb2
from dure.v1.endpoint_pb2 import Endpoint

ROUNDS, CALLERS = 15, 12
OWN_START_S = 0.3
FIRE_BOUND_S, TRAFFIC_BOUND_S = 2.0, 3.0 + OWN_START_S
DEFINITION = """
models:
  - name: firing
    model_path: /models
    service:
      start_command: [python, -S, server.py, "{port}"]
      port: 8000
      health_check: {path: /health, interval: 0.1, initial_delay: 0, max_retries: 100}
"""
SERVER = f"""
import asyncio, os, sys, time
time.sleep({OWN_START_S})
class Service(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        delay = 0 if data.startswith(b"GET /health") else 0.1
        asyncio.get_running_loop().call_later(delay, self.answer)
    def answer(self):
        body = str(os.getpid()).encode()
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
async def main():
    server = await asyncio.get_running_loop().create_server(Service, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()
asyncio.run(main())
"""


async def until(client: Client, desired: int, ready: int) -> Endpoint:
    async with asyncio.timeout(60):
        async for batch in client.endpoints.watch("firing"):
            for endpoint in batch.endpoints:
                if endpoint.desired_replicas == desired and endpoint.ready_replicas == ready:
                    return endpoint
    raise AssertionError("a watch does not end")


async def one_round(client: Client, session: aiohttp.ClientSession, address: str) -> tuple[float, float]:
    """Seconds until the rule fired, and until two replicas answered."""
    seen: set[str] = set()
    stop = asyncio.Event()
    both = asyncio.Event()

    async def call() -> None:
        while not stop.is_set():
            async with session.get(address) as response:
                seen.add(await response.text())
            if len(seen) == 2:
                both.set()

    started = time.monotonic()
    calling = [asyncio.create_task(call()) for _ in range(CALLERS)]
    try:
        async with asyncio.timeout(60):
            async for batch in client.endpoints.watch("firing"):
                if any(endpoint.desired_replicas == 2 for endpoint in batch.endpoints):
                    break
            fired = time.monotonic() - started
            await both.wait()
        return fired, time.monotonic() - started
    finally:
        stop.set()
        await asyncio.gather(*calling)


async def run() -> list[tuple[float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        (source / "model-definition.yaml").write_text(DEFINITION)
        (source / "server.py").write_text(SERVER)
        async with cluster() as running, running.client() as client, aiohttp.ClientSession() as session:
            await client.folders.create("firing", folder_pb2.FOLDER_USAGE_MODEL)
            await client.folders.upload("firing", source)
            slots = {"cpu": "0.2", "mem": "64m"}
            endpoint = await client.endpoints.create(
                "firing", model="firing", replicas=1, resource_slots=slots, open_to_public=True
            )
            await client.endpoints.wait("firing", timeout_s=60)
            await client.rules.add(
                "firing", source="proxy", metric="concurrency", above=5, step=1, max_replicas=2, cooldown=0
            )
            found = []
            for _ in range(ROUNDS):
                await asyncio.sleep(3)
                found.append(await one_round(client, session, endpoint.address))
                # The user's word, and another one than before, resets what the rule has made of it.
                await client.endpoints.update("firing", replicas=2)
                await client.endpoints.update("firing", replicas=1)
                await until(client, 1, 1)
            return found


def main() -> None:
    found = asyncio.run(run())
    print(f"firing: a load crosses a rule's threshold, {len(found)} rounds, default intervals")
    for what, times, bound in (
        ("rule fired", sorted(fired for fired, _ in found), FIRE_BOUND_S),
        ("new replica has traffic", sorted(taken for _, taken in found), TRAFFIC_BOUND_S),
    ):
        median, worst = statistics.median(times), times[-1]
        kept = "kept" if worst < bound else "BROKEN"
        print(f"  {what}: median {median:.2f} s, worst {worst:.2f} s; bound {bound:.1f} s: {kept}")


if __name__ == "__main__":
    main()
