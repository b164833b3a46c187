"""Sessions of several kernels: names, variables, keys, rendezvous, on real processes."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import aiohttp
import pytest
from agent_fakes import cluster, spec
from own_ports import free_port
from test_agent_node import POOR, root_only, usable

from dure.fleet.v1 import fleet_pb2

# Distributed in earnest: the subs bring their rank to main1 over the names, and main1 serves the sum.
JOB = """
import http.server, json, os, socket, sys, time
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if rank:
    while True:
        try:
            peer = socket.create_connection(where, timeout=5)
            break
        except OSError:
            time.sleep(0.05)
    peer.sendall(f"{rank} {os.environ['BACKENDAI_CLUSTER_HOST']}\\n".encode())
    print("met", peer.makefile().readline().strip(), flush=True)
    time.sleep(3600)
meeting = socket.create_server(("0.0.0.0", where[1]))
ranks = {0: "main1"}
while len(ranks) < world:
    peer, _ = meeting.accept()
    number, name = peer.makefile().readline().split()
    ranks[int(number)] = name
    peer.sendall(b"main1\\n")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(ranks).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"""
KEYS = fleet_pb2.SshKeyPair(
    private_key="-----BEGIN OPENSSH PRIVATE KEY-----\nx\n-----END OPENSSH PRIVATE KEY-----",
    public_key="ssh-ed25519 AAAA session",
)


def session(name: str, size: int, port: int, command, addresses=None, **fields) -> list[fleet_pb2.KernelSpec]:
    hosts = ["main1", *(f"sub{index}" for index in range(1, size))]
    specs = []
    for rank, host in enumerate(hosts):
        kernel = spec(
            f"{name}-{host}",
            command,
            health_check=None,
            ssh_keys=KEYS,
            cluster=fleet_pb2.Cluster(
                role=host[:-1],
                index=int(host[-1]),
                size=size,
                hosts=hosts,
                addresses=addresses or ["127.0.0.1"] * size,
                rendezvous_port=port,
                local_rank=rank,
            ),
            **fields,
        )
        kernel.session_uid = name
        specs.append(kernel)
    return specs


@root_only
def test_a_distributed_job_meets_over_the_names(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            (manager.storage / "folder-1" / "job.py").write_text(JOB)
            addresses = ["localhost", "127.0.0.1", "127.0.0.1"]
            manager.want(*session("s", 3, free_port(), ["python", "job.py"], addresses))
            status = await manager.healthy("s-main1")
            async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{status.port}/") as reply:
                assert await reply.json(content_type=None) == {"0": "main1", "1": "sub1", "2": "sub2"}
            for name in ("s-sub1", "s-sub2"):
                sub = await manager.status(name, lambda s: s.phase == fleet_pb2.KERNEL_PHASE_RUNNING)
                # Running is all that is asked of it: nobody tries its port.
                assert sub.health == fleet_pb2.KERNEL_HEALTH_UNSPECIFIED and sub.probe_detail == ""
                assert sub.port not in (0, status.port)
                assert await manager.log_of(name, tail_lines=1) == ["met main1"]

    asyncio.run(run())


@root_only
def test_names_variables_and_keys(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            show = (
                "env | grep -E '^(BACKENDAI_CLUSTER|MASTER|WORLD|RANK|LOCAL)' | sort; cd; "
                "stat -c '%a %n' .ssh .ssh/*; cat .ssh/authorized_keys; "
                "getent hosts main1 sub1 localhost; touch /etc/hosts; cat .ssh/config"
            )
            port = free_port()
            addresses = ["127.0.0.1", "10.9.8.7"]
            manager.want(*session("s", 2, port, f"{show}; exit 0", addresses), spec("alone", show))
            await manager.exited("s-sub1")
            log = "\n".join(await manager.log_of("s-sub1"))
            for line in (
                *("BACKENDAI_CLUSTER_HOST=sub1", "BACKENDAI_CLUSTER_HOSTS=main1,sub1"),
                *("BACKENDAI_CLUSTER_IDX=1", "BACKENDAI_CLUSTER_LOCAL_RANK=1"),
                *("BACKENDAI_CLUSTER_REPLICAS=main:1,sub:1", "BACKENDAI_CLUSTER_ROLE=sub"),
                *("BACKENDAI_CLUSTER_SIZE=2", "LOCAL_RANK=1", "MASTER_ADDR=main1", f"MASTER_PORT={port}"),
                *("RANK=1", "WORLD_SIZE=2", "700 .ssh", "600 .ssh/id_ed25519", "644 .ssh/id_ed25519.pub"),
                *("600 .ssh/authorized_keys", "ssh-ed25519 AAAA session", "Host main1 sub1"),
                *("    StrictHostKeyChecking accept-new",),
            ):
                assert f"\n{line}\n" in f"\n{log}\n", (line, log)
            assert "10.9.8.7" in log and "127.0.0.1       main1" in log and "localhost" in log
            assert "Read-only file system" in log
            await manager.exited("alone")
            log = "\n".join(await manager.log_of("alone"))
            assert "BACKENDAI_CLUSTER_SIZE=1" in log
            assert "MASTER_ADDR" not in log and "WORLD_SIZE" not in log and "id_ed25519" not in log
            # The node's own table is as it was.
            assert "main1" not in Path("/etc/hosts").read_text()
            assert "10.9.8.7" not in Path("/etc/hosts").read_text()

    asyncio.run(run())


@root_only
def test_a_rendezvous_port_that_is_taken_fails_the_start(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            port = free_port()
            with socket.create_server(("127.0.0.1", port)):
                manager.want(session("a", 2, port, "exec sleep 1000")[0])
                status = await manager.exited("a-main1")
                assert status.exit.reason == "PORT_FAILED"
                assert f"rendezvous port {port}" in status.exit.message
            port = free_port()
            manager.want(*session("b", 2, port, "exec sleep 1000"))
            running = fleet_pb2.KERNEL_PHASE_RUNNING
            for name in ("b-main1", "b-sub1"):
                await manager.status(name, lambda s: s.phase == running)
            manager.want(session("c", 2, port, "exec sleep 1000")[0])
            status = await manager.exited("c-main1")
            assert status.exit.reason == "PORT_FAILED" and "another session" in status.exit.message
            # Given back with the kernel.
            manager.unwant("b-main1")
            await manager.gone("b-main1")
            manager.want(session("d", 2, port, "exec sleep 1000")[0])
            await manager.status("d-main1", lambda s: s.phase == running)

    asyncio.run(run())


def test_a_place_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            (broken,) = session("s", 2, free_port(), "exec sleep 1000")[1:]
            del broken.cluster.addresses[1:]
            manager.want(broken)
            status = await manager.exited("s-sub1")
            assert status.exit.reason == "START_FAILED" and "addresses of 1" in status.exit.message
            (unknown,) = session("t", 2, free_port(), "exec sleep 1000", ["127.0.0.1", "no.such.invalid"])[1:]
            manager.want(unknown)
            status = await manager.exited("t-sub1")
            assert "`no.such.invalid` of `sub1`" in status.exit.message

    asyncio.run(run())


@root_only
@pytest.mark.skipif(not usable(POOR), reason="needs unshare and setpriv")
def test_a_node_without_mounts_refuses_what_needs_them(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path, prefix=POOR) as (manager, _):
            extra = [fleet_pb2.Mount(folder_uid="folder-1", folder="data", target="/home/work/data")]
            manager.want(
                session("s", 2, free_port(), "exec sleep 1000")[0],
                spec("mount", extra_mounts=extra),
                spec("shm", shared_memory_bytes=2**26),
            )
            for uid, what in (
                ("s-main1", "names for the kernels"),
                ("mount", "`data` at `/home/work/data`"),
                ("shm", "64 MiB of shared memory"),
            ):
                status = await manager.exited(uid)
                assert status.exit.reason == "START_FAILED" and what in status.exit.message, status
                assert "cannot give it a view of its own" in status.exit.message

    asyncio.run(run())
