"""Small requests through the proxy, beside a plain aiohttp reverse proxy in the same run.

POST of 1 KB with a token over keep-alive connections, in interleaved rounds. CPU time per request is the
steadiest figure; requests per second depend on what else the machine does.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from bench.world import cluster, cpu_s
from dure.client.dev.cluster import DevCluster
from dure.v1 import folder_pb2

ROUNDS, ROUND_S, CONNECTIONS = 4, 2.0, 32
DEFINITION = """
models:
  - name: echo
    model_path: /models
    service:
      start_command: [python, server.py, "{port}"]
      port: 8000
"""
# Answers any request whose head and 1 KB body have come; nothing cheaper can be written in Python.
SERVER = """
import asyncio, sys
import uvloop
HEAD = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: 14\\r\\n\\r\\n"
ANSWER = HEAD + b'{"answer": 42}'
class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.data = transport, b""
    def data_received(self, data):
        self.data += data
        while (end := self.data.find(b"\\r\\n\\r\\n")) >= 0:
            length = 1024 if self.data[:4] == b"POST" else 0
            if len(self.data) < end + 4 + length:
                return
            self.data = self.data[end + 4 + length:]
            self.transport.write(ANSWER)
async def main():
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()
uvloop.run(main())
"""


async def load(host: str, port: int, token: str, seconds: float) -> int:
    """Answers got in so many seconds."""
    head = (
        f"POST /v1/echo HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {token}\r\n"
        "User-Agent: bench\r\nAccept: */*\r\nContent-Type: application/json\r\n"
        "X-Request-Id: bench-request-1\r\nContent-Length: 1024\r\n\r\n"
    ).encode()
    request = head + b"x" * 1024
    end = time.monotonic() + seconds

    async def connection() -> int:
        reader, writer = await asyncio.open_connection(host, port)
        count = 0
        try:
            while time.monotonic() < end:
                writer.write(request)
                answer = await reader.readuntil(b"}")
                assert b" 200 " in answer[:20], answer[:200]
                count += 1
        finally:
            writer.close()
        return count

    return sum(await asyncio.gather(*(connection() for _ in range(CONNECTIONS))))


async def measure(running: DevCluster, source: Path) -> dict[str, list[tuple[float, float]]]:
    """Per contestant: (requests per second, CPU microseconds per request) of each round."""
    async with running.client() as client:
        await client.folders.create("echo", folder_pb2.FOLDER_USAGE_MODEL)
        await client.folders.upload("echo", source)
        slots = {"cpu": "1", "mem": "256m"}
        await client.endpoints.create("echo", model="echo", resource_slots=slots)
        endpoint = await client.endpoints.wait("echo", timeout_s=60)
        token = (await client.tokens.create("echo", timedelta(hours=1))).secret
    target = (await _target(running)).split(":")
    address = urlsplit(endpoint.address)
    assert address.hostname and address.port
    peer = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.peer", f"http://{target[0]}:{target[1]}", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert peer.stdout is not None
        peer_port = int(await peer.stdout.readline())
        proxy_pid = int((running.plan.data_dir / "run" / "proxy-1.pid").read_text())
        contestants = {
            "dure proxy": (address.hostname, address.port, proxy_pid),
            "aiohttp": ("127.0.0.1", peer_port, peer.pid),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, (host, port, pid) in contestants.items():
                before = cpu_s(pid)
                count = await load(host, port, token, ROUND_S)
                found[name].append((count / ROUND_S, (cpu_s(pid) - before) / count * 1e6))
        return found
    finally:
        peer.terminate()
        await peer.wait()


async def _target(running: DevCluster) -> str:
    async with running.client() as client:
        return (await client.endpoints.get("echo")).replicas[0].target


async def run() -> dict[str, list[tuple[float, float]]]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        (source / "model-definition.yaml").write_text(DEFINITION)
        (source / "server.py").write_text(SERVER)
        async with cluster() as running:
            return await measure(running, source)


def main() -> None:
    found = asyncio.run(run())
    print(f"forwarding: POST 1 KB with a token, {CONNECTIONS} connections, {ROUNDS} rounds, medians")
    medians = {
        name: tuple(statistics.median(figures) for figures in zip(*rounds, strict=True))
        for name, rounds in found.items()
    }
    for name, (rate, cpu_us) in medians.items():
        print(f"  {name:<12} {rate:8.0f} req/s {cpu_us:8.0f} us CPU per request")
    (rate, cpu_us), (peer_rate, peer_cpu_us) = medians.values()
    print(
        f"  ratio to aiohttp: {rate / peer_rate:.2f} in req/s, {cpu_us / peer_cpu_us:.2f} in CPU per request"
    )
