"""Streams about an endpoint that are not a watch: a validation, events as they happen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import grpc.aio

from dure.client.call import Caller
from dure.v1 import endpoint_pb2_grpc
from dure.v1.endpoint_pb2 import Event, ValidateEndpointRequest, ValidateEndpointResponse
from dure.wire.errors import ManagerUnreachable, NotFound

POLL_S = 1.0
# Events may be stored a little out of order: look at so many again each time.
LOOK_BACK = 200
LOST_S = 60.0
# What a validation may take beyond its session's time limit: placing, starting, cleaning up.
VALIDATION_MARGIN_S = 60.0


async def validation(
    caller: Caller, stub: endpoint_pb2_grpc.EndpointServiceAsyncStub, request: ValidateEndpointRequest
) -> AsyncGenerator[ValidateEndpointResponse, None]:
    """Its pieces, the outcome last. Never repeated: each call would start a session of its own."""
    await caller.connect(caller.retry_s)
    timeout_s = request.timeout.ToNanoseconds() / 1e9 + VALIDATION_MARGIN_S
    call = stub.ValidateEndpoint(request, timeout=timeout_s, metadata=caller.metadata)
    try:
        async for piece in call:
            yield piece
            if piece.WhichOneof("piece") == "outcome":
                return
    except grpc.aio.AioRpcError as error:
        raise caller.translate(error) from None
    finally:
        call.cancel()
    raise ManagerUnreachable("the manager ended the validation before its outcome: it was stopped")


async def new_events(
    newest_first: Callable[[float | None], AsyncGenerator[Event, None]], max_age_s: float | None
) -> AsyncGenerator[Event, None]:
    """See EndpointGroup.follow_events. Asks every second: events have no watch."""
    seen: dict[str, None] = {}
    clock = asyncio.get_running_loop().time
    gives_up_at, first = clock(), True
    while True:
        news: list[Event] = []
        try:
            async with aclosing(newest_first(max_age_s)) as events:
                looked = 0
                async for event in events:
                    looked += 1
                    if event.name not in seen:
                        news.append(event)
                    elif looked >= LOOK_BACK:
                        break
            gives_up_at = clock() + LOST_S
        except NotFound:
            if first:
                raise
            return
        except ManagerUnreachable:
            if clock() > gives_up_at:
                raise
        for event in reversed(news):
            yield event
        seen.update((event.name, None) for event in reversed(news))
        for name in list(seen)[: -5 * LOOK_BACK]:
            del seen[name]
        first = False
        await asyncio.sleep(POLL_S)
