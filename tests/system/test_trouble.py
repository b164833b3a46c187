"""What a SIGKILL may do to whom: nothing that a caller notices."""

from __future__ import annotations

import asyncio
import collections
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from system.cluster import Cluster, cluster, load, until

BACKENDS = pytest.mark.parametrize("backend", ["process", "docker"])


def uids_and_pids(endpoint: dict[str, Any]) -> set[tuple[str, int]]:
    return {(replica["uid"], replica["pid"]) for replica in endpoint["replicas"]}


def healthy(dure: Cluster, count: int) -> dict[str, Any] | None:
    endpoint = dure.get("e")
    good = [replica for replica in endpoint["replicas"] if replica["status"] == "HEALTHY"]
    return endpoint if endpoint["status"] == "HEALTHY" and len(good) == count else None


def assert_answered(counts: collections.Counter[str]) -> None:
    """All requests that could be repeated were. A POST that a replica, or an engine's proxy for it, has taken
    must not be: of those that were under way when it was killed, or came before the engine closed its port,
    some are lost."""
    failed = {told: count for told, count in counts.items() if told != "200"}
    lost = {told for told in failed if told.startswith("POST") and "upstream_closed" in told}
    assert sum(failed.pop(told) for told in lost) <= 12, counts
    assert failed == {}, counts


async def wait(condition: Any, seconds: float, what: str) -> Any:
    return await asyncio.to_thread(until, condition, seconds, what)


@BACKENDS
def test_sigkill_of_replica_manager_agent_and_proxy_under_load(tmp_path: Path, backend: str) -> None:
    async def run(dure: Cluster) -> None:
        dure.model()
        before = dure.serve("e", 2, "--public")
        address = before["address"]
        async with load(address) as counts:
            victim = before["replicas"][0]
            os.kill(victim["pid"], signal.SIGKILL)

            def without_victim() -> dict[str, Any] | None:
                endpoint = healthy(dure, 2)
                there = endpoint and victim["uid"] in {replica["uid"] for replica in endpoint["replicas"]}
                return None if there else endpoint

            replaced = await wait(without_victim, 20, "the replica is replaced")

            dure.kill("manager")
            await asyncio.sleep(1)
            dure.start("manager")
            await wait(lambda: _answers(dure), 20, "the manager is back")
            after = await wait(lambda: healthy(dure, 2), 20, "all is as it was")
            assert uids_and_pids(after) == uids_and_pids(replaced)

            dure.kill("agent-1")
            await asyncio.sleep(4)
            assert uids_and_pids(dure.get("e")) == uids_and_pids(replaced)
            dure.start("agent")
            await wait(lambda: _alive(dure) == 1, 15, "the agent is back")
            after = await wait(lambda: healthy(dure, 2), 20, "it adopted its sessions")
            assert uids_and_pids(after) == uids_and_pids(replaced)
        assert_answered(counts)
        assert counts["200"] > 300

        # The true exit of one that died while the agent was away.
        dure.kill("agent-1")
        os.kill(after["replicas"][0]["pid"], signal.SIGKILL)
        dure.start("agent")
        await wait(lambda: "SIGKILL" in dure.dure("endpoint", "events", "e"), 15, "the exit is told")
        await wait(lambda: healthy(dure, 2), 20, "it is replaced")

        dure.kill("manager")
        dure.kill("proxy-1")
        await asyncio.sleep(0.5)
        dure.start("proxy")
        async with load(address, workers=1) as counts:
            await wait(lambda: counts["200"] > 20, 15, "the proxy serves from its disk")
        dure.start("manager")
        await wait(lambda: _answers(dure), 20, "the manager is back")
        await wait(lambda: healthy(dure, 2), 20, "all is as it was")

    with cluster(tmp_path / "d", backend=backend) as dure:
        asyncio.run(run(dure))


@BACKENDS
def test_a_dead_agent_is_replaced_first_and_leaves_then(tmp_path: Path, backend: str) -> None:
    async def run(dure: Cluster) -> None:
        dure.model()
        before = dure.serve("e", 2, "--public")
        assert {replica["node"] for replica in before["replicas"]} == {"agent-1", "agent-2"}
        lost = next(replica for replica in before["replicas"] if replica["node"] == "agent-1")
        async with load(before["address"]) as counts:
            dure.kill("agent-1")

            def moved() -> dict[str, Any] | None:
                endpoint = healthy(dure, 2)
                gone = endpoint and lost["uid"] not in {r["uid"] for r in endpoint["replicas"]}
                return endpoint if gone else None

            after = await wait(moved, 60, "a replacement serves on the other agent")
        assert {replica["node"] for replica in after["replicas"]} == {"agent-2"}
        assert set(counts) == {"200"}, counts
        # Back at last, it stops what is not wanted any more.
        dure.start("agent", "--name", "agent-1")
        await wait(lambda: _alive(dure) == 2, 15, "the agent is back")
        await wait(lambda: not os.path.exists(f"/proc/{lost['pid']}"), 20, "the old session is stopped")
        assert healthy(dure, 2)

    with cluster(tmp_path / "d", agents=2, backend=backend) as dure:
        asyncio.run(run(dure))


def _answers(dure: Cluster) -> bool:
    try:
        dure.dure("endpoint", "list", timeout_s=15)
    except AssertionError:
        return False
    return True


def _alive(dure: Cluster) -> int:
    import json

    agents = json.loads(dure.dure("agent", "list", "-o", "json"))["agents"]
    return sum(1 for agent in agents if agent["status"] == "ALIVE")
