"""Waits for an endpoint: to be as it is wanted, or to be gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from dure.client.waiting import judge, summary
from dure.v1.endpoint_pb2 import Endpoint, WatchEndpointsResponse
from dure.wire.errors import DureError, NotFound, TimedOut

Notify = Callable[[Endpoint], None]
Batches = AsyncGenerator[WatchEndpointsResponse, None]


async def until_ready(
    full_name: str, batches: Batches, timeout_s: float, notify: Notify | None, revision: int | None
) -> Endpoint:
    """See EndpointGroup.wait. Closes `batches`."""
    newest: Endpoint | None = None
    try:
        async with asyncio.timeout(timeout_s), aclosing(batches):
            async for batch in batches:
                for newest in batch.endpoints:
                    if notify:
                        notify(newest)
                    verdict = judge(newest, revision)
                    if verdict.failed:
                        raise DureError(verdict.failed, reason=verdict.reason)
                    if verdict.done:
                        return newest
                if full_name in batch.removed or (batch.synced and newest is None):
                    raise NotFound(f"endpoint {_short(full_name)} is gone")
    except TimeoutError:
        raise _timed_out(full_name, "ready", timeout_s, newest) from None
    raise AssertionError("a watch does not end")


async def until_gone(full_name: str, batches: Batches, timeout_s: float, notify: Notify | None) -> None:
    """See EndpointGroup.wait_gone. Closes `batches`."""
    newest: Endpoint | None = None
    uid = ""
    try:
        async with asyncio.timeout(timeout_s), aclosing(batches):
            async for batch in batches:
                for newest in batch.endpoints:
                    uid = uid or newest.uid
                    if newest.uid != uid:  # a new one has taken the name
                        return
                    if notify:
                        notify(newest)
                if full_name in batch.removed or (batch.synced and newest is None):
                    return
    except NotFound:
        return
    except TimeoutError:
        raise _timed_out(full_name, "gone", timeout_s, newest) from None


def _timed_out(full_name: str, state: str, timeout_s: float, newest: Endpoint | None) -> TimedOut:
    return TimedOut(
        f"endpoint {_short(full_name)} is not {state} after {timeout_s:g} s"
        + (f": {summary(newest)}" if newest is not None else ""),
        reason="WAIT_TIMED_OUT",
    )


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1]
