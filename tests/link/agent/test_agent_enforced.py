"""Shares of a GPU that the stand-in for NVIDIA's library tells of, kept by a whole agent."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_fakes import AgentProcess, FakeManager, alive, cluster, spec
from click.testing import CliRunner
from gpu.hook_stand_in import build, unloadable
from gpu.mps_stand_in import MpsNode
from gpu.stand_in import GpuNode, needs_cc

from dure.agent.main import main
from dure.fleet.v1 import fleet_pb2

GIB = 2**30
GPU = "GPU-one"
STATE = {"gpus": [{"uuid": GPU, "name": "Fake H100", "memory": 80 * GIB, "links": ["X"]}]}
pytestmark = needs_cc


def user(
    node: GpuNode, uid: str, used_bytes: int, share: int = 500, flag: str = "", **more
) -> fleet_pb2.KernelSpec:
    """A kernel that holds so much of the GPU, of which it has a share."""
    granted = [fleet_pb2.DeviceGrant(device=GPU, slot="cuda.shares", amount=share)]
    command = more.pop("command", None) or node.user(used_bytes, flag=flag)
    return spec(uid, command, devices=granted, **more)


async def use(manager: FakeManager, uid: str, used_bytes: int) -> None:
    url = f"http://127.0.0.1:{manager.statuses[uid].port}/use?bytes={used_bytes}"
    await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read())


async def shown(manager: FakeManager, uid: str, mode: str, detail: str = "") -> None:
    await manager.status(uid, lambda s: s.enforcement == mode and detail in s.enforcement_detail)


async def restart(manager: FakeManager, agent: AgentProcess) -> None:
    await agent.end(signal.SIGKILL)
    reports = manager.complete_reports
    await agent.start()
    await manager.until(lambda: manager.complete_reports > reports)


def test_who_takes_more_than_its_share_goes_and_the_neighbour_stays(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "gpus", STATE)

    async def run() -> None:
        async with cluster(tmp_path, prefix=node.prefix) as (manager, _):
            assert manager.hello is not None
            assert manager.hello.devices[0].enforcement == "watchdog"
            manager.want(user(node, "enforced-greedy", 10 * GIB), user(node, "enforced-fair", 40 * GIB))
            manager.want(spec("enforced-bystander"))
            for uid in ("enforced-greedy", "enforced-fair"):
                await manager.healthy(uid)
                await shown(manager, uid, "watchdog")
            before = manager.statuses["enforced-fair"].pid
            await use(manager, "enforced-greedy", 41 * GIB)
            ended = (await manager.exited("enforced-greedy")).exit
            assert ended.reason == "GPU_MEMORY_EXCEEDED"
            assert f"held 41 GiB of the memory of {GPU}, of which its share of 0.5 is 40 GiB" in ended.message
            await asyncio.sleep(2.5)
            fair = await manager.healthy("enforced-fair")
            assert fair.pid == before
            assert alive(before)
            assert manager.statuses["enforced-bystander"].enforcement == ""

    asyncio.run(run())


def test_who_was_granted_no_gpu_may_use_none(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "gpus", STATE)

    async def run() -> None:
        async with cluster(tmp_path, prefix=node.prefix) as (manager, _):
            thief = node.user(GIB)
            command = f"CUDA_VISIBLE_DEVICES={GPU} exec " + " ".join(thief)
            manager.want(user(node, "enforced-fair", 40 * GIB), spec("enforced-thief", command))
            ended = (await manager.exited("enforced-thief")).exit
            assert ended.reason == "GPU_MEMORY_EXCEEDED"
            assert "which it was not granted" in ended.message
            await manager.healthy("enforced-fair")

    asyncio.run(run())


def test_the_reason_survives_an_agent_that_is_killed_meanwhile(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "gpus", STATE)

    async def run() -> None:
        async with cluster(tmp_path, prefix=node.prefix) as (manager, agent):
            stubborn = "trap '' TERM; " + " ".join(node.user(41 * GIB))
            manager.want(user(node, "enforced-k1", 0, command=stubborn, stop_grace_ms=6000))
            verdict = agent.kernel_folder("enforced-k1") / "verdict.json"
            await manager.until(verdict.exists)
            assert alive(manager.statuses["enforced-k1"].pid)
            # What was decided stands, also if the kernel came back to its share meanwhile.
            await use(manager, "enforced-k1", GIB)
            await restart(manager, agent)
            ended = (await manager.exited("enforced-k1")).exit
            assert ended.reason == "GPU_MEMORY_EXCEEDED"

    asyncio.run(run())


def test_the_hook_is_shown_once_it_is_seen_in_who_uses_the_gpu(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "gpus", STATE)
    library = build(tmp_path / "given")

    async def run() -> None:
        option = ("--hook-library", str(library))
        async with cluster(tmp_path, *option, prefix=node.prefix) as (manager, agent):
            assert manager.hello is not None
            assert manager.hello.devices[0].enforcement == "hook"
            # Its own variables do not win.
            lying = {"CUDA_DEVICE_MEMORY_LIMIT_0": "0m", "LD_PRELOAD": "", "CUDA_DISABLE_CONTROL": "true"}
            manager.want(user(node, "enforced-k1", 10 * GIB, environ=lying, require_enforcement="hook"))
            idle = ["python", "-m", "http.server", "{port}"]
            manager.want(user(node, "enforced-idle", 0, 250, command=idle, require_enforcement="hook"))
            await shown(manager, "enforced-k1", "hook")
            assert manager.statuses["enforced-k1"].enforcement_detail == ""
            await shown(manager, "enforced-idle", "watchdog", "hook: none of its processes uses the GPU yet")
            environ = Path(f"/proc/{manager.statuses['enforced-k1'].pid}/environ").read_bytes().split(b"\0")
            assert b"CUDA_DEVICE_MEMORY_LIMIT_0=40960m" in environ
            assert b"CUDA_DISABLE_CONTROL=false" in environ
            # An agent that was given no library still knows what it looks for.
            agent.arguments = [one for one in agent.arguments if one not in option]
            await restart(manager, agent)
            await shown(manager, "enforced-k1", "hook")
            # It keeps nobody from anything: the watchdog is behind it.
            await use(manager, "enforced-k1", 60 * GIB)
            assert (await manager.exited("enforced-k1")).exit.reason == "GPU_MEMORY_EXCEEDED"

    asyncio.run(run())


def test_a_hook_that_is_not_in_force_is_never_shown_and_ends_who_requires_it(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "gpus", STATE)
    library = build(tmp_path / "given")

    async def run() -> None:
        option = ("--hook-library", str(library))
        async with cluster(tmp_path, *option, prefix=node.prefix) as (manager, _):
            # The program is started without what the loader reads; one that is linked statically ignores it.
            without = "exec env -u LD_PRELOAD " + " ".join(node.user(10 * GIB))
            manager.want(user(node, "enforced-k1", 0, command=without))
            manager.want(user(node, "enforced-k2", 0, 250, command=without, require_enforcement="hook"))
            manager.want(user(node, "enforced-k3", 0, 250, command=without, require_enforcement="watchdog"))
            await shown(manager, "enforced-k1", "watchdog", "uses the GPU, and has not loaded the library")
            ended = (await manager.exited("enforced-k2")).exit
            assert ended.reason == "ENFORCEMENT_FAILED"
            assert "requires enforcement `hook`" in ended.message
            assert "has not loaded the library" in ended.message
            await manager.healthy("enforced-k1")
            await manager.healthy("enforced-k3")
            assert not [s for s in manager.history if s.enforcement == "hook"]

    asyncio.run(run())


def test_a_library_that_cannot_be_loaded_is_said_at_registration(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "gpus", STATE)
    library = unloadable(tmp_path / "given")

    async def run() -> None:
        arguments = ("--gpu-enforcement", "hook", "--hook-library", str(library))
        async with cluster(tmp_path, *arguments, prefix=node.prefix) as (manager, _):
            assert manager.hello is not None
            assert manager.hello.devices[0].enforcement == "watchdog"
            assert any("cannot be loaded" in limitation for limitation in manager.hello.limitations)
            manager.want(
                user(node, "enforced-k1", 10 * GIB),
                user(node, "enforced-k2", GIB, 250, require_enforcement="hook"),
            )
            await shown(manager, "enforced-k1", "watchdog", "cannot be loaded")
            refused = (await manager.exited("enforced-k2")).exit
            assert refused.reason == "ENFORCEMENT_FAILED"
            assert not [s for s in manager.history if s.enforcement == "hook"]

    asyncio.run(run())


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Sockets of MPS lie in the agent's folder, and their paths have a bound."""
    with tempfile.TemporaryDirectory(prefix="dure-") as folder:
        yield Path(folder)


