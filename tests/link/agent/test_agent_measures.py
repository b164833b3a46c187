"""What real kernels use, as a real agent measures it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import metrics_page
import pytest
from agent_fakes import FakeManager, cluster, spec
from own_ports import free_port
from test_agent_node import POOR, usable

from dure.fleet.v1 import fleet_pb2

MIB = 2**20
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs cgroups and mount namespaces")
# Burns half a core in a child, holds 100 MiB, writes to the disk as fast as it is told to.
BUSY = """
import os, time
held = bytearray(os.urandom(1)) * (100 * 2**20)
if os.fork() == 0:
    while True:
        end = time.process_time() + 0.05
        while time.process_time() < end: pass
        time.sleep(0.05)
while True:
    with open("/home/work/out" if os.path.isdir("/home/work") else os.environ["HOME"] + "/out", "wb") as file:
        file.write(os.urandom(2**20)); file.flush(); os.fsync(file.fileno())
    time.sleep(0.1)
"""
IDLE = "import time\nwhile True: time.sleep(60)"


def busy(uid: str, code: str = BUSY) -> fleet_pb2.KernelSpec:
    return spec(uid, ["python", "-c", code], health_check=None, slots={"cpu": 2000, "mem": 400 * MIB * 1000})


async def started(manager: FakeManager, uid: str) -> None:
    await manager.status(uid, lambda status: status.phase == fleet_pb2.KERNEL_PHASE_RUNNING)


async def check_busy(manager: FakeManager) -> None:
    def right() -> bool:
        found = manager.values("busy")
        return (
            # A machine that does much else gives less than half a core, never more.
            0.1 < found.get("cpu_used", 0) < 0.8
            and found["cpu_util"] == pytest.approx(found["cpu_used"] * 50)
            and 100 * MIB <= found["mem"] < 250 * MIB
            and found["mem_util"] == pytest.approx(found["mem"] / 4 / MIB)
            and found.get("disk_write", 0) > MIB / 4
        )

    await manager.until(right)
    # It shares the node's network, and has no GPU.
    assert not [name for name in manager.values("busy") if name.startswith(("net_", "cuda_"))]
    idle = manager.values("idle")
    assert idle["cpu_used"] < 0.1 and 0 < idle["mem"] < 100 * MIB


@root_only
def test_kernels_are_measured_at_the_manager_s_interval(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        async with cluster(tmp_path, "--metrics-port", str(port)) as (manager, _):
            manager.want(busy("busy"), busy("idle", IDLE))
            await started(manager, "busy")
            await started(manager, "idle")
            # Less than allowed: every 500 ms.
            manager.measure_every(1)
            await check_busy(manager)
            before, began_s = len(manager.rounds), time.monotonic()
            await manager.until(lambda: len(manager.rounds) >= before + 4)
            assert time.monotonic() - began_s > 1.4

            page = await metrics_page.read(port)
            assert metrics_page.value(page, "dure_agent_kernels", phase="RUNNING") == 2
            assert metrics_page.value(page, "dure_agent_manager_connected") == 1
            assert metrics_page.value(page, "dure_agent_kernel_start_duration_seconds_count") == 2
            labels = {"project": "p", "endpoint": "e", "replica": "replica-busy"}
            labels["kernel"] = manager.wire("busy")
            assert metrics_page.value(page, "dure_agent_kernel_memory_bytes", **labels) >= 100 * MIB
            assert 0 < metrics_page.value(page, "dure_agent_kernel_cpu_ratio", **labels) < 0.4
            assert metrics_page.value(page, "dure_agent_measure_duration_seconds_count") >= 4

            manager.unwant("busy")
            await manager.gone("busy")
            await manager.until(lambda: not manager.values("busy") and bool(manager.values("idle")))
            page = await metrics_page.read(port)
            told = [dict(own)["kernel"] for own in page["dure_agent_kernel_memory_bytes"]]
            assert told == [manager.wire("idle")]

    asyncio.run(run())


@root_only
@pytest.mark.skipif(not usable(POOR), reason="needs unshare and setpriv")
def test_a_node_without_groups_measures_by_proc(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path, prefix=POOR) as (manager, _):
            manager.want(busy("busy"), busy("idle", IDLE))
            await started(manager, "busy")
            await started(manager, "idle")
            manager.measure_every(500)
            await check_busy(manager)

    asyncio.run(run())


def test_adopted_kernels_are_measured_and_a_new_stream_gets_no_old_news(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            manager.want(busy("idle", IDLE))
            await started(manager, "idle")
            manager.measure_every(500)
            await manager.until(lambda: "cpu_used" in manager.values("idle"))
            await agent.end(signal.SIGKILL)
            manager.rounds.clear()
            await agent.start()
            await manager.until(lambda: manager.complete_reports == 2)
            manager.measure_every(500)
            await manager.until(lambda: "cpu_used" in manager.values("idle"))

            # A manager that is away is not owed the rounds that it missed.
            port = manager.port
            await manager.stop()
            ended_s = time.monotonic() + 1.2
            while time.monotonic() < ended_s:
                await asyncio.sleep(0.05)
            manager.rounds.clear()
            await manager.start(port)
            await manager.until(lambda: manager.complete_reports == 3)
            assert len(manager.rounds) <= 1
            manager.measure_every(500)
            await manager.until(lambda: len(manager.rounds) >= 2)

    asyncio.run(run())


def test_a_short_life_ends_no_measuring(tmp_path: Path) -> None:
    """Kernels that come and go while they are looked at."""

    async def run() -> None:
        port = free_port()
        async with cluster(tmp_path, "--metrics-port", str(port)) as (manager, _):
            manager.measure_every(500)
            manager.want(busy("idle", IDLE))
            await started(manager, "idle")
            for index in range(10):
                manager.want(spec(f"short-{index}", f"sleep 0.{index}; exit 3"))
            for index in range(10):
                await manager.exited(f"short-{index}")
            before = len(manager.rounds)
            await manager.until(lambda: len(manager.rounds) >= before + 2)
            assert [kernel.uid for kernel in manager.rounds[-1].kernels] == ["idle"]
            page = await metrics_page.read(port)
            assert metrics_page.value(page, "dure_agent_kernel_ends_total", reason="EXITED") == 10
            assert metrics_page.value(page, "dure_agent_kernels", phase="EXITED") == 10

    asyncio.run(run())


def test_a_metrics_port_that_is_taken_keeps_nobody_from_working(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
        async with cluster(tmp_path) as (manager, agent):
            async with server:
                await agent.end(signal.SIGTERM)
                agent.arguments += ["--metrics-port", str(port)]
                await agent.start()
                manager.want(spec("worker", "sleep 100"))
                await manager.status("worker", lambda s: s.phase == fleet_pb2.KERNEL_PHASE_RUNNING)
            # It takes the port once it is free.
            async with asyncio.timeout(20):
                while True:
                    with contextlib.suppress(OSError, AssertionError):
                        page = await metrics_page.read(port)
                        break
                    await asyncio.sleep(0.2)
            assert metrics_page.value(page, "dure_agent_kernels", phase="RUNNING") == 1

    asyncio.run(run())
