"""GPUs in containers: attached by UUID, shared under the watchdog, taken away with a reason."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from containers import engines
from containers.nodes import ask, container, kernel, node
from gpu.stand_in import GPU_USER, GpuNode, needs_cc

from dure.fleet.v1 import fleet_pb2

GIB = 2**30
pytestmark = needs_cc
STATE: dict[str, Any] = {
    "gpus": [
        {
            "name": "NVIDIA A100-SXM4-40GB",
            "uuid": "GPU-aaaa0000-0000-0000-0000-000000000000",
            "memory": 40 * GIB,
        },
    ]
}
(GPU,) = (gpu["uuid"] for gpu in STATE["gpus"])


def attach() -> tuple[str, ...]:
    """Through the engine where it has NVIDIA's runtime, as the one that CI starts does."""
    with engines.client() as engine:
        return () if "nvidia" in engine.info()["Runtimes"] else ("--gpu-attach", "environment")


def user(uid: str, used_bytes: int, share_milli: int, **fields: Any) -> fleet_pb2.KernelSpec:
    """A kernel with a part of the GPU, of which it uses so much."""
    grant = fleet_pb2.DeviceGrant(device=GPU, slot="cuda.shares", amount=share_milli)
    command = ["python3", "-u", "gpu_user.py", "/ledger", str(used_bytes), "10"]
    ledger = fleet_pb2.Mount(folder_uid="ledger", folder="ledger", target="/ledger", writable=True)
    return kernel(uid, command, devices=[grant], extra_mounts=[ledger], **fields)


def gpus(tmp_path: Path) -> GpuNode:
    # Its ledger is a folder of the manager's storage: containers and the driver see one and the same.
    made = GpuNode(tmp_path / "storage", STATE)
    made.ledger.chmod(0o777)
    return made


async def with_program(tmp_path: Path) -> None:
    await asyncio.to_thread(shutil.copy, GPU_USER, tmp_path / "storage" / "folder-1" / "gpu_user.py")


def test_the_over_user_goes_and_its_neighbour_stays(tmp_path: Path) -> None:
    made = gpus(tmp_path)

    async def run() -> None:
        async with node(tmp_path, *attach(), "--gpu-allowance-mib", "512", prefix=made.prefix) as (
            manager,
            agent,
        ):
            await with_program(tmp_path)
            assert manager.devices[GPU].healthy, manager.devices[GPU]
            assert manager.devices[GPU].enforcement == "watchdog"
            manager.want(user("k1", 8 * GIB, 250), user("k2", 18 * GIB, 500))
            first, second = await manager.healthy("k1"), await manager.healthy("k2")
            inspected = await container(agent, "k1")
            environ = inspected["Config"]["Env"]
            assert f"CUDA_VISIBLE_DEVICES={GPU}" in environ
            if not attach():
                (request,) = inspected["HostConfig"]["DeviceRequests"]
                assert (request["Driver"], request["DeviceIDs"]) == ("nvidia", [GPU])
            assert json.loads(inspected["Config"]["Labels"]["dure.devices"]) == [
                {"device": GPU, "slot": "cuda.shares", "amount": 250}
            ]
            for uid in ("k1", "k2"):
                await manager.status(uid, lambda status: status.enforcement == "watchdog")
            # What each uses is told by host pids, from inside of its own pid namespace.
            manager.measure_every(500)
            await manager.until(lambda: manager.values("k2").get("cuda_mem") == 18 * GIB)
            await manager.until(lambda: manager.values("k1").get("cuda_mem_util") == pytest.approx(80))

            await ask(first, f"/use?bytes={12 * GIB}")
            ended = await manager.exited("k1")
            assert ended.exit.reason == "GPU_MEMORY_EXCEEDED"
            assert "12 GiB" in ended.exit.message and "10 GiB" in ended.exit.message, ended.exit.message
            assert await ask(second, "/") == "ok\n"
            assert manager.statuses["k2"].phase == fleet_pb2.KERNEL_PHASE_RUNNING
            assert manager.statuses["k2"].pid == second.pid

    asyncio.run(run())


def test_a_gpu_that_falls_off_the_bus_takes_its_containers_along(tmp_path: Path) -> None:
    made = gpus(tmp_path)

    async def run() -> None:
        async with node(tmp_path, *attach(), prefix=made.prefix) as (manager, _):
            await with_program(tmp_path)
            manager.want(user("k1", GIB, 500), kernel("k2"))
            await manager.healthy("k1")
            other = await manager.healthy("k2")
            made.state["gpus"][0]["lost"] = 1
            made.write()
            ended = await manager.exited("k1")
            assert ended.exit.reason == "DEVICE_LOST"
            await manager.until(lambda: not manager.devices[GPU].healthy)
            assert manager.statuses["k2"].pid == other.pid
            made.state["gpus"][0]["lost"] = 0
            made.write()
            await manager.until(lambda: manager.devices[GPU].healthy)
            manager.unwant("k1")
            await manager.gone("k1")
            manager.want(user("k3", GIB, 500))
            await manager.healthy("k3")

    asyncio.run(run())


def test_a_container_without_gpus_sees_none(tmp_path: Path) -> None:
    made = gpus(tmp_path)

    async def run() -> None:
        async with node(tmp_path, *attach(), prefix=made.prefix) as (manager, agent):
            manager.want(kernel("k1"))
            await manager.healthy("k1")
            inspected = await container(agent, "k1")
            environ = dict(pair.split("=", 1) for pair in inspected["Config"]["Env"])
            assert (environ["NVIDIA_VISIBLE_DEVICES"], environ["CUDA_VISIBLE_DEVICES"]) == ("void", "")
            assert not inspected["HostConfig"]["DeviceRequests"]

    asyncio.run(run())
