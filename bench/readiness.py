"""From a replica's first successful probe to the first request that the proxy forwards to it.

The model server tells when it first answered a probe (CLOCK_MONOTONIC is one for the whole machine); a
client asks the address every few milliseconds for the first answer. Bound: 1 second.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from bench.world import cluster
from dure.client import Client
from dure.client.dev.cluster import DevCluster
from dure.v1 import folder_pb2

ROUNDS = 20
BOUND_S = 1.0
DEFINITION = """
models:
  - name: clock
    model_path: /models
    service:
      start_command: [python, server.py, "{port}"]
      port: 8000
      health_check: {path: /health, interval: 0.1, initial_delay: 0}
"""
SERVER = """
import http.server, sys, time
probed = []
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path == "/health":
            probed.append(time.monotonic())
        body = str(probed[0] if probed else 0).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


async def measure(cluster: DevCluster, source: Path) -> list[float]:
    """Seconds of each round."""
    async with cluster.client() as client, aiohttp.ClientSession() as session:
        await client.folders.create("clock", folder_pb2.FOLDER_USAGE_MODEL)
        await client.folders.upload("clock", source)
        return [await one_round(client, session, f"clock-{number}") for number in range(ROUNDS)]


async def one_round(client: Client, session: aiohttp.ClientSession, name: str) -> float:
    slots = {"cpu": "0.2", "mem": "64m", "cuda.shares": "0.1"}
    endpoint = await client.endpoints.create(
        name, model="clock", replicas=1, resource_slots=slots, open_to_public=True
    )
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(endpoint.address) as response:
                    answered = time.monotonic()
                    if response.status == 200:
                        probed = float(await response.text())
                        break
            await asyncio.sleep(0.002)
    await client.endpoints.delete(name)
    return answered - probed


async def run() -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        (source / "model-definition.yaml").write_text(DEFINITION)
        (source / "server.py").write_text(SERVER)
        async with cluster() as running:
            return await measure(running, source)


def main() -> None:
    found = sorted(asyncio.run(run()))
    p95 = found[int(len(found) * 0.95) - 1]
    print(f"readiness: first successful probe to first forwarded request, {len(found)} rounds")
    median, worst = statistics.median(found), found[-1]
    print(f"  median {median * 1000:.0f} ms, p95 {p95 * 1000:.0f} ms, worst {worst * 1000:.0f} ms")
    print(f"  bound {BOUND_S * 1000:.0f} ms: {'kept' if worst < BOUND_S else 'BROKEN'}")
