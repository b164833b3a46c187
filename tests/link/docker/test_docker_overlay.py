"""Sessions over nodes whose engines are one swarm: a network over them, made and removed by its managers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from agent_fakes import AgentProcess, FakeManager
from containers import engines, swarms
from containers.engines import OwnEngine
from containers.nodes import names, node
from test_agent_clusters import session

from dure.agent.backends.docker.engine import Engine
from dure.agent.backends.docker.labels import Owner
from dure.agent.backends.docker.networks import Networks
from dure.fleet.v1 import fleet_pb2

IMAGE = "dure-test-small:1"
RUNNING = fleet_pb2.KERNEL_PHASE_RUNNING
# main1 hears who it is from sub1, at the rendezvous, and then serves; sub1 finds main1 by its name.
MEET = """
if [ $BACKENDAI_CLUSTER_ROLE = main ]; then
  echo "$(/busybox nc -l -p $MASTER_PORT) is here"
  while true; do echo served | /busybox nc -l -p $PORT; done
fi
until echo $BACKENDAI_CLUSTER_HOST | /busybox nc $MASTER_ADDR $MASTER_PORT; do /busybox sleep 0.1; done
echo "met main1 as $(/busybox hostname)"
/busybox sleep 1000
"""
COMMAND = ["/busybox", "sh", "-c", MEET]
ASK = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10) as connection:
    print(connection.makefile().readline().strip())
"""


def overlays(engine: OwnEngine) -> list[str]:
    """Sessions, as on the wire, that have a network there."""
    with engines.client(engine.url) as client:
        return [one["Labels"]["dure.session"] for one in client.networks(filters={"label": ["dure.session"]})]


async def become(engine: OwnEngine, *sessions: str) -> None:
    """A swarm removes what it was told to a moment later."""
    for _ in range(50):
        if sorted(overlays(engine)) == sorted(sessions):
            return
        await asyncio.sleep(0.1)
    assert sorted(overlays(engine)) == sorted(sessions)


def spanning(name: str) -> list[fleet_pb2.KernelSpec]:
    specs = session(name, 2, 29400, COMMAND, image=IMAGE)
    for spec in specs:
        spec.cluster.local_rank = 0
        spec.cluster.overlay = True
    return specs


@contextlib.asynccontextmanager
async def two_nodes(
    tmp_path: Path, engine: OwnEngine, other_engine: OwnEngine, *options: str
) -> AsyncIterator[tuple[FakeManager, AgentProcess, FakeManager, AgentProcess]]:
    async with node(tmp_path, *options, engine=engine.url) as (manager, agent):
        second = FakeManager(manager.storage, mark=manager.mark)
        await second.start()
        arguments = ("--backend", "docker", "--engine", other_engine.url)
        other = AgentProcess(tmp_path / "data", second, *arguments, name="node-2")
        try:
            await other.start()
            await second.until(lambda: second.complete_reports == 1)
            yield manager, agent, second, other
        finally:
            await other.end(signal.SIGINT, 30.0)
            await second.stop()
            assert engines.left_behind(other.home, other_engine.url) == []


async def meet(manager: FakeManager, second: FakeManager, name: str) -> fleet_pb2.KernelStatus:
    status = await manager.status(f"{name}-main1", lambda s: s.phase == RUNNING, 30.0)
    await second.status(f"{name}-sub1", lambda s: s.phase == RUNNING, 30.0)
    async with asyncio.timeout(30.0):
        while await manager.log_of(f"{name}-main1") != ["sub1 is here"]:
            await asyncio.sleep(0.1)
    async with asyncio.timeout(30.0):
        # After what it said of main1 while that did not listen yet.
        while (await second.log_of(f"{name}-sub1", tail_lines=1)) != ["met main1 as sub1"]:
            await asyncio.sleep(0.1)
    return status


def test_kernels_of_a_session_over_a_swarm_meet_in_a_network_of_its_own(tmp_path: Path) -> None:
    async def run(first: OwnEngine, worker: OwnEngine) -> None:
        async with two_nodes(tmp_path, first, worker) as (manager, agent, second, _):
            hello, other_hello = manager.hello, second.hello
            assert hello is not None and other_hello is not None
            assert hello.overlay and hello.overlay == other_hello.overlay
            assert (hello.makes_overlay, other_hello.makes_overlay) == (True, False)

            main, sub = spanning("s")
            second.want(sub)
            # A worker can but try; it says why nothing moves.
            await second.status("s-sub1", lambda s: "waiting for the network" in s.message, 30.0)
            assert overlays(first) == []
            manager.want(main)
            status = await meet(manager, second, "s")
            said = await asyncio.to_thread(
                swarms.inside, first, [sys.executable, "-c", ASK, str(status.port)]
            )
            assert said == "served\n"

            # The same names and ports in another session at the same time.
            main, sub = spanning("t")
            manager.want(main)
            second.want(sub)
            await meet(manager, second, "t")
            await become(first, manager.wire("s"), manager.wire("t"))

            # One that was killed knows its kernel's port and network from the engine.
            await agent.end(signal.SIGKILL)
            reports = manager.complete_reports
            await agent.start()
            await manager.until(lambda: manager.complete_reports > reports, 30.0)
            again = await manager.status("s-main1", lambda s: s.phase == RUNNING and s.port > 0)
            assert (again.port, again.pid) == (status.port, status.pid)

            # The last one out removes it, if its engine can.
            second.unwant("s-sub1")
            await second.gone("s-sub1")
            manager.unwant("s-main1")
            await manager.gone("s-main1")
            await become(first, manager.wire("t"))

            # Else who made it does, when it looks for what is left: not before.
            manager.unwant("t-main1")
            await manager.gone("t-main1")
            networks, owner = Networks(Engine(first.url)), Owner("agent-uid", str(agent.home.absolute()))
            await networks.tidy(owner)
            assert overlays(first) == [manager.wire("t")]
            second.unwant("t-sub1")
            await second.gone("t-sub1")
            await networks.tidy(owner)
            await become(first)

    with swarms.two() as (first, worker):
        asyncio.run(run(first, worker))


def test_a_kernel_that_goes_before_its_session_has_a_network(tmp_path: Path) -> None:
    async def run(first: OwnEngine, worker: OwnEngine) -> None:
        async with two_nodes(tmp_path, first, worker, "--no-overlay") as (manager, agent, second, other):
            # What the one does not offer, the manager does not ask of both.
            assert manager.hello is not None and second.hello is not None
            assert (manager.hello.overlay, manager.hello.makes_overlay) == ("", False)
            assert second.hello.overlay != ""

            main, sub = spanning("s")
            second.want(sub)
            await second.status("s-sub1", lambda s: "waiting for the network" in s.message, 30.0)
            second.unwant("s-sub1")
            await second.gone("s-sub1")

            # The network is made before what may take long; a start that fails there leaves none.
            main.image = "dure-test:none"
            main.image_pull_policy = fleet_pb2.IMAGE_PULL_POLICY_NEVER
            manager.want(main)
            assert (await manager.exited("s-main1")).exit.reason == "IMAGE_FAILED"
            manager.unwant("s-main1")
            await manager.gone("s-main1")
            await become(first)

            assert await names(agent) == [] and await names(other) == []

    with swarms.two() as (first, worker):
        asyncio.run(run(first, worker))