def test_mps_is_shown_for_its_clients_and_its_daemon_outlives_the_agent(short_path: Path) -> None:
    tmp_path = short_path
    node, mps = GpuNode(tmp_path / "gpus", STATE), MpsNode(tmp_path)
    prefix = ("env", f"PATH={mps.folder}:/usr/local/bin:/usr/bin:/bin", *node.prefix[1:])

    async def run() -> None:
        async with cluster(tmp_path, "--gpu-enforcement", "mps", prefix=prefix) as (manager, agent):
            assert manager.hello is not None
            assert manager.hello.devices[0].enforcement == "mps"
            manager.want(user(node, "enforced-client", 10 * GIB, flag="mps", require_enforcement="mps"))
            manager.want(user(node, "enforced-around", 10 * GIB, 250))
            await shown(manager, "enforced-client", "mps")
            await shown(manager, "enforced-around", "watchdog", "uses the GPU around MPS")
            await restart(manager, agent)
            await shown(manager, "enforced-client", "mps")
            assert mps.starts() == [GPU]
            # Not asked for any more, MPS stays for those that were started with it, and goes with them.
            place = agent.arguments.index("--gpu-enforcement")
            agent.arguments[place : place + 2] = ["--gpu-enforcement", "none"]
            await restart(manager, agent)
            await shown(manager, "enforced-client", "mps")
            assert mps.compute_mode(GPU) == "EXCLUSIVE_PROCESS"
            for uid in ("enforced-client", "enforced-around"):
                manager.unwant(uid)
                await manager.gone(uid)
            await manager.until(lambda: mps.compute_mode(GPU) == "DEFAULT")

    asyncio.run(run())


