"""What it costs an agent to measure its kernels: real sessions of the process back end, idle ones.

The agent's measuring loop runs in this process, which does nothing else; its CPU time is the cost. Bounds:
50 sessions every 5 s under 1% of a core, 200 every second under 10%.
"""

from __future__ import annotations

import asyncio
import os
import resource
import tempfile
import time
from pathlib import Path

from dure.agent.backends.base import Backend, Handle, Plan
from dure.agent.backends.process import ProcessBackend
from dure.agent.counts import Counts
from dure.agent.measurer import Measurer
from dure.fleet.v1 import fleet_pb2

# Sessions, time between rounds in ms, time that is measured in s, and the bound in percent of a core.
CASES = ((50, 5_000, 20.0, 1.0), (200, 1_000, 10.0, 10.0))
STARTS_AT_ONCE = 8


def silent(_: str, __: fleet_pb2.ImagePull | None) -> None:
    """What a start says is not asked here."""


async def start(backend: ProcessBackend, folder: Path, number: int) -> Handle:
    handle = Handle(f"bench-{os.getpid()}-{number}", folder / str(number))
    handle.folder.mkdir()
    await backend.start(
        Plan(
            handle=handle,
            model=None,
            model_target="/models",
            model_path="/tmp",
            argv=("sleep", "3600"),
            shell="",
            line="",
            actions=(),
            environ={},
            port=0,
            cpu_milli=100,
            memory_bytes=64 * 2**20,
            stop_grace_s=0.0,
        ),
        silent,
    )
    seen = None
    while seen is None or not seen.started_at_s:
        seen = await backend.wait(handle, seen)
        assert seen.ended is None, seen.ended
    return handle


async def cost(backend: Backend, handles: list[Handle], interval_ms: int, span_s: float) -> float:
    """Percent of a core."""
    kernels = [
        (fleet_pb2.KernelSpec(uid=handle.uid, slots={"cpu": 100, "mem": 64 * 2**20 * 1000}), handle)
        for handle in handles
    ]
    counts = Counts()
    looked = asyncio.Event()
    measurer = Measurer(backend, [], {}, lambda: kernels, looked.set, counts)
    measurer.set_interval(interval_ms)
    running = asyncio.create_task(measurer.run())
    try:
        # The first look finds out where to read.
        async with asyncio.timeout(10):
            await looked.wait()
        rounds, before_s, began_s = sum(counts.measured.counts), _cpu_s(), time.monotonic()
        await asyncio.sleep(span_s)
        used_s, passed_s = _cpu_s() - before_s, time.monotonic() - began_s
        done = sum(counts.measured.counts) - rounds
        assert done >= span_s * 1000 / interval_ms - 2, f"only {done} rounds"
        assert len(measurer.take()) == len(handles)
        print(f"    a round takes {counts.measured.total / (done + rounds) * 1000:.1f} ms, {done} rounds")
        return used_s / passed_s * 100
    finally:
        running.cancel()
        await asyncio.wait([running])


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def run() -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        kernels = home / "kernels"
        kernels.mkdir()
        backend = ProcessBackend(home)
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
            for sessions, interval_ms, span_s, bound in CASES:
                await asyncio.gather(*(one(number) for number in range(len(handles), sessions)))
                percent = await cost(backend, handles, interval_ms, span_s)
                kept = "kept" if percent < bound else "BROKEN"
                print(
                    f"  {sessions} sessions every {interval_ms / 1000:g} s: {percent:.2f}% of a core "
                    f"(bound {bound:g}%: {kept})"
                )
        finally:
            await asyncio.gather(*(end(handle) for handle in handles))


def main() -> None:
    print("measuring: CPU time of an agent's measuring loop")
    asyncio.run(run())
