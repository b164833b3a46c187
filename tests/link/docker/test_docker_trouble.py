"""The engine hangs, or is not there: what runs goes on, and nothing is told of what is not known."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from containers import wire
from containers.nodes import answers, container, kernel, names, node

from dure.fleet.v1 import fleet_pb2

RUNNING, STOPPING = fleet_pb2.KERNEL_PHASE_RUNNING, fleet_pb2.KERNEL_PHASE_STOPPING
# Until its test says so.
WAIT = "until [ -e /home/work/go ]; do sleep 0.1; done"
HEALTHY, UNHEALTHY = fleet_pb2.KERNEL_HEALTH_HEALTHY, fleet_pb2.KERNEL_HEALTH_UNHEALTHY


def test_an_engine_that_hangs_holds_up_nobody_else(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            wire.between(tmp_path / "engine.sock") as line,
            node(tmp_path, engine=line.url) as (
                manager,
                agent,
            ),
        ):
            (manager.storage / "folder-1" / "wait.sh").write_text("sleep 3600\n")
            uids = ("k1", "sick", "going", "dying")
            manager.want(*(kernel(uid) for uid in uids))
            for uid in uids:
                await manager.healthy(uid)
            manager.measure_every(300)
            pid = manager.statuses["sick"].pid
            dying = manager.statuses["dying"].pid
            line.hang()
            heartbeats, began = manager.heartbeats, time.monotonic()
            manager.unwant("going")
            manager.want(kernel("new"))
            # As seen by the kernel itself, in its own /tmp.
            Path(f"/proc/{pid}/root/tmp/{manager.wire('sick')}.sick").touch()
            # Probes go on, and with them the news to the manager.
            await manager.status("sick", lambda s: s.health == UNHEALTHY)
            rounds = len(manager.rounds)
            await manager.until(
                lambda: len(manager.rounds) > rounds + 2 and "cpu_util" in manager.values("k1")
            )
            await asyncio.sleep(max(0.0, began + 4 - time.monotonic()))
            await manager.until(lambda: manager.heartbeats - heartbeats >= 6)
            status = manager.statuses["k1"]
            assert (status.phase, status.health) == (RUNNING, HEALTHY) and await answers(status)
            assert manager.statuses["going"].phase == STOPPING
            assert not any(one.HasField("exit") for one in manager.statuses.values())

            # An end in the meantime is told when it can be known, with its cause.
            child = Path(f"/proc/{dying}/task/{dying}/children").read_text().split()[0]
            os.kill(int(child), signal.SIGKILL)
            await asyncio.sleep(0.5)
            line.go_on()
            ended = (await manager.exited("dying")).exit
            assert (ended.reason, ended.code) == ("SIGNALED", 137)
            await manager.gone("going")
            await manager.healthy("new")
            assert await names(agent) == ["dying", "k1", "new", "sick"]

    asyncio.run(run())


def test_a_start_that_an_engine_does_not_answer_fails_in_time(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            wire.between(tmp_path / "engine.sock") as line,
            node(tmp_path, engine=line.url) as (
                manager,
                agent,
            ),
        ):
            line.hang()
            manager.want(kernel("k1"))
            ended = (await manager.exited("k1")).exit
            assert ended.reason == "START_FAILED" and "did not answer within 10 s" in ended.message, ended
            line.go_on()
            manager.unwant("k1")
            await manager.gone("k1")
            assert await names(agent) == []

    asyncio.run(run())


def test_an_engine_that_is_not_there_for_a_time(tmp_path: Path) -> None:
    """With the agent killed and started meanwhile too."""

    async def run() -> None:
        async with (
            wire.between(tmp_path / "engine.sock") as line,
            node(tmp_path, engine=line.url) as (
                manager,
                agent,
            ),
        ):
            manager.want(kernel("k1"), kernel("k2", f"{WAIT}; exit 5", health_check=None))
            before = await manager.healthy("k1")
            await manager.status("k2", lambda s: s.phase == RUNNING)
            await line.close()
            (agent.kernel_folder("k2") / "home" / "go").touch()
            await asyncio.sleep(3)
            assert not any(one.HasField("exit") for one in manager.statuses.values())
            assert manager.statuses["k1"].health == HEALTHY
            await line.open()
            ended = (await manager.exited("k2")).exit
            assert (ended.reason, ended.code) == ("EXITED", 5)

            await agent.end(signal.SIGKILL)
            line.hang()
            reports = manager.complete_reports
            await agent.start()
            await asyncio.sleep(3)
            assert manager.complete_reports == reports, "it does not say what it does not know"
            line.go_on()
            await manager.until(lambda: manager.complete_reports > reports)
            after = manager.statuses["k1"]
            assert (after.pid, after.port, after.phase) == (before.pid, before.port, RUNNING)
            assert manager.statuses["k2"].exit.code == 5
            assert (await container(agent, "k1"))["State"]["Pid"] == before.pid

    asyncio.run(run())
