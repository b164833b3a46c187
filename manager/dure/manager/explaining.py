"""Why an endpoint is as it is, and what of each node stands in the way of another replica."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import advising, placement, placing, schema, views
from dure.manager.model import AgentStatus, EndpointStatus, KernelPhase
from dure.manager.placement import Node, Request
from dure.v1 import endpoint_pb2
from dure.wire.quantities import human_slot

_FINE = "all replicas that are wanted are healthy"


async def explain(
    session: AsyncSession, row: schema.Endpoint, statuses: Mapping[str, AgentStatus]
) -> endpoint_pb2.ExplainEndpointResponse:
    """About the wanted revision, by the nodes as they are now."""
    revision = await session.get_one(schema.Revision, (row.uid, row.revision))
    kernels = await session.scalars(
        select(schema.Kernel).where(
            schema.Kernel.endpoint_uid == row.uid, schema.Kernel.phase != KernelPhase.GONE
        )
    )
    request = await placing.request(session, revision, placing.peers(kernels))
    nodes = await views.nodes(session, request.resource_group, statuses)
    found = placement.explain(request, nodes)
    response = endpoint_pb2.ExplainEndpointResponse(
        summary=f"{row.status}: {row.status_reason or _FINE}",
        request=needs(request),
        advice=_advice(row, request, nodes, found),
    )
    for node, reason in found:
        response.nodes.add(node=node, fits=not reason, reason=reason)
    return response


def needs(request: Request) -> str:
    """What a replica needs, for people."""
    slots = ", ".join(f"{slot} {human_slot(slot, amount)}" for slot, amount in sorted(request.slots.items()))
    kernels = ""
    if request.size > 1:
        where = "on several nodes" if request.several_nodes else "on one node"
        kernels = f"{request.size} kernels {where}, each with "
    parts = [f"{kernels}{slots} in resource group `{request.resource_group}`"]
    if request.architecture:
        parts.append(f"architecture {request.architecture}")
    if request.enforcement:
        parts.append(f"shares with at least `{request.enforcement}` enforced")
    if request.strict:
        parts.append(f"the profile `strict`, which {request.strict} asks for")
    if request.fixed_port:
        parts.append(f"port {request.fixed_port} of its host")
    return ", ".join(parts)


def _advice(
    row: schema.Endpoint, request: Request, nodes: list[Node], found: list[tuple[str, str]]
) -> list[str]:
    lines = []
    status = EndpointStatus(row.status)
    if status is EndpointStatus.BLOCKED:
        if newest := row.last_error or next(iter(reversed(row.errors)), ""):
            lines.append(f"its last error: {newest}")
        lines.append(f"read what the replicas wrote: dure endpoint logs {row.name} --previous")
        lines.append(f"then mend it, and clear the errors: dure endpoint retry {row.name}")
    elif status is EndpointStatus.STOPPED:
        lines.append(f"start it: dure endpoint scale {row.name} 1")
    elif status is EndpointStatus.UNHEALTHY:
        lines.append(f"read what the replicas write: dure endpoint logs {row.name}")
    if not nodes or status not in (EndpointStatus.STOPPED, EndpointStatus.HEALTHY):
        lines += advising.advice(row.name, request, nodes)
    if status is EndpointStatus.PENDING and request.size > 1 and not all(reason for _, reason in found):
        lines.append(
            f"there is room for a kernel, but not for all {request.size}: ask for less with "
            f"dure endpoint update {row.name} -r SLOT=AMOUNT, or make room"
        )
    return lines
