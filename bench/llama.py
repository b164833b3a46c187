"""A real llama.cpp endpoint under chat load, scaled up by its own metrics and down again when idle."""

from __future__ import annotations

import asyncio
import itertools

import aiohttp

from bench.world import cluster
from dure.client import Client
from dure.client.demo.model import fetch_model
from dure.client.demo.steps import model_files
from dure.v1 import folder_pb2
from dure.v1.endpoint_pb2 import Endpoint
from dure.v1.scaling_pb2 import ScalingDecision

CHATS, COOLDOWN_S, TIMEOUT_S = 6, 5, 180
METRIC = "llamacpp:requests_processing"


async def chat(session: aiohttp.ClientSession, address: str, number: int) -> int:
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": f"Tell me a story about the number {number}."}],
        "max_tokens": 48,
    }
    async with session.post(f"{address}/v1/chat/completions", json=body) as response:
        await response.read()
        return response.status


async def until(client: Client, wanted: int) -> Endpoint:
    """Waits for so many replicas that serve, and no more."""
    async with asyncio.timeout(TIMEOUT_S):
        async for batch in client.endpoints.watch("llama"):
            for endpoint in batch.endpoints:
                if endpoint.ready_replicas == endpoint.desired_replicas == wanted:
                    return endpoint
    raise AssertionError("a watch does not end")


async def scaled(client: Client) -> tuple[list[int], list[ScalingDecision]]:
    """Statuses of all chats, and what was decided."""
    await client.folders.create("llama", folder_pb2.FOLDER_USAGE_MODEL)
    await client.folders.upload("llama", model_files(await fetch_model()))
    endpoint = await client.endpoints.create(
        "llama", model="llama", replicas=1, open_to_public=True, resource_slots={"cpu": "0.5", "mem": "1g"}
    )
    await client.endpoints.wait("llama", timeout_s=TIMEOUT_S)
    limits = {"min_replicas": 1, "max_replicas": 2, "cooldown": COOLDOWN_S}
    source = "inference-framework"
    await client.rules.add("llama", "busy", source=source, metric=METRIC, above=1, step=1, **limits)
    await client.rules.add(
        "llama", "calm", source=source, metric=METRIC, below=1, step=-1, window=5, **limits
    )
    stop, statuses, numbers = asyncio.Event(), [], itertools.count()
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def talk() -> None:
            while not stop.is_set():
                statuses.append(await chat(session, endpoint.address, next(numbers)))

        talking = [asyncio.create_task(talk()) for _ in range(CHATS)]
        try:
            await until(client, 2)
        finally:
            stop.set()
            await asyncio.gather(*talking)
    await until(client, 1)
    found = await client.rules.explain("llama")
    return statuses, list(reversed(found.decisions))


async def run() -> tuple[list[int], list[ScalingDecision]]:
    async with cluster() as running, running.client() as client:
        return await scaled(client)


def main() -> None:
    statuses, decisions = asyncio.run(run())
    failed = sum(1 for status in statuses if status != 200)
    print(f"llama: {len(statuses)} chats with a real model, {failed} failed")
    for decision in decisions:
        when = decision.time.ToDatetime().strftime("%H:%M:%S")
        print(f"  {when} {decision.cause}: {decision.reason}")


if __name__ == "__main__":
    main()
