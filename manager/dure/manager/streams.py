"""What the streams of agents and of proxies have in common: a hello first, then both directions at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc.aio

from dure.wire import errors

HELLO_WAIT_S = 10.0
SENDING_WAIT_S = 30.0


async def read_hello(context: Any, who: str) -> Any:
    """The hello of a stream's first message. Raises InvalidInput for anything else."""
    async with asyncio.timeout(HELLO_WAIT_S):
        first = await context.read()
    if first is grpc.aio.EOF or not first.HasField("hello"):
        raise errors.InvalidInput(f"the first message of {who}'s stream must be its hello")
    return first.hello


async def send(context: Any, sending: asyncio.Lock, message: Any) -> None:
    """Sends one message; gRPC takes them one at a time. A peer that takes nothing for too long is cut off."""
    async with asyncio.timeout(SENDING_WAIT_S), sending:
        await context.write(message)


async def serve(who: str, replaced: asyncio.Event, *directions: Coroutine[Any, Any, None]) -> None:
    """Runs both directions until one ends or fails. Raises Conflict once a newer stream took over."""
    tasks = [asyncio.create_task(each) for each in (*directions, _wait(replaced))]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
    if replaced.is_set():
        raise errors.Conflict(f"a newer stream of this {who} took over")


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
