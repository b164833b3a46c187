"""What kernels use of a GPU: told by a driver library that behaves like NVML, attributed by processes."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest
from agent_fakes import cluster, spec

from dure.fleet.v1 import fleet_pb2

GIB = 2**30
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
# The GPU is used by a child of the kernel's main process.
FORKS = "import os, time\npid = os.fork()\nprint(pid, flush=True)\nwhile True: time.sleep(60)"


def test_gpu_use_is_attributed_to_kernels(tmp_path: Path) -> None:
    library, told = tmp_path / "lib", tmp_path / "nvml"
    library.mkdir()
    source = Path(__file__).with_name("fake_nvml.c")
    target = library / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", str(target), str(source)], check=True, timeout=60)
    told.write_text("ok\n")
    prefix = ("env", f"LD_LIBRARY_PATH={library}", f"FAKE_NVML={told}")

    async def run() -> None:
        async with cluster(tmp_path, prefix=prefix) as (manager, _):
            assert manager.hello is not None
            (device,) = manager.hello.devices
            assert (device.id, device.model, device.memory_bytes) == ("GPU-fake-0", "Fake H100", 80 * GIB)
            for uid, amount in (("k1", 500), ("k2", 250)):
                grant = fleet_pb2.DeviceGrant(device=device.id, slot="cuda.shares", amount=amount)
                manager.want(spec(uid, ["python", "-c", FORKS], health_check=None, devices=[grant]))
            manager.want(spec("k3", ["python", "-c", FORKS], health_check=None))
            pids = {}
            for uid in ("k1", "k2", "k3"):
                started = await manager.status(uid, lambda status: status.phase == 2 and status.pid > 0)
                pids[uid] = started.pid
            manager.measure_every(500)
            # Nothing runs on it yet: that is a number, too.
            await manager.until(lambda: manager.values("k1").get("cuda_mem") == 0)
            child = await _child(pids["k1"])
            told.write_text(
                f"ok\n{child} 30 {10 * GIB}\n{pids['k1']} 10 {10 * GIB}\n{pids['k2']} 20 {5 * GIB}\n"
                f"999999 40 {50 * GIB}\n"
            )
            await manager.until(lambda: manager.values("k1").get("cuda_util") == pytest.approx(80))
            first, second = manager.values("k1"), manager.values("k2")
            assert (first["cuda_mem"], first["cuda_mem_util"]) == (20 * GIB, pytest.approx(50))
            assert (second["cuda_util"], second["cuda_mem"]) == (pytest.approx(80), 5 * GIB)
            assert not [name for name in manager.values("k3") if name.startswith("cuda")]

            # A driver that fails takes its own numbers away, and no others.
            told.write_text("broken\n")
            await manager.until(lambda: bool(manager.values("k1")) and "cuda_mem" not in manager.values("k1"))
            assert "mem" in manager.values("k1")
            told.write_text("ok\n")
            await manager.until(lambda: manager.values("k1").get("cuda_mem") == 0)

    asyncio.run(run())


async def _child(pid: int) -> int:
    async with asyncio.timeout(10):
        while True:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if children:
                return int(children[0])
            await asyncio.sleep(0.02)