def test_engines_start_one_after_the_other_on_a_gpu(tmp_path: Path) -> None:
    node = GpuNode(tmp_path / "gpus", STATE)

    def engine(uid: str) -> fleet_pb2.KernelSpec:
        go = tmp_path / f"{uid}.go"
        command = f"until [ -e {go} ]; do sleep 0.1; done; exec " + " ".join(node.user(GIB))
        # Far from deciding: its turn is over when it is healthy.
        check = fleet_pb2.HealthCheck(
            path="/", interval_ms=100, max_retries=5, max_wait_time_ms=2000, initial_delay_ms=60_000
        )
        check.probe_during_initial_delay = True
        more = {"session_name": f"session of {uid}", "serial_start": True, "health_check": check}
        return user(node, uid, 0, 250, command=command, **more)

    def waits_for(status: fleet_pb2.KernelStatus, uid: str) -> bool:
        return f"waiting for `session of {uid}`" in status.message and status.pid == 0

    async def run() -> None:
        async with cluster(tmp_path, prefix=node.prefix) as (manager, agent):
            manager.want(engine("enforced-k1"))
            await manager.status("enforced-k1", lambda s: s.pid > 0)
            manager.want(engine("enforced-k2"))
            await manager.status("enforced-k2", lambda s: waits_for(s, "enforced-k1"))
            manager.want(engine("enforced-k3"))
            await manager.status("enforced-k3", lambda s: "session of enforced-k2" in s.message)
            # One that may start at any time does.
            manager.want(user(node, "enforced-free", GIB, 250))
            await manager.healthy("enforced-free")
            # One that waits and is removed gives up its place.
            manager.unwant("enforced-k2")
            await manager.gone("enforced-k2")
            await manager.status("enforced-k3", lambda s: waits_for(s, "enforced-k1"))
            # One that an agent before started keeps its turn.
            await restart(manager, agent)
            await manager.status("enforced-k3", lambda s: waits_for(s, "enforced-k1"))
            (tmp_path / "enforced-k1.go").touch()
            await manager.healthy("enforced-k1")
            await manager.status("enforced-k3", lambda s: s.pid > 0)
            # One that ends gives its turn up, too.
            manager.want(engine("enforced-k4"))
            await manager.status("enforced-k4", lambda s: waits_for(s, "enforced-k3"))
            manager.unwant("enforced-k3")
            await manager.gone("enforced-k3")
            await manager.status("enforced-k4", lambda s: s.pid > 0)

    asyncio.run(run())


def test_a_hook_that_is_asked_for_must_be_given(tmp_path: Path) -> None:
    arguments = ["--data-dir", str(tmp_path), "--name", "node-1", "--gpu-enforcement", "hook"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "--hook-library" in result.output
