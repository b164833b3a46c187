"""The stream, identity and folders of the agent."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import tomli
from agent_fakes import JOIN_TOKEN, AgentProcess, alive, cluster, spec

from dure.fleet.v1 import fleet_pb2


def test_the_manager_goes_and_comes_back(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            manager.want(spec("k1"))
            before = await manager.healthy("k1")
            await manager.stop()
            port = manager.port
            await manager.start(port)
            began = time.monotonic()
            await manager.until(lambda: manager.complete_reports == 2)
            assert time.monotonic() - began < 10, "attempts are a second apart at most"
            assert manager.statuses["k1"].pid == before.pid
            assert manager.statuses["k1"].health == fleet_pb2.KERNEL_HEALTH_HEALTHY
            # What a snapshot leaves out is not wanted.
            manager.specs.clear()
            manager.send_snapshot()
            await manager.gone("k1")
            assert not alive(before.pid)

    asyncio.run(run())


def test_a_manager_that_falls_silent_is_left(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            await manager.until(lambda: manager.heartbeats > 1)
            manager.acknowledge = False
            await manager.until(lambda: manager.streams == 2)

    asyncio.run(run())


def test_replays_stale_wishes_and_unknown_removals(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            manager.want(spec("k1", generation=5))
            pid = (await manager.healthy("k1")).pid
            manager.want(spec("k1", generation=5))
            manager.send(fleet_pb2.Desired(removals=[fleet_pb2.KernelRemoval(uid="k1", generation=4)]))
            manager.send(fleet_pb2.Desired(removals=[fleet_pb2.KernelRemoval(uid="never", generation=7)]))
            status = await manager.gone("never")
            assert status.generation == 7
            assert alive(pid)
            manager.unwant("k1")
            assert (await manager.gone("k1")).generation == 6
            manager.history.clear()
            manager.want(spec("k1", generation=5))
            await manager.until(lambda: any(s.uid == "k1" for s in manager.history))
            assert manager.statuses["k1"].phase == fleet_pb2.KERNEL_PHASE_GONE

    asyncio.run(run())


def test_health_goes_up_and_down(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            manager.want(spec("k1"))
            await manager.healthy("k1")
            sick = Path(f"/tmp/{manager.wire('k1')}.sick")
            sick.touch()
            try:
                status = await manager.status("k1", lambda s: s.health == fleet_pb2.KERNEL_HEALTH_UNHEALTHY)
                assert status.probe_status_code == 503 and "answered 503, not 200" in status.probe_detail
                await agent.end(signal.SIGKILL)
                manager.history.clear()
                await agent.start()
                await manager.until(lambda: manager.complete_reports == 2)
                assert all(s.health == fleet_pb2.KERNEL_HEALTH_UNHEALTHY for s in manager.history)
                assert manager.statuses["k1"].consecutive_failures >= 6
            finally:
                sick.unlink()
            await manager.healthy("k1")

    asyncio.run(run())


def test_a_folder_that_is_not_shared_is_fetched_once_and_resumed(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path, storage_path="/no/such/storage") as (manager, agent):
            big = manager.storage / "folder-1" / "deep" / "weights.bin"
            big.parent.mkdir()
            big.write_bytes(bytes(range(256)) * 4096)
            manager.cut_fetch_after = 3 * 65536
            manager.want(spec("k1"))
            await manager.healthy("k1")
            assert ("deep/weights.bin", 3 * 65536) in manager.fetched
            manager.fetched.clear()
            manager.want(spec("k2"))
            await manager.healthy("k2")
            assert manager.fetched == []
            (cached,) = (agent.home / "cache").iterdir()
            assert (cached / "deep" / "weights.bin").read_bytes() == big.read_bytes()

    asyncio.run(run())


def test_a_missing_folder_fails_the_kernel(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            manager.want(
                spec("k1", model=fleet_pb2.Mount(folder_uid="nowhere", folder="lost", target="/models"))
            )
            status = await manager.exited("k1")
            assert status.exit.reason == "FOLDER_FAILED" and "lost" in status.exit.message

    asyncio.run(run())


def test_identity_and_settings_are_kept_but_not_the_join_token(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path, "--simulated-gpus", "3", "--cpus", "1.5") as (manager, agent):
            await agent.end(signal.SIGTERM)
            kept = tomli.loads((agent.home / "settings.toml").read_text())
            assert kept["simulated_gpus"] == 3 and kept["cpus"] == "1.5"
            for file in agent.home.glob("*.toml"):
                assert JOIN_TOKEN not in file.read_text()
            assert (agent.home / "identity.toml").stat().st_mode & 0o777 == 0o600
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "dure.agent.main", "--data-dir", str(agent.data_dir))
            )
            await manager.until(lambda: manager.complete_reports == 2)
            assert manager.hello is not None
            assert len(manager.hello.devices) == 3 and manager.hello.slots["cpu"] == 1500
            assert (agent.data_dir / "run" / "node-1.pid").read_text() == f"{process.pid}\n"
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0

    asyncio.run(run())


def test_refusals_are_one_line(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):

            def agent(*arguments: str) -> subprocess.CompletedProcess[str]:
                base = [sys.executable, "-m", "dure.agent.main", "--data-dir", str(tmp_path / "other")]
                return subprocess.run(
                    [
                        *base,
                        "--manager",
                        f"127.0.0.1:{manager.port}",
                        "--lease-dir",
                        str(tmp_path / "l"),
                        *arguments,
                    ],
                    capture_output=True,
                    text=True,
                    timeout=20,
                    check=False,
                )

            done = await asyncio.to_thread(agent)
            assert done.returncode == 1 and "has not joined yet" in done.stderr
            done = await asyncio.to_thread(agent, "--join-token", "wrong", "--log-level", "error")
            assert done.returncode == 1 and "refused to let `agent-1` join" in done.stderr
            assert "Traceback" not in done.stderr
            for wrong in (
                ("--cpus", "x"),
                ("--session-ports", "9-1"),
                ("--name", "A B"),
                ("--manager", "nowhere"),
            ):
                done = await asyncio.to_thread(agent, *wrong)
                assert done.returncode == 2 and wrong[1] in done.stderr, done.stderr

    asyncio.run(run())


def test_two_agents_of_one_folder_are_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            second = AgentProcess(agent.data_dir, manager)
            await second.start()
            assert second.process is not None
            _, errors = await second.process.communicate()
            assert second.process.returncode == 1 and b"already runs" in errors

    asyncio.run(run())
