"""A watch of endpoints that outlives connections."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator

import grpc.aio

from dure.client.call import Caller
from dure.v1 import endpoint_pb2_grpc
from dure.v1.endpoint_pb2 import WatchEndpointsRequest, WatchEndpointsResponse
from dure.wire.backoff import backoff_s
from dure.wire.errors import Compacted, ManagerUnreachable


async def watch_endpoints(
    caller: Caller, stub: endpoint_pb2_grpc.EndpointServiceAsyncStub, name: str, reconnect_s: float
) -> AsyncGenerator[WatchEndpointsResponse, None]:
    """A snapshot, then every change, through reconnects; see EndpointGroup.watch.

    Goes on after the revision last seen. When that is no longer kept it starts over, and what vanished in
    between is told as `removed`: whoever applies the batches in order is always right.
    """
    known: set[str] = set()
    resume_after = 0
    attempt = 0
    clock = asyncio.get_running_loop().time
    gives_up_at = clock() + caller.retry_s
    while True:
        in_snapshot: set[str] | None = set() if resume_after == 0 else None
        request = WatchEndpointsRequest(name=name, resume_after=resume_after)
        call = stub.WatchEndpoints(request, metadata=caller.metadata)
        try:
            async for batch in call:
                attempt, gives_up_at = 0, clock() + reconnect_s
                if in_snapshot is not None:
                    in_snapshot.update(endpoint.name for endpoint in batch.endpoints)
                    if batch.synced:
                        batch.removed.extend(sorted(known - in_snapshot - set(batch.removed)))
                        known, in_snapshot = in_snapshot, None
                else:
                    known.update(endpoint.name for endpoint in batch.endpoints)
                known.difference_update(batch.removed)
                if batch.synced:
                    resume_after = batch.revision_number
                yield batch
        except grpc.aio.AioRpcError as error:
            translated = caller.translate(error)
            if isinstance(translated, Compacted):
                resume_after = 0
            elif not isinstance(translated, ManagerUnreachable) or clock() > gives_up_at:
                raise translated from None
        finally:
            call.cancel()
        # A stream that a stopping manager ends in order is resumed as well.
        attempt += 1
        await asyncio.sleep(backoff_s(attempt, first_s=0.1, max_s=1.0, jitter=random.random()))
        if clock() > gives_up_at:
            raise ManagerUnreachable(f"no manager answers at {caller.address}: the watch was given up")
