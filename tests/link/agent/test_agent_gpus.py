"""GPUs through the real pynvml and a driver's library that behaves: found, used, lost, hanging, and back."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from pathlib import Path

import metrics_page
import pytest
from agent_fakes import AgentProcess, FakeManager, cluster, spec
from gpu.stand_in import DRIVER_NOT_LOADED, GpuNode, needs_cc
from own_ports import free_port

from dure.agent import machine, numa
from dure.agent.backends.cgroups import Cgroups
from dure.fleet.v1 import fleet_pb2

GIB = 2**30
K1, K2, K3, K4 = "k1", "k2", "k3", "k4"
pytestmark = needs_cc
# The GPU is used by a child of the kernel's main process.
FORKS = "import os, time\npid = os.fork()\nprint(pid, flush=True)\nwhile True: time.sleep(60)"
ONE = {"gpus": [{"uuid": "GPU-fake-0", "name": "Fake H100", "memory": 80 * GIB}]}
TWO = {"gpus": [{"uuid": f"GPU-{name}", "name": "Fake H100", "memory": 80 * GIB} for name in "ab"]}


def grant(device: str, amount: int = 500) -> fleet_pb2.DeviceGrant:
    return fleet_pb2.DeviceGrant(device=device, slot="cuda.shares", amount=amount)


def user(node: GpuNode, uid: str, device: str, used_bytes: int = GIB) -> fleet_pb2.KernelSpec:
    """A kernel that uses the GPU."""
    return spec(uid, node.user(used_bytes, python="python"), devices=[grant(device)], stop_grace_ms=500)


def name_of(gpu: str) -> dict[str, str]:
    return {"device": f"GPU-{gpu}", "model": "Fake H100"}


async def healthy(manager: FakeManager, device: str, is_so: bool = True) -> fleet_pb2.Device:
    await manager.until(lambda: device in manager.devices and manager.devices[device].healthy is is_so)
    return manager.devices[device]


def test_a_node_with_four_gpus_offers_its_parts_too(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "node")

    async def run() -> None:
        async with cluster(tmp_path, prefix=node.prefix) as (manager, _):
            offered = [
                (one.id, dict(one.slots), one.parent, one.numa_node, one.memory_bytes, one.healthy)
                for one in manager.devices.values()
            ]
            whole = {"cuda.shares": 1000, "cuda.device": 1000}
            gpus = [gpu["uuid"] for gpu in node.state["gpus"]]
            parts = [part["uuid"] for part in node.state["gpus"][3]["parts"]]
            assert offered == [
                (gpus[0], whole, "", 0, 42949672960, True),
                (gpus[1], whole, "", 0, 42949672960, True),
                (gpus[2], whole, "", 1, 48305799168, True),
                # 3 of 7 slices are 0.428; 1 of 7 would be 0.14, but it has 0.122 of the memory.
                (parts[0], {"cuda.shares": 420}, gpus[3], 1, 42413850624, True),
                (parts[1], {"cuda.shares": 120}, gpus[3], 1, 10468982784, True),
            ]
            first = {peer.id: peer.distance for peer in manager.devices[gpus[0]].peers}
            assert first == {gpus[1]: 0, gpus[2]: 40}
            assert not manager.limitations

    asyncio.run(run())


def test_gpu_use_is_attributed_to_kernels(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "node", ONE)

    async def run() -> None:
        async with cluster(tmp_path, prefix=node.prefix) as (manager, _):
            (device,) = manager.devices.values()
            assert (device.id, device.model, device.memory_bytes) == ("GPU-fake-0", "Fake H100", 80 * GIB)
            for uid, amount in ((K1, 500), (K2, 250)):
                grants = [grant(device.id, amount)]
                manager.want(spec(uid, ["python", "-c", FORKS], health_check=None, devices=grants))
            manager.want(spec(K3, ["python", "-c", FORKS], health_check=None))
            pids = {}
            for uid in (K1, K2, K3):
                started = await manager.status(uid, lambda status: status.phase == 2 and status.pid > 0)
                pids[uid] = started.pid
            manager.measure_every(500)
            # Nothing runs on it yet: that is a number, too.
            await manager.until(lambda: manager.values(K1).get("cuda_mem") == 0)
            child = await _child(pids[K1])
            node.state["gpus"][0]["processes"] = [
                {"pid": child, "util": 30, "memory": 10 * GIB},
                {"pid": pids[K1], "util": 10, "memory": 10 * GIB},
                {"pid": pids[K2], "util": 20, "memory": 5 * GIB},
                {"pid": 999999, "util": 40, "memory": 50 * GIB},
            ]
            node.write()
            await manager.until(lambda: manager.values(K1).get("cuda_util") == pytest.approx(80))
            first, second = manager.values(K1), manager.values(K2)
            assert (first["cuda_mem"], first["cuda_mem_util"]) == (20 * GIB, pytest.approx(50))
            assert (second["cuda_util"], second["cuda_mem"]) == (pytest.approx(80), 5 * GIB)
            assert not [name for name in manager.values(K3) if name.startswith("cuda")]

            # A driver that fails takes its own numbers away, and no others.
            node.state["fail"] = {"Count": 999}
            node.state["gpus"][0]["processes"] = []
            node.write()
            await manager.until(lambda: bool(manager.values(K1)) and "cuda_mem" not in manager.values(K1))
            assert "mem" in manager.values(K1)
            node.state["fail"] = {}
            node.write()
            await manager.until(lambda: manager.values(K1).get("cuda_mem") == 0)

    asyncio.run(run())


def test_a_gpu_that_is_lost_takes_its_kernels_along_and_comes_back_by_itself(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "node", TWO)

    async def run() -> None:
        port = free_port()
        shown = ("--metrics-port", str(port))
        async with cluster(tmp_path, *shown, prefix=node.prefix) as (manager, agent):
            manager.want(user(node, K1, "GPU-a"), user(node, K2, "GPU-b"), spec(K3))
            for uid in (K1, K2, K3):
                await manager.healthy(uid)
            node.state["gpus"][0]["lost"] = True
            node.write()
            sick = await healthy(manager, "GPU-a", False)
            assert sick.detail == "the driver does not answer for it: GPU is lost"
            # The manager must know before it places the next replica.
            assert not manager.statuses[K1].HasField("exit")
            ended = await manager.exited(K1)
            assert (ended.exit.reason, ended.exit.code) == ("DEVICE_LOST", -1)
            assert ended.exit.message.startswith(
                "device GPU-a (Fake H100) is lost: the driver does not answer"
            )
            assert manager.devices["GPU-b"].healthy
            page = await metrics_page.read(port)
            told = {
                name: metrics_page.value(page, "dure_agent_device_healthy", **name_of(name)) for name in "ab"
            }
            assert told == {"a": 0, "b": 1}

            node.state["gpus"][0]["lost"] = False
            node.write()
            assert not (await healthy(manager, "GPU-a")).detail
            manager.unwant(K1)
            manager.want(user(node, K4, "GPU-a"))
            await manager.healthy(K4)

            # Taken out of the machine: it is not listed any more.
            del node.state["gpus"][0]
            node.write()
            ended = await manager.exited(K4)
            assert ended.exit.reason == "DEVICE_LOST" and "does not list it any more" in ended.exit.message
            for uid in (K2, K3):
                assert manager.statuses[uid].health == fleet_pb2.KERNEL_HEALTH_HEALTHY

            # A stream that is opened later tells the newest.
            await agent.end(signal.SIGKILL)
            node.state["gpus"] = []
            node.write()
            manager.devices.clear()
            await agent.start()
            # So does an agent that never saw the GPU: what a kernel has is remembered.
            ended = await manager.exited(K2)
            assert ended.exit.reason == "DEVICE_LOST" and "GPU-b" in ended.exit.message
            assert manager.statuses[K3].health == fleet_pb2.KERNEL_HEALTH_HEALTHY

    asyncio.run(run())


def test_a_driver_that_comes_later_brings_its_gpus(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "node", TWO, driver=False)

    async def run() -> None:
        async with cluster(tmp_path, prefix=node.prefix) as (manager, _):
            assert not manager.devices and not manager.limitations
            node.unload()
            node.install()
            # There, but it does not start.
            await manager.until(lambda: bool(manager.limitations))
            assert manager.limitations[-1] == "no GPUs are offered: Driver Not Loaded"
            node.write()
            await healthy(manager, "GPU-a")
            assert not manager.limitations
            manager.want(user(node, K1, "GPU-a"))
            await manager.healthy(K1)
            # One that fails as a whole loses nobody.
            node.state["fail"] = {"Init": DRIVER_NOT_LOADED, "Count": DRIVER_NOT_LOADED}
            node.write()
            sick = await healthy(manager, "GPU-a", False)
            assert sick.detail == "the driver does not answer: Driver Not Loaded"
            await asyncio.sleep(5)
            assert manager.statuses[K1].phase == fleet_pb2.KERNEL_PHASE_RUNNING

    asyncio.run(run())


def test_a_driver_that_hangs_delays_nobody(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "node", TWO)

    async def run() -> None:
        async with cluster(tmp_path, prefix=node.prefix) as (manager, agent):
            manager.want(user(node, K1, "GPU-a"))
            await manager.healthy(K1)
            manager.measure_every(500)
            worker = _worker(agent)
            node.state["hang"] = "Count"
            node.write()
            began_s = time.monotonic()
            manager.want(spec(K2))
            await manager.healthy(K2)
            manager.unwant(K2)
            await manager.gone(K2)
            sick = await healthy(manager, "GPU-b", False)
            assert sick.detail.startswith("the driver does not answer: ")
            # Its measuring hangs with it, and the next worker too.
            await asyncio.sleep(max(0.0, began_s + 9 - time.monotonic()))
            assert manager.statuses[K1].health == fleet_pb2.KERNEL_HEALTH_HEALTHY
            beats_s = [at_s for at_s in manager.beats_s if at_s > began_s]
            gaps_s = [after - before for before, after in itertools.pairwise(beats_s)]
            # They come every half second, and whoever waited for the driver would wait for 3 s at least.
            assert len(gaps_s) >= 3 and max(gaps_s) < 2.9, gaps_s
            node.state["hang"] = ""
            node.write()
            await manager.until(lambda: manager.devices["GPU-b"].healthy)
            assert _worker(agent) != worker
            assert manager.statuses[K1].phase == fleet_pb2.KERNEL_PHASE_RUNNING

    asyncio.run(run())


def test_an_agent_whose_driver_hangs_from_the_start_joins_without_it(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "node", {**TWO, "hang": "Init"})

    async def run() -> None:
        async with cluster(tmp_path, prefix=node.prefix) as (manager, _):
            assert not manager.devices
            manager.want(spec(K1))
            await manager.healthy(K1)
            node.state["hang"] = ""
            node.write()
            await manager.until(lambda: "GPU-a" in manager.devices)

    asyncio.run(run())


def test_a_kernel_is_pinned_to_the_node_of_its_gpu(tmp_path: Path) -> None:
    if Cgroups.probe().no_pinning:
        pytest.skip("needs a control group for cpusets")
    state = {"gpus": [{**TWO["gpus"][0], "numa": 0}, {**TWO["gpus"][1], "numa": 77}]}
    node = GpuNode(tmp_path / "node", state)
    cores = numa.written(machine.numa_nodes()[0].cpus)

    async def run() -> None:
        async with cluster(tmp_path, "--numa-pinning", prefix=node.prefix) as (manager, agent):
            assert not [said for said in manager.limitations if "pinned" in said]
            manager.want(user(node, K1, "GPU-a"), user(node, K2, "GPU-b"))
            for uid in (K1, K2):
                await manager.healthy(uid)
            assert _cpuset(manager.statuses[K1].pid) == (f"/dure/{manager.wire(K1)}", cores, "0")
            # Its node has no cores, or is not there.
            assert _cpuset(manager.statuses[K2].pid)[1] in ("", cores)
            # The next agent ends it all the same.
            await agent.end(signal.SIGKILL)
            await agent.start()
            await manager.until(lambda: manager.complete_reports == 2)
            manager.unwant(K1)
            await manager.gone(K1)
            assert not list(Path("/sys/fs/cgroup").glob(f"*/dure/{manager.wire(K1)}"))

    asyncio.run(run())


def _cpuset(pid: int) -> tuple[str, str, str]:
    """The end of the name of its group, its cores and its memory nodes."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup") / (names or "unified")
        folder = (root if root.exists() else root.parent) / path.lstrip("/")
        if (folder / "cpuset.cpus").exists():
            cpus, memory = ((folder / name).read_text().strip() for name in ("cpuset.cpus", "cpuset.mems"))
            return "/".join(["", *path.split("/")[-2:]]), cpus, memory
    return "", "", ""


def _worker(agent: AgentProcess) -> int:
    """Pid of the process that talks to the driver."""
    assert agent.process is not None
    pid = agent.process.pid
    children = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children"))
    (found,) = (
        int(child)
        for child in children.split()
        if b"dure.agent.nvml.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return found


async def _child(pid: int) -> int:
    async with asyncio.timeout(10):
        while True:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if children:
                return int(children[0])
            await asyncio.sleep(0.02)
