"""MPS daemons and the hook's library on a node: real programs, real processes, in the agent's place."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gpu.hook_stand_in import build, unloadable
from gpu.mps_stand_in import MpsNode
from gpu.stand_in import needs_cc

from dure.agent.accelerators import Found, device
from dure.agent.backends.base import Handle, StartFailed
from dure.agent.enforcement import CannotHold, Held, Part, Seen
from dure.agent.enforcement.choice import NOT_USED_YET
from dure.agent.enforcement.hook import TARGET, Hook
from dure.agent.enforcement.modes import Asked, Modes
from dure.agent.enforcement.mps import DEATHS_MAX, Mps
from dure.agent.enforcement.mps import TARGET as PIPES
from dure.agent.enforcement.mps_daemon import Daemon
from dure.fleet.v1 import fleet_pb2
from dure.wire.enforcement import HOOK, MPS, NONE, WATCHDOG

GIB = 2**30
GPU, OTHER = "GPU-0", "GPU-1"


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Sockets of MPS lie in the agent's folder, and their paths have a bound."""
    with tempfile.TemporaryDirectory(prefix="dure-") as folder:
        yield Path(folder)


@pytest.fixture
def mps_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MpsNode:
    node = MpsNode(tmp_path)
    monkeypatch.setenv("PATH", f"{node.folder}:{os.environ['PATH']}")
    return node


def gpu(id: str = GPU) -> fleet_pb2.Device:
    return device(id, "Fake GPU", 80 * GIB, "cuda")


def kernel(folder: Path, *shares: int, contained: bool = False, **more) -> Held:
    folder.mkdir(parents=True, exist_ok=True)
    parts = tuple(Part(f"GPU-{index}", share, 80 * GIB) for index, share in enumerate(shares))
    return Held(folder.name, parts, folder, contained=contained, **more)


