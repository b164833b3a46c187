"""Endpoints, replicas and revisions as their users see them: rows gathered from the store."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import messages, schema, views
from dure.manager.model import ReplicaStatus
from dure.v1 import endpoint_pb2

REPLICAS_SHOWN = 1000


async def shown(
    session: AsyncSession, project: str, row: schema.Endpoint, *, replicas: bool
) -> endpoint_pb2.Endpoint:
    """An endpoint as its users see it."""
    revision = await session.get_one(schema.Revision, (row.uid, row.revision))
    living: list[endpoint_pb2.Replica] = []
    if replicas:
        rows = await session.scalars(
            select(schema.Replica)
            .where(schema.Replica.endpoint_uid == row.uid, schema.Replica.ended_ms.is_(None))
            .order_by(schema.Replica.uid)
            .limit(REPLICAS_SHOWN)
        )
        living = await shown_replicas(session, project, row, list(rows))
    message = messages.endpoint(row, project, revision, living)
    view = views.endpoint_view(row)
    if view.rollout is not None and view.rollout.revision == row.revision:
        message.rollout.CopyFrom(messages.rollout_of(view, view.rollout, await _serving(session, row)))
    return message


async def shown_replicas(
    session: AsyncSession, project: str, endpoint: schema.Endpoint, rows: Sequence[schema.Replica]
) -> list[endpoint_pb2.Replica]:
    """Replicas with their kernels."""
    kernels: dict[str, list[schema.Kernel]] = {}
    for kernel in await session.scalars(
        select(schema.Kernel).where(schema.Kernel.replica_uid.in_([row.uid for row in rows]))
    ):
        kernels.setdefault(kernel.replica_uid, []).append(kernel)
    agents = await views.agent_names(session, [k.agent_uid for ks in kernels.values() for k in ks])
    return [messages.replica(row, kernels.get(row.uid, ()), agents, project, endpoint.name) for row in rows]


async def _serving(session: AsyncSession, row: schema.Endpoint) -> dict[int, int]:
    """How many replicas of each revision take new requests."""
    R = schema.Replica
    counts = await session.execute(
        select(R.revision, func.count())
        .where(
            R.endpoint_uid == row.uid,
            R.ended_ms.is_(None),
            R.status == ReplicaStatus.HEALTHY,
            R.draining.is_(False),
        )
        .group_by(R.revision)
    )
    return dict(counts.tuples().all())
