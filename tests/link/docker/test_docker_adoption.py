"""The agent is killed and comes back: containers are adopted, by what stands on them if need be."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

from agent_fakes import FakeManager, alive
from containers import engines
from containers.nodes import ask, container, kernel, names, node

from dure.fleet.v1 import fleet_pb2
from dure.fleet.v1.fleet_pb2 import PreStartAction

SLEEP = ["sleep", "3600"]
WAIT = "until [ -e /home/work/go ]; do sleep 0.1; done"


async def came_back(manager: FakeManager, reports: int) -> None:
    await manager.until(lambda: manager.complete_reports > reports)


def test_adoption_and_true_ends(tmp_path: Path) -> None:
    async def run() -> None:
        async with node(tmp_path) as (manager, agent):
            uids = ["served", "killed", "exited", "hog", "by-hand", "forgotten"]
            manager.want(kernel("served"), kernel("forgotten"))
            small = {"cpu": 1000, "mem": 96 * 2**20 * 1000}
            manager.want(
                kernel("killed", SLEEP, health_check=None),
                kernel("exited", f"{WAIT}; echo last; exit 7", health_check=None),
                kernel("hog", f"{WAIT}; tail /dev/zero", health_check=None, slots=small),
                kernel("by-hand", SLEEP, health_check=None),
            )
            before = {uid: await manager.healthy(uid) for uid in ("served", "forgotten")}
            for uid in uids:
                await manager.status(uid, lambda s: s.phase == fleet_pb2.KERNEL_PHASE_RUNNING)
            killed, by_hand = await container(agent, "killed"), await container(agent, "by-hand")
            await agent.end(signal.SIGKILL)
            with engines.client() as engine:
                engine.kill(killed["Id"], "SIGTERM")
                engine.remove_container(by_hand["Id"], force=True)
                for uid in ("exited", "hog"):
                    (agent.kernel_folder(uid) / "home" / "go").touch()
                # All that the agent knew of it: only the engine has it still.
                shutil.rmtree(agent.kernel_folder("forgotten"))
                for uid in ("exited", "hog"):
                    engine.wait((await container(agent, uid))["Id"], timeout=30)
            reports = manager.complete_reports
            # A manager that has lost interest in nothing.
            await agent.start()
            await came_back(manager, reports)
            for uid in ("served", "forgotten"):
                after = manager.statuses[uid]
                assert (after.pid, after.port) == (before[uid].pid, before[uid].port), uid
                assert after.phase == fleet_pb2.KERNEL_PHASE_RUNNING
                await manager.healthy(uid)
                assert (await ask(after)).endswith("8000")
            ends = {uid: (await manager.exited(uid)).exit for uid in ("killed", "exited", "hog", "by-hand")}
            assert (ends["killed"].reason, ends["killed"].code) == ("SIGNALED", 143)
            assert (ends["exited"].reason, ends["exited"].code) == ("EXITED", 7)
            assert ends["exited"].log_tail == "last\n"
            assert ends["hog"].reason == "OOM", ends["hog"]
            assert ends["by-hand"].reason == "LOST", ends["by-hand"]
            for uid in uids:
                manager.unwant(uid)
            for uid in uids:
                await manager.gone(uid)
            assert await names(agent) == []

    asyncio.run(run())


def test_health_goes_on_where_it_was(tmp_path: Path) -> None:
    async def run() -> None:
        async with node(tmp_path) as (manager, agent):
            manager.want(kernel("k1"))
            before = await manager.healthy("k1")
            await agent.end(signal.SIGTERM)
            assert alive(before.pid), "a stop of the agent is none of its sessions"
            manager.history.clear()
            reports = manager.complete_reports
            await agent.start()
            await came_back(manager, reports)
            seen = [status for status in manager.history if status.uid == "k1"]
            assert {status.health for status in seen} == {fleet_pb2.KERNEL_HEALTH_HEALTHY}, seen
            assert {status.pid for status in seen} == {before.pid}

    asyncio.run(run())


def test_a_kill_at_any_moment_of_a_start(tmp_path: Path) -> None:
    """Kernels end up running, each in one container, with all of their actions done once after another."""
    slow = [
        PreStartAction(run_command=fleet_pb2.RunCommand(command=["sleep", "0.2"], check=True)),
        PreStartAction(write_file=fleet_pb2.WriteFile(filename="/home/work/done", body="x", mode=0o644)),
    ]

    async def run() -> None:
        async with node(tmp_path) as (manager, agent):
            kernels: list[str] = []
            for moment in range(6):
                kernels += [f"plain-{moment}", f"gated-{moment}"]
                reports = manager.complete_reports
                manager.want(kernel(kernels[-2]), kernel(kernels[-1], pre_start_actions=slow))
                await asyncio.sleep(moment * 0.2)
                await agent.end(signal.SIGKILL)
                await agent.start()
                await came_back(manager, reports)
                if moment % 3 == 2:
                    for uid in kernels:
                        status = await manager.healthy(uid)
                        assert await ask(status)
                    assert await names(agent) == sorted(kernels)
                    for uid in kernels:
                        if uid.startswith("gated"):
                            assert (agent.kernel_folder(uid) / "home" / "done").read_text() == "x"
                        manager.unwant(uid)
                    for uid in kernels:
                        await manager.gone(uid)
                    kernels = []
            assert await names(agent) == []

    asyncio.run(run())


def test_what_is_somebody_elses_is_not_touched(tmp_path: Path) -> None:
    """Containers with all labels but another agent's uid, or another folder."""

    async def run() -> None:
        async with node(tmp_path) as (manager, agent):
            manager.want(kernel("k1"))
            await manager.healthy("k1")
            ours = (await container(agent, "k1"))["Config"]["Labels"]
            strange = {"dure.home": f"{ours['dure.home']}-2"}, {"dure.agent-uid": "another"}
            broken = {**ours, "dure.kernel": "k2", "dure.spec": "bm90IGl0"}
            with engines.client() as engine:
                made = []
                try:
                    for labels in ({**ours, **strange[0]}, {**ours, **strange[1]}, broken):
                        one = engine.create_container(engines.IMAGE, SLEEP, labels=labels)
                        engine.start(one)
                        made.append(one["Id"])
                    await agent.end(signal.SIGKILL)
                    reports = manager.complete_reports
                    await agent.start()
                    await came_back(manager, reports)
                    await manager.healthy("k1")
                    manager.unwant("k1")
                    await manager.gone("k1")
                    left = {one["Id"] for one in engine.containers(all=True)}
                    assert set(made[:2]) <= left, "somebody else's"
                    assert made[2] not in left, "its own, of which nothing can be known"
                finally:
                    for one in made:
                        try:
                            engine.remove_container(one, force=True)
                        except engines.NotFound:
                            continue

    asyncio.run(run())
