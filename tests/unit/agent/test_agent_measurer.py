"""The measuring loop against back ends that fail and hang."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dure.agent import measurer as measuring
from dure.agent.backends.base import Handle
from dure.agent.counts import Counts
from dure.agent.link import REPORT_KERNELS_MAX, batches
from dure.agent.measurer import Measurer
from dure.agent.usage import DeviceUse, Usage
from dure.agent.waiting import Background
from dure.fleet.v1 import fleet_pb2


class Backend:
    """Measures whatever it is told to; each look is one second and half a core later."""

    def __init__(self, before_look: Callable[[], None] = lambda: None) -> None:
        self.before_look = before_look
        self.looks = 0

    def measure(self, handle: Handle) -> Usage | None:
        self.looks += 1
        self.before_look()
        return Usage(float(self.looks), self.looks / 2, 2**20) if handle.uid != "gone" else None

    async def processes(self, handle: Handle) -> frozenset[int]:
        return frozenset({7})


class Stuck:
    """An accelerator whose driver never comes back."""

    name, order = "cuda", 0

    def __init__(self) -> None:
        self.released = threading.Event()

    def measure(self) -> dict[str, DeviceUse]:
        self.released.wait(30)
        return {}


def kernel(uid: str) -> tuple[fleet_pb2.KernelSpec, Handle]:
    grant = fleet_pb2.DeviceGrant(device="GPU-1", slot="cuda.shares", amount=1000)
    return fleet_pb2.KernelSpec(uid=uid, slots={"cpu": 1000, "mem": 2**21 * 1000}, devices=[grant]), Handle(
        uid, Path("/nowhere")
    )


async def rounds(measurer: Measurer, count: int, woken: asyncio.Event) -> None:
    running = asyncio.create_task(measurer.run())
    try:
        async with asyncio.timeout(15):
            for _ in range(count):
                await woken.wait()
                woken.clear()
    finally:
        running.cancel()
        await asyncio.wait([running])


def test_a_look_that_fails_is_taken_again(caplog: pytest.LogCaptureFixture) -> None:
    failures = [OSError("the file system is gone")]

    def fail() -> None:
        if failures:
            raise failures.pop()

    async def run() -> None:
        woken = asyncio.Event()
        measurer = Measurer(Backend(fail), [], {}, lambda: [kernel("k1")], woken.set, Counts())
        measurer.set_interval(500)
        await rounds(measurer, 2, woken)
        (found,) = measurer.take()
        assert found.values == {"cpu_used": 0.5, "cpu_util": 50.0, "mem": 2**20, "mem_util": 50.0}
        assert measurer.take() == []

    caplog.set_level(logging.ERROR)
    asyncio.run(run())
    assert "measuring broke" in caplog.text


def test_a_driver_that_hangs_takes_only_its_own_numbers(caplog: pytest.LogCaptureFixture) -> None:
    stuck = Stuck()

    async def run() -> None:
        woken = asyncio.Event()
        devices = {"GPU-1": fleet_pb2.Device(id="GPU-1", accelerator="cuda", memory_bytes=2**30)}
        measurer = Measurer(Backend(), [stuck], devices, lambda: [kernel("k1")], woken.set, Counts())
        measurer.set_interval(500)
        # The first waits for the driver; after that nobody does.
        await rounds(measurer, 3, woken)
        (found,) = measurer.take()
        assert set(found.values) == {"cpu_used", "cpu_util", "mem", "mem_util"}

    caplog.set_level(logging.WARNING)
    try:
        asyncio.run(run())
    finally:
        stuck.released.set()
    assert [record.message for record in caplog.records] == [
        "accelerator `cuda` does not tell what is used of it: it does not answer"
    ]
    assert measuring.ROUND_LIMIT_S < 5


def test_what_is_gone_and_what_nobody_took_is_left_out() -> None:
    async def run() -> None:
        woken = asyncio.Event()
        found = [kernel("gone"), kernel("k1")]
        measurer = Measurer(Backend(), [], {}, lambda: found, woken.set, Counts())
        measurer.set_interval(500)
        await rounds(measurer, 2, woken)
        assert list(measurer.newest) == ["k1"]
        measurer.begin_stream()
        assert measurer.take() == []

    asyncio.run(run())


def test_rounds_are_sent_in_bounded_pieces() -> None:
    found = [fleet_pb2.KernelMeasurement(uid=str(number)) for number in range(REPORT_KERNELS_MAX * 2 + 1)]
    assert [len(piece.kernels) for piece in batches(found)] == [REPORT_KERNELS_MAX, REPORT_KERNELS_MAX, 1]
    assert list(batches([])) == []


def test_background_calls_come_one_at_a_time() -> None:
    async def run() -> None:
        background, release = Background("test"), threading.Event()
        with pytest.raises(TimeoutError):
            await background.run(lambda: release.wait(20), 0.05)
        with pytest.raises(TimeoutError, match="has not come back"):
            await background.run(lambda: 1, 5)
        release.set()
        async with asyncio.timeout(5):
            while True:
                try:
                    assert await background.run(lambda: 2, 5) == 2
                    break
                except TimeoutError:
                    await asyncio.sleep(0.01)

        def fail() -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            await background.run(fail, 5)
        assert await background.run(lambda: 3, 5) == 3

    asyncio.run(run())
