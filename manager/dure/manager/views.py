"""Rows of the store as the plain values that decisions are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.fleet.v1 import fleet_pb2
from dure.manager import rollout, schema
from dure.manager.devices import DeviceCapacity
from dure.manager.model import (
    AgentStatus,
    DeviceShare,
    EndpointView,
    Exit,
    Grant,
    KernelHealth,
    KernelPhase,
    KernelView,
    ReplicaStatus,
    ReplicaView,
)
from dure.manager.placement import Node


def endpoint_view(row: schema.Endpoint) -> EndpointView:
    return EndpointView(
        uid=row.uid,
        name=row.name,
        desired=row.desired_replicas,
        revision=row.revision,
        stable=row.stable_revision,
        policy=rollout.load_policy(row.rollout_policy),
        rollout=rollout.load_state(row.rollout),
        deleting=row.deleting,
        idle=row.idle,
        blocked=row.blocked,
        errors=tuple(row.errors),
        failures=row.failures,
        failed_ms=row.failed_ms,
        evictions=row.evictions,
        evicted_ms=row.evicted_ms,
        last_error=row.last_error,
    )


def kernel_view(row: schema.Kernel, agent_name: str) -> KernelView:
    status = fleet_pb2.KernelStatus.FromString(row.status)
    ended = status.exit if status.HasField("exit") else None
    return KernelView(
        uid=row.uid,
        agent_uid=row.agent_uid,
        agent_name=agent_name,
        phase=KernelPhase(row.phase),
        health=KernelHealth(row.health),
        wanted=row.wanted,
        host=status.host,
        port=status.port,
        message=status.probe_detail or status.message,
        name=f"{row.role}{row.index}",
        exit=Exit(ended.reason, ended.code, ended.message, ended.log_tail) if ended else None,
    )


def replica_view(
    row: schema.Replica, kernels: Iterable[schema.Kernel], agent_names: Mapping[str, str]
) -> ReplicaView:
    ordered = sorted(kernels, key=lambda kernel: (kernel.role, kernel.index))
    return ReplicaView(
        uid=row.uid,
        revision=row.revision,
        status=ReplicaStatus(row.status),
        created_ms=row.created_ms,
        since_ms=row.since_ms,
        kernels=tuple(
            kernel_view(kernel, agent_names.get(kernel.agent_uid, kernel.agent_uid)) for kernel in ordered
        ),
        was_healthy=row.was_healthy,
        healthy_since_ms=row.healthy_since_ms,
        draining=row.draining,
        reason=row.reason,
    )


def grant(row: schema.Kernel) -> Grant:
    devices = tuple(DeviceShare(share["device"], share["slot"], share["amount"]) for share in row.devices)
    return Grant(row.agent_uid, row.slots, devices, row.fixed_port, row.rendezvous_port)


def node(
    row: schema.Agent, hello: fleet_pb2.Hello, kernels: Iterable[schema.Kernel], status: AgentStatus
) -> Node:
    """An agent for placement; only one that is ALIVE gets anything new."""
    return Node(
        uid=row.uid,
        name=row.name,
        resource_group=row.resource_group,
        slots=dict(hello.slots),
        devices=[
            DeviceCapacity(
                id=device.id,
                slots=dict(device.slots),
                healthy=device.healthy,
                detail=device.detail,
                parent=device.parent,
                enforcement=device.enforcement,
                distances={peer.id: peer.distance for peer in device.peers},
            )
            for device in hello.devices
        ],
        grants=[grant(kernel) for kernel in kernels],
        host_id=hello.host_id,
        available=status is AgentStatus.ALIVE and not row.draining,
        unavailable_reason="the agent is being drained" if row.draining else f"the agent is {status.value}",
        architecture=hello.architecture,
        runs_images=hello.runs_images,
        maps_mounts=hello.maps_mounts,
        runs_strict=fleet_pb2.SECURITY_PROFILE_STRICT in hello.security_profiles,
    )


async def agent_names(session: AsyncSession, uids: Iterable[str]) -> dict[str, str]:
    wanted = list(set(uids))
    rows = await session.execute(
        select(schema.Agent.uid, schema.Agent.name).where(schema.Agent.uid.in_(wanted))
    )
    return {row.uid: row.name for row in rows}


async def agents(session: AsyncSession, uids: Iterable[str]) -> tuple[dict[str, str], frozenset[str]]:
    """Names of agents by uid, and those of them that shall be left."""
    wanted = list(uids)
    if not wanted:
        return {}, frozenset()
    rows = list(
        await session.execute(
            select(schema.Agent.uid, schema.Agent.name, schema.Agent.draining).where(
                schema.Agent.uid.in_(wanted)
            )
        )
    )
    return {row.uid: row.name for row in rows}, frozenset(row.uid for row in rows if row.draining)


async def living(
    session: AsyncSession, endpoint_uid: str
) -> tuple[list[schema.Replica], dict[str, list[schema.Kernel]]]:
    """Replicas of an endpoint that have not ended, oldest first, and all of its kernels that are not
    GONE by replica (those of ended replicas too)."""
    replicas = list(
        await session.scalars(
            select(schema.Replica)
            .where(schema.Replica.endpoint_uid == endpoint_uid, schema.Replica.ended_ms.is_(None))
            .order_by(schema.Replica.uid)
        )
    )
    uids = [replica.uid for replica in replicas]
    kernels = await session.scalars(
        select(schema.Kernel).where(
            schema.Kernel.endpoint_uid == endpoint_uid,
            (schema.Kernel.phase != KernelPhase.GONE) | schema.Kernel.replica_uid.in_(uids),
        )
    )
    by_replica: dict[str, list[schema.Kernel]] = {}
    for kernel in kernels:
        by_replica.setdefault(kernel.replica_uid, []).append(kernel)
    return replicas, by_replica


async def nodes(
    session: AsyncSession, resource_group: str, statuses: Mapping[str, AgentStatus]
) -> list[Node]:
    """All agents of a resource group, with every grant that they hold."""
    agents = list(
        await session.scalars(select(schema.Agent).where(schema.Agent.resource_group == resource_group))
    )
    kernels: dict[str, list[schema.Kernel]] = {agent.uid: [] for agent in agents}
    rows = await session.scalars(select(schema.Kernel).where(schema.Kernel.phase != KernelPhase.GONE))
    for row in rows:
        if row.agent_uid in kernels:
            kernels[row.agent_uid].append(row)
    return [
        node(
            agent,
            fleet_pb2.Hello.FromString(agent.hello),
            kernels[agent.uid],
            statuses.get(agent.uid, AgentStatus.AWAITED),
        )
        for agent in agents
    ]
