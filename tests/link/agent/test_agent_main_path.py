"""The agent as a process, with a manager that behaves: the main path."""

from __future__ import annotations

import asyncio
import os
import signal
import urllib.request
from pathlib import Path

import own_ports
import pytest
from agent_fakes import alive, cluster, spec

from dure.fleet.v1 import fleet_pb2

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs cgroups and mount namespaces")


def fetch(port: int, path: str = "/x") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
        return response.read().decode()


def test_a_kernel_becomes_healthy_and_goes(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path, "--simulated-gpus", "2") as (manager, agent):
            assert manager.hello is not None
            assert [device.id for device in manager.hello.devices] == ["SIM-node-1-0", "SIM-node-1-1"]
            grant = fleet_pb2.DeviceGrant(device="SIM-node-1-1", slot="cuda.shares", amount=500)
            manager.want(spec("k1", devices=[grant]))
            status = await manager.healthy("k1")
            assert status.phase == fleet_pb2.KERNEL_PHASE_RUNNING
            assert status.host == "127.0.0.1" and status.port in own_ports.sessions()
            assert alive(status.pid)
            assert b"server.py" in Path(f"/proc/{status.pid}/cmdline").read_bytes()
            environ = Path(f"/proc/{status.pid}/environ").read_bytes().decode()
            assert "DURE_DEVICES=SIM-node-1-1" in environ and "GREETING=hello" in environ
            assert "DURE_JOIN_TOKEN" not in environ
            cwd, home, argument = (await asyncio.to_thread(fetch, status.port)).split("|")
            assert argument == str(status.port)
            if manager.hello.maps_mounts:
                assert (cwd, home) == ("/models", "/home/work")
            manager.unwant("k1")
            await manager.gone("k1")
            assert not alive(status.pid)
            assert not agent.kernel_folder("k1").exists()
            assert next(s.phase for s in manager.history if s.uid == "k1") == fleet_pb2.KERNEL_PHASE_PREPARING
            leftovers = list(Path("/sys/fs/cgroup").glob(f"**/dure/{manager.wire('k1')}"))
            assert leftovers == []

    asyncio.run(run())


def test_sigkill_of_the_agent_and_adoption(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            manager.want(spec("k1"), spec("k2"))
            before = await manager.healthy("k1")
            doomed = await manager.healthy("k2")
            await agent.end(signal.SIGKILL)
            assert alive(before.pid)
            os.kill(doomed.pid, signal.SIGTERM)
            await manager.until(lambda: (agent.kernel_folder("k2") / "exit.json").exists())
            manager.history.clear()
            await agent.start()
            await manager.until(lambda: manager.complete_reports == 2)
            after = manager.statuses["k1"]
            assert (after.pid, after.port, after.health) == (
                before.pid,
                before.port,
                fleet_pb2.KERNEL_HEALTH_HEALTHY,
            )
            assert after.phase == fleet_pb2.KERNEL_PHASE_RUNNING
            dead = manager.statuses["k2"]
            assert dead.phase == fleet_pb2.KERNEL_PHASE_EXITED
            assert (dead.exit.reason, dead.exit.code) == ("SIGNALED", 128 + 15)

    asyncio.run(run())
