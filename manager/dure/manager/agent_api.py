"""AgentService."""

from __future__ import annotations

from typing import Any

import grpc.aio
from sqlalchemy import select

from dure.fleet.v1 import fleet_pb2
from dure.manager import devices, schema, scope, views
from dure.manager.fleet import Fleet
from dure.manager.model import AgentStatus, KernelPhase
from dure.manager.store import Store
from dure.v1 import agent_pb2, agent_pb2_grpc
from dure.wire import errors, names
from dure.wire.quantities import CPU, DEVICES, MEM, SHARES, format_slot

Context = grpc.aio.ServicerContext[Any, Any]


class AgentApi(agent_pb2_grpc.AgentServiceServicer):
    """What users call to see the nodes."""

    def __init__(self, store: Store, fleet: Fleet) -> None:
        self._store = store
        self._fleet = fleet

    async def GetAgent(
        self, request: agent_pb2.GetAgentRequest, context: Context
    ) -> agent_pb2.GetAgentResponse:
        (agent_id,) = names.parse(request.name, "agents/{}")
        shown = await self._shown([agent_id])
        if not shown:
            raise errors.NotFound(f"no agent `{agent_id}`", reason="AGENT_NOT_FOUND")
        return agent_pb2.GetAgentResponse(agent=shown[0])

    async def ListAgents(
        self, request: agent_pb2.ListAgentsRequest, context: Context
    ) -> agent_pb2.ListAgentsResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            found = list(
                await session.scalars(
                    select(schema.Agent.name)
                    .where(schema.Agent.name > after)
                    .order_by(schema.Agent.name)
                    .limit(size + 1)
                )
            )
        found, token = scope.page(found, size, found)
        return agent_pb2.ListAgentsResponse(agents=await self._shown(found), next_page_token=token)

    async def DrainAgent(
        self, request: agent_pb2.DrainAgentRequest, context: Context
    ) -> agent_pb2.DrainAgentResponse:
        return agent_pb2.DrainAgentResponse(agent=await self._set_draining(request.name, draining=True))

    async def ResumeAgent(
        self, request: agent_pb2.ResumeAgentRequest, context: Context
    ) -> agent_pb2.ResumeAgentResponse:
        return agent_pb2.ResumeAgentResponse(agent=await self._set_draining(request.name, draining=False))

    async def _set_draining(self, name: str, *, draining: bool) -> agent_pb2.Agent:
        (agent_id,) = names.parse(name, "agents/{}")
        async with self._store.write() as tx:
            row = await tx.session.scalar(select(schema.Agent).where(schema.Agent.name == agent_id))
            if row is None:
                raise errors.NotFound(f"no agent `{agent_id}`", reason="AGENT_NOT_FOUND")
            row.draining = draining
            tx.touch("agent", row.uid)
            # Their replicas are to leave, or may stay.
            for uid in await tx.session.scalars(
                select(schema.Kernel.endpoint_uid)
                .where(schema.Kernel.agent_uid == row.uid, schema.Kernel.phase != KernelPhase.GONE)
                .distinct()
            ):
                tx.touch("endpoint", uid)
        return (await self._shown([agent_id]))[0]

    async def _shown(self, agent_ids: list[str]) -> list[agent_pb2.Agent]:
        async with self._store.read() as session:
            rows = list(
                await session.scalars(
                    select(schema.Agent).where(schema.Agent.name.in_(agent_ids)).order_by(schema.Agent.name)
                )
            )
            kernels: dict[str, list[schema.Kernel]] = {row.uid: [] for row in rows}
            for kernel in await session.scalars(
                select(schema.Kernel).where(
                    schema.Kernel.agent_uid.in_(list(kernels)), schema.Kernel.phase != KernelPhase.GONE
                )
            ):
                kernels[kernel.agent_uid].append(kernel)
        return [self._message(row, kernels[row.uid]) for row in rows]

    def _message(self, row: schema.Agent, kernels: list[schema.Kernel]) -> agent_pb2.Agent:
        hello = fleet_pb2.Hello.FromString(row.hello)
        status = self._fleet.statuses().get(row.uid, AgentStatus.AWAITED)
        away_ms = self._fleet.away_ms().get(row.uid, 0)
        node = views.node(row, hello, kernels, status)
        message = agent_pb2.Agent(
            name=names.agent(row.name),
            uid=row.uid,
            status=agent_pb2.AgentStatus.Value(f"AGENT_STATUS_{status.value}"),
            status_reason=_REASONS[status].format(seconds=away_ms // 1000, name=row.name),
            resource_group=row.resource_group,
            advertise_address=hello.advertise_address,
            version=hello.version,
            backend=hello.backend,
            session_count=len({kernel.session_uid for kernel in kernels}),
            limitations=hello.limitations,
            draining=row.draining,
            architecture=hello.architecture,
        )
        message.last_heard.FromMilliseconds(away_ms)
        for slot in (CPU, MEM):
            used = sum(grant.slots.get(slot, 0) for grant in node.grants)
            self._slot(message, slot, hello.slots.get(slot, 0), used)
        used_of = devices.used_shares(node.devices, node.grants)
        if offered := devices.offered(node.devices, node.grants):
            whole = {s.device: s.amount for g in node.grants for s in g.devices if s.slot == DEVICES}
            shared = sum(used_of[device.id] for device in offered if device.id not in whole)
            for slot, used in ((SHARES, shared), (DEVICES, sum(whole.values()))):
                self._slot(message, slot, sum(device.slots.get(slot, 0) for device in offered), used)
        for device in hello.devices:
            shown = message.devices.add(
                id=device.id,
                model=device.model,
                memory_bytes=device.memory_bytes,
                accelerator=device.accelerator,
                used_shares=format_slot(SHARES, used_of[device.id]),
                healthy=device.healthy,
                detail=device.detail,
                parent=device.parent,
                enforcement=device.enforcement,
                shares=format_slot(SHARES, device.slots.get(SHARES, 0)),
            )
            if device.HasField("numa_node"):
                shown.numa_node = device.numa_node
        return message

    def _slot(self, message: agent_pb2.Agent, slot: str, capacity: int, used: int) -> None:
        message.slots.add(slot=slot, capacity=format_slot(slot, capacity), used=format_slot(slot, used))


_REASONS = {
    AgentStatus.ALIVE: "",
    AgentStatus.LOST: "not heard of for {seconds} s; its sessions keep their traffic for a time; see whether "
    "its machine is up, and start `dure agent` there again",
    AgentStatus.AWAITED: "not heard of since the manager's start",
}
