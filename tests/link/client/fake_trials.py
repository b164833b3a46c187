"""ValidateEndpoint and ExplainEndpoint of the fake manager."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from grpc_status import rpc_status
from link.client.fake_state import FakeManager, refuses

from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import Endpoint, ValidateEndpointResponse
from dure.wire.errors import DureError, NotFound, to_status


class Trials:
    """The part of EndpointService that tries things out."""

    fake: FakeManager
    # Of the class that this is a part of.
    find: Callable[[str], Endpoint]

    async def ValidateEndpoint(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Says what `fake.validation` holds; without an outcome in it, goes on until the caller leaves."""
        fake = self.fake
        fake.validations.append(request)
        fake.sessions += 0 if request.dry_run else 1
        try:
            fake.authenticate(context)
            if f"{request.parent}/folders/{request.endpoint.model}" not in fake.folders:
                raise NotFound(f"there is no folder `{request.endpoint.model}`")
            for piece in fake.validation:
                yield piece
                if piece.WhichOneof("piece") == "outcome":
                    return
            while True:
                await asyncio.sleep(0.05)
        except DureError as error:
            await context.abort_with_status(rpc_status.to_status(to_status(error)))
        finally:
            fake.sessions -= 0 if request.dry_run else 1

    @refuses
    async def ExplainEndpoint(self, request: Any, context: Any) -> endpoint_pb2.ExplainEndpointResponse:
        self.find(request.name)
        return self.fake.explanation


def pieces(result: str, health: str) -> list[ValidateEndpointResponse]:
    """An event, some lines, and how it ended."""
    log = endpoint_pb2.LogChunk(replica="r", kernel="main1", notice="older lines are not kept")
    log.lines.add(text="loading \x1b[31mweights")
    return [
        ValidateEndpointResponse(event=endpoint_pb2.Event(reason="REPLICA_PLACED", message="on agent-1")),
        ValidateEndpointResponse(log=log),
        ValidateEndpointResponse(
            outcome=endpoint_pb2.ValidationOutcome(
                result=endpoint_pb2.ValidationResult.Value(f"VALIDATION_RESULT_{result}"),
                health=endpoint_pb2.Health.Value(f"HEALTH_{health}"),
                detail="the probe answered 200",
            )
        ),
    ]
