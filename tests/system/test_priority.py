"""Who waits for a place with a higher priority gets it first, however late it came."""

from __future__ import annotations

import asyncio

from system.cluster import HELLO, Cluster

from dure.client import Client


def test_the_higher_priority_goes_first(dure: Cluster) -> None:
    dure.model("prio", HELLO)

    async def run() -> None:
        async with Client.from_context(dure.data_dir / "context.toml") as client:
            agents = [agent async for agent in client.agents.list()]
            cpu = min(float(slot.capacity) for agent in agents for slot in agent.slots if slot.slot == "cpu")
            large = {"cpu": f"{cpu * 0.9:.2f}", "mem": "64m"}
            await client.endpoints.create("filler", model="prio", replicas=2, resource_slots=large)
            await client.endpoints.wait("filler", timeout_s=60)
            for name, priority in (("low", 10), ("high", 90)):
                await client.endpoints.create(
                    name, model="prio", replicas=1, resource_slots=large, priority=priority
                )
                await pending(client, name)
            found = await client.endpoints.explain("low")
            assert len(found.nodes) == 2 and not any(node.fits for node in found.nodes)
            assert all("cpu" in node.reason for node in found.nodes)
            await client.endpoints.update("filler", replicas=1)
            await client.endpoints.wait("high", timeout_s=60)
            assert not (await client.endpoints.get("low")).replicas[0].kernels
            await client.endpoints.update("filler", replicas=0)
            await client.endpoints.wait("low", timeout_s=60)
            for name in ("filler", "low", "high"):
                await client.endpoints.delete(name)
                await client.endpoints.wait_gone(name, timeout_s=60)

    async def pending(client: Client, name: str) -> None:
        async with asyncio.timeout(20):
            async for batch in client.endpoints.watch(name):
                if any("no node has room" in endpoint.status_reason for endpoint in batch.endpoints):
                    return

    asyncio.run(run())