@contextmanager
def program(environ: dict[str, str]) -> Iterator[int]:
    """A process with these variables; its pid."""
    line = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    with subprocess.Popen(
        line, env={"PATH": os.environ["PATH"], **environ}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


async def kill(daemon: Daemon) -> None:
    os.kill(daemon.pid(), signal.SIGKILL)
    async with asyncio.timeout(10):
        while daemon.pid():
            await asyncio.sleep(0.01)


def using(pid: int, *, mps: bool = False) -> Seen:
    return Seen(frozenset({pid}), {GPU: {pid: GIB}}, frozenset({pid} if mps else ()))


def test_an_mps_daemon_is_started_when_it_is_needed_and_taken_up_by_the_next_agent(
    short_path: Path, mps_node: MpsNode
) -> None:
    async def run() -> None:
        first = Mps(short_path)
        try:
            assert await first.probe(gpu(), told=True) == ""
            assert mps_node.starts() == []
            given = await first.inject(kernel(short_path / "k1", 250, user=os.geteuid()))
            pipes = given.environ["CUDA_MPS_PIPE_DIRECTORY"]
            assert Path(pipes).is_relative_to(short_path)
            assert given.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
            assert given.environ["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=20480M"
            assert (given.binds, given.host_ipc) == ((), False)
            assert mps_node.compute_mode(GPU) == "EXCLUSIVE_PROCESS"
            pid = Daemon.of(short_path, GPU).pid()

            second = Mps(short_path)
            contained = await second.inject(kernel(short_path / "k2", 500, contained=True))
            assert contained.environ["CUDA_MPS_PIPE_DIRECTORY"] == PIPES
            assert [(bind.source, bind.target) for bind in contained.binds] == [(pipes, PIPES)]
            assert contained.host_ipc
            assert Daemon.of(short_path, GPU).pid() == pid
            assert mps_node.starts() == [GPU]
        finally:
            await first.close()
        assert Daemon.of(short_path, GPU).pid() == 0
        assert mps_node.compute_mode(GPU) == "DEFAULT"
        assert not (short_path / "mps").exists() or not list((short_path / "mps").iterdir())

    asyncio.run(run())


def test_an_mps_daemon_that_dies_is_started_again_but_not_for_ever(
    short_path: Path, mps_node: MpsNode
) -> None:
    async def run() -> None:
        mps, daemon = Mps(short_path), Daemon.of(short_path, GPU)
        try:
            await mps.inject(kernel(short_path / "k1", 500))
            for count in range(DEATHS_MAX):
                await kill(daemon)
                assert await mps.probe(gpu(), told=True) == ""
                assert len(mps_node.starts()) == count + 2
            await kill(daemon)
            assert "died 5 times" in await mps.probe(gpu(), told=True)
            with pytest.raises(CannotHold, match="died 5 times"):
                await mps.inject(kernel(short_path / "k2", 500))
            assert len(mps_node.starts()) == DEATHS_MAX + 1
        finally:
            await mps.close()

    asyncio.run(run())


def test_mps_that_does_not_start_says_why_and_leaves_the_gpu_to_all(
    short_path: Path, mps_node: MpsNode
) -> None:
    mps_node.set("broken")
    devices = {GPU: gpu()}

    async def run() -> None:
        modes = Modes(short_path, Asked(MPS), False, devices)
        await modes.assess(Found(tuple(devices.values()), memory={GPU: {}}))
        assert devices[GPU].enforcement == MPS
        spec = fleet_pb2.KernelSpec(uid="k", devices=[grant(500)])
        handle = Handle("k", short_path / "k")
        handle.folder.mkdir()
        assert (await modes.prepare(spec, handle)).environ == {}
        assert modes.prepared(handle).mode == WATCHDOG
        assert "An error occurred" in modes.prepared(handle).why
        assert mps_node.compute_mode(GPU) == "DEFAULT"
        await modes.assess(Found(tuple(devices.values()), memory={GPU: {}}))
        assert devices[GPU].enforcement == WATCHDOG
        assert any("An error occurred" in sentence for sentence in modes.limitations)
        spec.require_enforcement = MPS
        with pytest.raises(StartFailed, match="requires enforcement `mps`") as refused:
            await modes.prepare(spec, handle)
        assert refused.value.reason == "ENFORCEMENT_FAILED"
        await modes.close()

    asyncio.run(run())


def test_what_mps_cannot_do_is_refused_with_the_reason(short_path: Path, mps_node: MpsNode) -> None:
    mps_node.set("denied")

    async def run() -> None:
        mps = Mps(short_path)
        try:
            with pytest.raises(StartFailed, match="ask for one GPU"):
                await mps.inject(kernel(short_path / "k0", 500, 500))
            part = gpu()
            part.parent = "GPU-whole"
            assert await mps.probe(part, told=True) != ""
            assert "not tell" in await mps.probe(gpu(), told=False)
            held = kernel(short_path / "k1", 500, user=os.geteuid())
            await mps.inject(held)
            # Nobody may set the compute mode: it works, and is told.
            (limitation,) = mps.limitations
            assert "Insufficient Permissions" in limitation
            with program({}) as pid:
                assert mps.verify(held, using(pid, mps=True)) == ""
                assert "around MPS" in mps.verify(held, using(pid))
                stranger = kernel(short_path / "k2", 250, user=os.geteuid() + 1)
                with pytest.raises(StartFailed, match="must run as one user"):
                    await mps.inject(stranger)
                mps.forget(frozenset())
                await mps.inject(stranger)
        finally:
            await mps.close()

    asyncio.run(run())


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs to run a program as another user")
def test_a_container_of_another_user_is_told_why_mps_does_not_serve_it(tmp_path: Path) -> None:
    mps = Mps(tmp_path)
    first, second = kernel(tmp_path / "k1", 500, contained=True), kernel(tmp_path / "k2", 500, contained=True)
    with program({}) as mine, subprocess.Popen(["/bin/sleep", "60"], user=1000) as other:
        assert mps.verify(first, using(mine, mps=True)) == ""
        problem = mps.verify(second, Seen(frozenset({other.pid}), {GPU: {}}))
        other.kill()
    assert "runs as user 1000, and the MPS server of GPU-0 serves user 0" in problem


@needs_cc
def test_the_hook_is_believed_where_it_is_loaded_only(tmp_path: Path) -> None:
    async def run() -> None:
        library = build(tmp_path / "given")
        hook = Hook(tmp_path, library, lock_folder=tmp_path / "lock")
        assert await hook.probe(gpu(), told=True) == ""
        held = kernel(tmp_path / "k1", 250, 500, environ={"LD_PRELOAD": "libmine.so"})
        given = await hook.inject(held)
        environ = dict(given.environ)
        assert environ["CUDA_DEVICE_MEMORY_LIMIT_0"] == "20480m"
        assert environ["CUDA_DEVICE_MEMORY_LIMIT_1"] == "40960m"
        assert environ["CUDA_DEVICE_SM_LIMIT"] == "25"
        assert environ["GPU_CORE_UTILIZATION_POLICY"] == "force"
        assert environ["CUDA_DISABLE_CONTROL"] == environ["CUDA_OVERSUBSCRIBE"] == "false"
        assert environ["LD_PRELOAD"].endswith(":libmine.so")
        assert Path(environ["CUDA_DEVICE_MEMORY_SHARED_CACHE"]).parent.is_dir()
        with program(environ) as with_it, program({}) as without:
            assert hook.verify(held, using(with_it)) == ""
            both = Seen(frozenset({with_it, without}), {GPU: {with_it: GIB, without: GIB}})
            assert f"process {without} uses the GPU, and has not loaded" in hook.verify(held, both)
            # A process that does not use the GPU may be what it likes.
            assert hook.verify(held, Seen(both.pids, {GPU: {with_it: GIB}})) == ""
            # The operator replaces the library: what runs has the agent's copy, and the next agent knows it.
            library.write_bytes(library.read_bytes() + b"\0")
            later = Hook(tmp_path, library)
            assert await later.probe(gpu(), told=True) == ""
            assert later.verify(held, using(with_it)) == ""
            assert Hook(tmp_path, None).verify(held, using(with_it)) == ""
        assert hook.verify(held, using(with_it)) == NOT_USED_YET
        with pytest.raises(CannotHold, match="less than 1 MiB"):
            await hook.inject(Held("k", (Part(GPU, 10, 2**20),), tmp_path / "k1"))

    asyncio.run(run())


@needs_cc
def test_what_a_container_gets_of_the_hook(tmp_path: Path) -> None:
    async def run() -> None:
        hook = Hook(tmp_path, build(tmp_path / "given"), lock_folder=tmp_path / "lock")
        assert await hook.probe(gpu(), told=True) == ""
        given = await hook.inject(kernel(tmp_path / "k1", 500, contained=True))
        assert "LD_PRELOAD" not in given.environ
        binds = {bind.target: bind for bind in given.binds}
        assert binds.keys() == {TARGET, "/etc/ld.so.preload", "/usr/local/vgpu/shared", "/tmp/vgpulock"}
        assert Path(binds["/etc/ld.so.preload"].source).read_text() == f"{TARGET}\n"
        assert {target for target, bind in binds.items() if bind.read_only} == {TARGET, "/etc/ld.so.preload"}
        cache = given.environ["CUDA_DEVICE_MEMORY_SHARED_CACHE"]
        assert cache.startswith("/usr/local/vgpu/shared/")
        # Whoever the image's user is can write there.
        assert Path(binds["/usr/local/vgpu/shared"].source).stat().st_mode & 0o7777 == 0o1777

    asyncio.run(run())


@needs_cc
def test_a_library_that_cannot_be_loaded_is_never_the_mode_of_a_device(tmp_path: Path) -> None:
    devices = {GPU: gpu()}
    found = Found(tuple(devices.values()), memory={GPU: {}})

    async def run() -> None:
        for library in (unloadable(tmp_path / "given"), tmp_path / "absent.so", Path("/etc/hostname")):
            modes = Modes(tmp_path, Asked(HOOK, library), False, devices)
            await modes.assess(found)
            assert devices[GPU].enforcement == WATCHDOG
            (limitation,) = modes.limitations
            assert str(library) in limitation
            handle = Handle("k", tmp_path / "k")
            handle.folder.mkdir(exist_ok=True)
            given = await modes.prepare(fleet_pb2.KernelSpec(uid="k", devices=[grant(500)]), handle)
            assert given.environ == {}
            assert modes.prepared(handle).mode == WATCHDOG

    asyncio.run(run())


def test_a_device_that_tells_nothing_has_no_enforcement(tmp_path: Path) -> None:
    devices = {GPU: gpu(), OTHER: gpu(OTHER), "SIM-0": device("SIM-0", "none", GIB, "simulated")}

    async def run() -> None:
        modes = Modes(tmp_path, Asked(), False, devices)
        await modes.assess(Found(tuple(devices.values()), memory={GPU: {}}))
        assert [one.enforcement for one in devices.values()] == [WATCHDOG, NONE, NONE]
        # A driver that hangs takes nothing back; one that answers does.
        for one in devices.values():
            one.healthy = False
        await modes.assess(Found(tuple(devices.values())))
        assert devices[GPU].enforcement == WATCHDOG
        devices[GPU].healthy = True
        await modes.assess(Found(tuple(devices.values())))
        assert devices[GPU].enforcement == NONE

    asyncio.run(run())


def grant(amount: int, id: str = GPU) -> fleet_pb2.DeviceGrant:
    return fleet_pb2.DeviceGrant(device=id, slot="cuda.shares", amount=amount)


def test_a_daemon_that_hangs_holds_up_nobody(short_path: Path, mps_node: MpsNode) -> None:
    async def run() -> None:
        mps = Mps(short_path)
        try:
            await mps.inject(kernel(short_path / "k1", 500))
            daemon = Daemon.of(short_path, GPU)
            await kill(daemon)
            mps_node.set("hangs")
            assert "takes long" in await mps.probe(gpu(), told=True)
            assert await mps.probe(gpu(OTHER), told=True) == ""
            await mps.detach()
            mps_node.clear("hangs")
            assert await mps.probe(gpu(), told=True) == ""
            assert daemon.pid()
        finally:
            await mps.close()

    asyncio.run(run())
