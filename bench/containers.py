"""What it costs an agent to measure containers: real ones of the node's engine, idle.

As `measuring`, with the Docker back end. Bound: 50 containers every 5 s under 1% of a core. DURE_BENCH_IMAGE
names an image with `sleep` that is on the node.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from bench.measuring import cost, silent
from dure.agent.backends.base import Container, Handle, Plan
from dure.agent.backends.docker.backend import DockerBackend
from dure.fleet.v1 import fleet_pb2
from dure.wire import identity

IMAGE = "dure-test:3"
CONTAINERS, INTERVAL_MS, SPAN_S, BOUND_PERCENT = 50, 5_000, 20.0, 1.0
STARTS_AT_ONCE = 4


async def _no_credential() -> tuple[str, str]:
    return "", ""


async def _ports() -> range:
    return range(25_000, 29_000)


async def start(backend: DockerBackend, folder: Path, number: int) -> Handle:
    uid = f"bench-{os.getpid()}-{number}"
    handle = Handle(uid, folder / uid)
    handle.folder.mkdir()
    spec = fleet_pb2.KernelSpec(
        uid=uid,
        session_uid=uid,
        endpoint="bench",
        image=os.environ.get("DURE_BENCH_IMAGE", IMAGE),
        image_pull_policy=fleet_pb2.IMAGE_PULL_POLICY_NEVER,
    )
    container = Container(
        spec=spec,
        agent="bench",
        host="127.0.0.1",
        hostname="main1",
        devices=(),
        credential=_no_credential,
        free_ports=_ports,
    )
    plan = Plan(
        handle=handle,
        model=None,
        model_target="/models",
        model_path="/tmp",
        argv=("sleep", "3600"),
        shell="",
        line="",
        actions=(),
        environ={},
        port=8000,
        cpu_milli=100,
        memory_bytes=64 * 2**20,
        stop_grace_s=0.0,
        container=container,
    )
    await backend.start(plan, silent)
    seen = await backend.wait(handle, None)
    assert seen.ended is None, seen.ended
    return handle


async def run() -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        kernels = home / "kernels"
        kernels.mkdir()
        identity.save(home, identity.Identity(f"bench-{os.getpid()}", "none"))
        backend = DockerBackend(home)
        await backend.probe()
        handles: list[Handle] = []
        few = asyncio.Semaphore(STARTS_AT_ONCE)

        async def one(number: int) -> None:
            async with few:
                handles.append(await start(backend, kernels, number))

        async def end(handle: Handle) -> None:
            async with few:
                await backend.stop(handle, 0)
                await backend.clean(handle)

        try:
            await asyncio.gather(*(one(number) for number in range(CONTAINERS)))
            percent = await cost(backend, handles, INTERVAL_MS, SPAN_S)
            kept = "kept" if percent < BOUND_PERCENT else "BROKEN"
            print(
                f"  {CONTAINERS} containers every {INTERVAL_MS / 1000:g} s: {percent:.2f}% of a core "
                f"(bound {BOUND_PERCENT:g}%: {kept})"
            )
        finally:
            await asyncio.gather(*(end(handle) for handle in handles))
            await backend.close()


def main() -> None:
    print("containers: CPU time of an agent's measuring loop, with the Docker back end")
    asyncio.run(run())
