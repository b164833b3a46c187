"""Logs of an endpoint's sessions, followed through reconnects."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator

import grpc.aio

from dure.client.call import Caller
from dure.v1 import endpoint_pb2_grpc
from dure.v1.endpoint_pb2 import LogChunk, ReadLogsRequest
from dure.wire.backoff import backoff_s
from dure.wire.errors import ManagerUnreachable, NotFound
from dure.wire.seen import LinesSeen

# Logs whose place is remembered over a reconnect; of one that was forgotten lines may come twice.
PLACES_MAX = 10_000


async def read_logs(
    caller: Caller,
    stub: endpoint_pb2_grpc.EndpointServiceAsyncStub,
    request: ReadLogsRequest,
    reconnect_s: float,
) -> AsyncGenerator[LogChunk, None]:
    """See EndpointGroup.logs."""
    places: dict[tuple[str, str], LinesSeen] = {}
    clock = asyncio.get_running_loop().time
    began = clock()
    gives_up_at = began + caller.retry_s
    attempt = 0
    asked = ReadLogsRequest()
    asked.CopyFrom(request)
    while True:
        call = stub.ReadLogs(asked, metadata=caller.metadata)
        try:
            async for response in call:
                attempt, gives_up_at = 0, clock() + reconnect_s
                chunk = _new(response.chunk, places)
                if chunk.lines or chunk.notice:
                    yield chunk
            return
        except grpc.aio.AioRpcError as error:
            translated = caller.translate(error)
            if isinstance(translated, NotFound) and places:
                # Deleted meanwhile: nothing more can come.
                return
            stopped = error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
            if not stopped or clock() > gives_up_at or (places and not request.follow):
                raise translated from None
        finally:
            call.cancel()
        attempt += 1
        await asyncio.sleep(backoff_s(attempt, first_s=0.1, max_s=1.0, jitter=random.random()))
        if clock() > gives_up_at:
            raise ManagerUnreachable(f"no manager answers at {caller.address}: the logs were given up")
        for place in places.values():
            place.begin_again()
        if places:
            # Everything from the same moment on as before; what was shown is left out here.
            asked.tail_lines = 0
        if request.HasField("max_age"):
            asked.max_age.FromNanoseconds(request.max_age.ToNanoseconds() + round((clock() - began) * 1e9))


def _new(chunk: LogChunk, places: dict[tuple[str, str], LinesSeen]) -> LogChunk:
    """The chunk without the lines that were shown already."""
    key = (chunk.replica, chunk.kernel)
    if key not in places and len(places) >= PLACES_MAX:
        del places[next(iter(places))]
    place = places.setdefault(key, LinesSeen())
    lines = [line for line in chunk.lines if place.is_new(line.time.ToMilliseconds())]
    return LogChunk(replica=chunk.replica, kernel=chunk.kernel, notice=chunk.notice, lines=lines)
