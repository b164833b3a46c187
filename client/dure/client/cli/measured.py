"""What is measured, beside what is listed."""

from __future__ import annotations

from dure.client.client import Client
from dure.v1.scaling_pb2 import EndpointMeasurements
from dure.wire.errors import DureError


async def measured(client: Client) -> dict[str, EndpointMeasurements]:
    """What is measured by endpoint; nothing where that cannot be asked."""
    try:
        answer = await client.measurements()
    except DureError:
        # Lists must not fail for a column: of a manager without measurements it stays empty.
        return {}
    return {one.endpoint: one for one in answer.endpoints}
