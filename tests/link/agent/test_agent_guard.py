"""The guard beside a back end and a driver that fail it, and two who wait for the end of one process."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

from dure.agent.accelerators import Found, device
from dure.agent.backends.base import Ended, Handle
from dure.agent.enforcement import Held, Seen
from dure.agent.enforcement.hook import Hook
from dure.agent.enforcement.modes import Asked, Modes
from dure.agent.enforcement.mps_daemon import Daemon
from dure.agent.guard import NOT_IN_TIME, PROCESSES_LIMIT_S, Guard
from dure.agent.shim.files import write_json
from dure.agent.waiting import readable
from dure.fleet.v1 import fleet_pb2

GIB = 2**30
GPU = "GPU-0"


class Kernel:
    """What the guard sees of a runner."""

    def __init__(self, uid: str, folder: Path, **fields) -> None:
        grant = fleet_pb2.DeviceGrant(device=GPU, slot="cuda.shares", amount=500)
        self.spec = fleet_pb2.KernelSpec(uid=uid, devices=[grant], **fields)
        self.handle = Handle(uid, folder / uid)
        self.handle.folder.mkdir()
        self.ended = False
        self.shown: list[tuple[str, str]] = []

    def show_enforcement(self, mode: str, detail: str) -> None:
        self.shown.append((mode, detail))


class Engine:
    """A back end that tells processes, hangs for some kernels, and fails for others."""

    def __init__(self) -> None:
        self.pids: dict[str, frozenset[int]] = {}
        self.hangs: set[str] = set()
        self.fails: set[str] = set()

    async def processes(self, handle: Handle) -> frozenset[int]:
        if handle.uid in self.hangs:
            await asyncio.sleep(3600)
        if handle.uid in self.fails:
            raise OSError("the engine does not answer")
        return self.pids[handle.uid]


class World:
    def __init__(self, folder: Path, *kernels: Kernel) -> None:
        self.devices = {GPU: device(GPU, "Fake GPU", 80 * GIB, "cuda")}
        self.engine = Engine()
        self.kernels = list(kernels)
        self.ends: list[tuple[str, Ended]] = []
        self.modes = Modes(folder, Asked(), False, self.devices)
        self.guard = Guard(
            self.modes,
            self.engine,  # type: ignore[arg-type]
            self.devices,
            lambda: self.kernels,  # type: ignore[return-value]
            lambda uid, ended: self.ends.append((uid, ended)),
        )
        for number, kernel in enumerate(kernels):
            self.engine.pids[kernel.spec.uid] = frozenset({1_000_000 + number})

    def found(self, *used_gib: int) -> Found:
        by_pid = {1_000_000 + number: used * GIB for number, used in enumerate(used_gib)}
        return Found(tuple(self.devices.values()), memory={GPU: by_pid})


def test_a_back_end_that_hangs_for_one_kernel_hides_no_other(tmp_path: Path) -> None:
    world = World(
        tmp_path, Kernel("stuck", tmp_path), Kernel("failing", tmp_path), Kernel("greedy", tmp_path)
    )
    world.engine.hangs.add("stuck")
    world.engine.fails.add("failing")

    async def run() -> None:
        began_s = time.monotonic()
        for _ in range(2):
            await world.guard.look(world.found(70, 0, 50))
        assert time.monotonic() - began_s < 2 * PROCESSES_LIMIT_S + 20
        assert [uid for uid, _ in world.ends] == ["greedy"]
        stuck, failing, greedy = world.kernels
        assert (stuck.shown, failing.shown) == ([], [])
        assert greedy.shown[-1] == ("watchdog", "")

    asyncio.run(run())


def test_a_driver_that_hangs_ends_nobody_and_forgets_nothing(tmp_path: Path) -> None:
    world = World(
        tmp_path, Kernel("greedy", tmp_path), Kernel("strict", tmp_path, require_enforcement="watchdog")
    )
    strict = world.kernels[1]

    async def run() -> None:
        await world.guard.look(world.found(50, 10))
        world.devices[GPU].healthy = False
        for _ in range(3):
            await world.guard.look(Found(tuple(world.devices.values())))
        assert strict.shown[-1][0] == "none"
        assert "does not tell who holds the memory" in strict.shown[-1][1]
        assert world.devices[GPU].enforcement == "watchdog"
        assert world.ends == []
        world.devices[GPU].healthy = True
        await world.guard.look(world.found(50, 10))
        assert [(uid, ended.reason) for uid, ended in world.ends] == [("greedy", "GPU_MEMORY_EXCEEDED")]
        assert strict.shown[-1] == ("watchdog", "")

    asyncio.run(run())


def test_a_kernel_whose_device_is_not_there_is_not_judged(tmp_path: Path) -> None:
    world = World(tmp_path, Kernel("lost", tmp_path, require_enforcement="watchdog"))

    async def run() -> None:
        found = world.found(10)
        world.devices.clear()
        for _ in range(3):
            await world.guard.look(found)
        assert world.kernels[0].shown[:1] == [("none", f"watchdog: {GPU} is not on this node now")]
        assert world.ends == []

    asyncio.run(run())


def test_two_may_wait_for_the_end_of_one_process() -> None:
    async def run() -> None:
        process = await asyncio.create_subprocess_exec("sleep", "60")
        pidfd = os.pidfd_open(process.pid)
        try:
            follower = asyncio.create_task(readable([pidfd], 10))
            stopper = asyncio.create_task(readable([pidfd], 0.05))
            assert not await stopper
            process.kill()
            assert await follower
        finally:
            os.close(pidfd)
            await process.wait()

    asyncio.run(run())


def test_nothing_is_taken_from_kernels_that_are_not_known_yet(tmp_path: Path) -> None:
    world = World(tmp_path)
    daemon = Daemon.of(tmp_path, GPU)
    daemon.folder.mkdir(parents=True)
    write_json(str(daemon.folder / "daemon.json"), {"gpu": GPU, "compute_mode": ""})

    async def run() -> None:
        kernels, world.kernels = world.kernels, None  # type: ignore[assignment]
        await world.guard.look(world.found())
        assert daemon.was_started()
        world.kernels = kernels
        await world.guard.look(world.found())
        assert not daemon.was_started()

    asyncio.run(run())


class StuckHook(Hook):
    """Reads the maps of a process that hangs within the kernel."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, None)
        self.let_go = threading.Event()

    def verify(self, kernel: Held, seen: Seen) -> str:
        self.let_go.wait(60)
        return ""


def test_a_process_that_cannot_be_looked_at_stops_no_watchdog(tmp_path: Path) -> None:
    world = World(
        tmp_path, Kernel("greedy", tmp_path), Kernel("hooked", tmp_path, require_enforcement="hook")
    )
    hooked = world.kernels[1]
    write_json(str(hooked.handle.folder / "enforcement.json"), {"mode": "hook", "why": ""})
    stuck = StuckHook(tmp_path)
    world.modes.all = {**world.modes.all, "hook": stuck}

    async def run() -> None:
        try:
            for _ in range(2):
                await world.guard.look(world.found(50, 10))
            assert [uid for uid, _ in world.ends] == ["greedy"]
            assert hooked.shown[-1] == ("watchdog", f"hook: {NOT_IN_TIME}")
        finally:
            stuck.let_go.set()
        await asyncio.sleep(0.2)
        await world.guard.look(world.found(50, 10))
        assert hooked.shown[-1] == ("hook", "")

    asyncio.run(run())
