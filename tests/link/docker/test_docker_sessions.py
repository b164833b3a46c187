"""Sessions of several kernels: on one node in a network of their own, over nodes by the names of those."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import own_ports
from agent_fakes import AgentProcess, FakeManager
from containers import engines
from containers.nodes import ask, container, names, node
from test_agent_clusters import JOB, session

from dure.fleet.v1 import fleet_pb2

JOB_COMMAND = ["python", "job.py"]


def networks(agent: AgentProcess) -> list[str]:
    with engines.client() as engine:
        found = engine.networks(filters={"label": [f"dure.home={agent.home}"]})
        return [agent.manager.plain(one["Labels"]["dure.session"]) for one in found]


def of_one_node(*specs: fleet_pb2.KernelSpec) -> list[fleet_pb2.KernelSpec]:
    for spec in specs:
        spec.cluster.one_node = True
    return list(specs)


def test_kernels_of_one_node_meet_in_a_network_of_their_own(tmp_path: Path) -> None:
    async def run() -> None:
        async with node(tmp_path) as (manager, agent):
            (manager.storage / "folder-1" / "job.py").write_text(JOB)
            one = of_one_node(*session("s", 3, 29400, JOB_COMMAND, image=engines.IMAGE))
            # The same ports and names at the same time: nobody meets a stranger.
            other = of_one_node(*session("t", 2, 29400, JOB_COMMAND, image=engines.IMAGE))
            manager.want(*one, *other)
            status = await manager.healthy("s-main1")
            assert json.loads(await ask(status)) == {"0": "main1", "1": "sub1", "2": "sub2"}
            status = await manager.healthy("t-main1")
            assert json.loads(await ask(status)) == {"0": "main1", "1": "sub1"}
            for name in ("s-sub1", "s-sub2"):
                assert await manager.log_of(name, tail_lines=1) == ["met main1"]
            keys = agent.kernel_folder("s-main1") / "home" / ".ssh"
            assert (keys / "authorized_keys").read_text().startswith("ssh-ed25519 AAAA session")
            assert sorted(networks(agent)) == ["s", "t"]

            # An agent that comes back knows to whom a network belongs.
            await agent.end(signal.SIGKILL)
            reports = manager.complete_reports
            await agent.start()
            await manager.until(lambda: manager.complete_reports > reports)
            for spec in one[:2]:
                manager.unwant(spec.uid)
                await manager.gone(spec.uid)
            assert sorted(networks(agent)) == ["s", "t"], "one kernel is still there"
            manager.unwant(one[2].uid)
            await manager.gone(one[2].uid)
            assert networks(agent) == ["t"]

            # A start that fails, and a container that somebody removed, leave no network either.
            broken = of_one_node(*session("u", 2, 29400, ["not-there"], image=engines.IMAGE))
            broken[1].image = "dure-test:none"
            broken[1].image_pull_policy = fleet_pb2.IMAGE_PULL_POLICY_NEVER
            manager.want(*broken)
            for spec in broken:
                await manager.exited(spec.uid)
            with engines.client() as engine:
                engine.remove_container((await container(agent, "t-sub1"))["Id"], force=True)
            assert (await manager.exited("t-sub1")).exit.reason == "LOST"
            for spec in (*broken, *other):
                manager.unwant(spec.uid)
                await manager.gone(spec.uid)
            assert networks(agent) == [] and await names(agent) == []

    asyncio.run(run())


def test_a_session_over_two_nodes(tmp_path: Path) -> None:
    """Two agents of one host stand for two nodes: host networks, leased ports, names in their tables."""

    async def run() -> None:
        async with node(tmp_path) as (manager, agent):
            second = FakeManager(manager.storage)
            await second.start()
            arguments = ("--backend", "docker", "--engine", engines.URL)
            other = AgentProcess(tmp_path / "data", second, *arguments, name="node-2")
            try:
                await other.start()
                await second.until(lambda: second.complete_reports == 1)
                (manager.storage / "folder-1" / "job.py").write_text(JOB)
                addresses = ["localhost", "127.0.0.1"]
                specs = session("s", 2, own_ports.free_port(), JOB_COMMAND, addresses, image=engines.IMAGE)
                for number, spec in enumerate(specs):
                    spec.cluster.local_rank = 0
                    (manager, second)[number].want(spec)
                status = await manager.healthy("s-main1")
                assert status.port in own_ports.sessions()
                assert json.loads(await ask(status)) == {"0": "main1", "1": "sub1"}
                sub = await second.status("s-sub1", lambda s: s.phase == fleet_pb2.KERNEL_PHASE_RUNNING)
                assert sub.port not in (0, status.port)
                for uid, which in (("s-main1", agent), ("s-sub1", other)):
                    assert (await container(which, uid))["HostConfig"]["NetworkMode"] == "host"

                # Killed with its folder gone, an agent knows the leased port from the engine.
                await agent.end(signal.SIGKILL)
                (agent.kernel_folder("s-main1") / "kernel.json").unlink()
                reports = manager.complete_reports
                await agent.start()
                await manager.until(lambda: manager.complete_reports > reports)
                again = await manager.healthy("s-main1")
                assert (again.port, again.pid) == (status.port, status.pid)

                second.unwant("s-sub1")
                await second.gone("s-sub1")
                assert await names(other) == [] and await names(agent) == ["s-main1"]
            finally:
                await other.end(signal.SIGINT)
                await second.stop()
                assert engines.left_behind(other.home) == []

    asyncio.run(run())
