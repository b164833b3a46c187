"""Sessions of several kernels: a small distributed job that finds its members by their names.

Every kernel runs the same program. The subs connect to `main1` at the rendezvous port and serve sums over
their part of the numbers on a port of their own, which main1 reaches by the sub's name; main1 adds them
up for each request.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from typing import Any

import pytest
from system.cluster import Cluster, until

from dure.client import Client
from dure.v1.endpoint_pb2 import Endpoint

PROGRAM = """
import http.server, json, os, socket, sys, threading, time
size = int(os.environ["BACKENDAI_CLUSTER_SIZE"])
role, host = os.environ["BACKENDAI_CLUSTER_ROLE"], os.environ["BACKENDAI_CLUSTER_HOST"]
hosts = os.environ["BACKENDAI_CLUSTER_HOSTS"].split(",")
rank = hosts.index(host)
part = sum(range(rank, 1000, size))
main = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
keys = sorted(os.listdir(os.path.expanduser("~/.ssh")))
public = open(os.path.expanduser("~/.ssh/id_ed25519.pub")).read().split()[1]
facts = {"host": host, "rank": int(os.environ["RANK"]), "resolved": [socket.gethostbyname(h) for h in hosts],
         "public": public, "keys": keys}
if role == "sub":
    with socket.create_server(("", 0)) as server:
        while True:
            try:
                meeting = socket.create_connection(main, timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        meeting.sendall(json.dumps({**facts, "port": server.getsockname()[1]}).encode() + b"\\n")
        while True:
            asked, _ = server.accept()
            with asked:
                asked.sendall(str(part).encode())
members = {}
def meet():
    with socket.create_server(("", main[1])) as server:
        while True:
            member, _ = server.accept()
            found = json.loads(member.makefile().readline())
            members[found["host"]] = found
threading.Thread(target=meet, daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ready = len(members) == size - 1
        total = part
        for name, member in sorted(members.items()):
            with socket.create_connection((name, member["port"]), timeout=5) as link:
                total += int(link.recv(100))
        body = json.dumps({"sum": total, "main": facts, "members": members}).encode()
        self.send_response(200 if ready else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
print("main1 waits for", size - 1, "members", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""
DEFINITION = """
models:
  - name: sums
    model_path: /models
    service:
      start_command: [python, -u, server.py, "{port}"]
      port: 8000
      health_check: {path: /, interval: 0.3, initial_delay: 0, max_wait_time: 5.0, max_retries: 100}
"""


@pytest.fixture(scope="module", autouse=True)
def model(dure: Cluster) -> None:
    dure.model("sums", DEFINITION, PROGRAM)


def run(dure: Cluster, name: str, mode: str, size: int) -> Endpoint:
    async def serve() -> Endpoint:
        async with Client.from_context(dure.data_dir / "context.toml") as client:
            await client.endpoints.create(
                name,
                model="sums",
                replicas=1,
                resource_slots={"cpu": "0.1", "mem": "64m"},
                cluster_mode=mode,  # type: ignore[typeddict-item]
                cluster_size=size,
                open_to_public=True,
            )
            return await client.endpoints.wait(name, timeout_s=60)

    return asyncio.run(serve())


def answer(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(address, timeout=10) as response:
        return dict(json.load(response))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="names of kernels need mount namespaces, here made as root")
@pytest.mark.parametrize("mode", ["single-node", "multi-node"])
def test_a_distributed_job_finds_its_members(dure: Cluster, mode: str) -> None:
    endpoint = run(dure, f"sums-{mode}", mode, 3)
    (replica,) = endpoint.replicas
    assert [kernel.host for kernel in replica.kernels] == ["main1", "sub1", "sub2"]
    nodes = {kernel.node for kernel in replica.kernels}
    assert len(nodes) == (1 if mode == "single-node" else 2)
    found = answer(endpoint.address)
    assert found["sum"] == sum(range(1000))
    members = [found["main"], *found["members"].values()]
    assert sorted(member["rank"] for member in members) == [0, 1, 2]
    assert len({member["public"] for member in members}) == 1, "one key pair for the whole session"
    assert {"authorized_keys", "id_ed25519", "id_ed25519.pub"} <= set(found["main"]["keys"])

    # One kernel that dies takes its session with it; a whole new one comes.
    sub = next(kernel for kernel in replica.kernels if kernel.host == "sub1")
    os.kill(sub.pid, signal.SIGKILL)

    def replaced() -> bool:
        now = dure.get(f"sums-{mode}")
        return now["status"] == "HEALTHY" and [r["uid"] for r in now["replicas"]] != [replica.uid]

    until(replaced, 40, "the session is replaced as a whole")
    assert answer(endpoint.address)["sum"] == sum(range(1000))
    events = dure.dure("endpoint", "events", f"sums-{mode}", "-o", "json")
    assert f"kernel sub1 on {sub.node}: its main process was ended by SIGKILL" in events, events
    for kernel in replica.kernels:
        until(lambda pid=kernel.pid: not os.path.exists(f"/proc/{pid}"), 20, "all kernels of it are gone")
    dure.dure("endpoint", "delete", f"sums-{mode}", "--wait")


def test_a_gang_that_does_not_fit_as_a_whole_is_not_placed_at_all(dure: Cluster) -> None:
    async def create() -> str:
        async with Client.from_context(dure.data_dir / "context.toml") as client:
            agents = [agent async for agent in client.agents.list()]
            cpu = max(float(slot.capacity) for agent in agents for slot in agent.slots if slot.slot == "cpu")
            await client.endpoints.create(
                "too-many",
                model="sums",
                replicas=1,
                # Two of them fit on two nodes, three do not.
                resource_slots={"cpu": f"{cpu * 0.6:.2f}", "mem": "64m"},
                cluster_mode="multi-node",
                cluster_size=3,
            )
            async for batch in client.endpoints.watch("too-many"):
                for endpoint in batch.endpoints:
                    if "found a place" in endpoint.status_reason:
                        assert not any(replica.kernels for replica in endpoint.replicas)
                        return endpoint.status_reason
        raise AssertionError("a watch does not end")

    assert "only 2 of its 3 kernels found a place" in asyncio.run(asyncio.wait_for(create(), 30))
    dure.dure("endpoint", "delete", "too-many", "--wait")
