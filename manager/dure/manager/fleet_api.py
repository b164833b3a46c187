"""FleetService: agents join, report, and are told what is wanted of them."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import Any

import grpc.aio
from sqlalchemy import select

from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.manager import auth, group_api, hellos, liveness, node_news, placing, schema, streams
from dure.manager.fleet import Connection, Fleet
from dure.manager.folders import Folders
from dure.manager.intake import Intake
from dure.manager.joining import join
from dure.manager.log_relay import LogRelay
from dure.manager.measures import Measures
from dure.manager.model import KernelPhase
from dure.manager.sealing import Seal
from dure.manager.store import Store
from dure.wire import errors, images
from dure.wire.channel import PIECE_BYTES

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

PIECE_KERNELS = 32
TEMPLATES_MAX = 1_000
# Phases in which an agent has said that it has the kernel: one that is then not among what it finds is lost.
_CONFIRMED = (KernelPhase.RUNNING, KernelPhase.STOPPING, KernelPhase.EXITED)


class FleetApi(fleet_pb2_grpc.FleetServiceServicer):
    """What agents call."""

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        intake: Intake,
        folders: Folders,
        relay: LogRelay,
        measures: Measures,
        seal: Seal,
        stop_grace_ms: int,
    ) -> None:
        self._seal = seal
        self._measures = measures
        self._store = store
        self._relay = relay
        self._fleet = fleet
        self._intake = intake
        self._folders = folders
        self._stop_grace_ms = stop_grace_ms
        self._templates: OrderedDict[tuple[str, int], fleet_pb2.KernelSpec] = OrderedDict()

    async def Join(self, request: fleet_pb2.JoinRequest, context: Context) -> fleet_pb2.JoinResponse:
        uid, credential = await join(self._store, "agent", request.agent, self._alive)
        return fleet_pb2.JoinResponse(uid=uid, credential=credential)

    def _alive(self, uid: str) -> bool:
        return self._fleet.connected(uid)

    async def Connect(self, _requests: Any, context: Context) -> None:  # type: ignore[override]
        agent_uid = auth.current().uid
        hello = hellos.checked(await streams.read_hello(context, "an agent"), context.peer())
        await self._store_hello(agent_uid, hello)
        connection = self._fleet.opened(agent_uid, hello.resource_group)
        name = auth.current().name
        log.info("agent %s connected from %s", name, context.peer())
        observed = asyncio.Event()
        try:
            await streams.send(
                context, connection.sending, fleet_pb2.ConnectResponse(welcome=self._welcome(agent_uid))
            )
            await streams.serve(
                "agent",
                connection.replaced,
                self._listen(connection, context, observed),
                self._tell(connection, context, observed),
                _pass_on(connection, context),
            )
        finally:
            self._fleet.closed(connection)
            log.info("agent %s disconnected", name)

    async def _store_hello(self, agent_uid: str, hello: fleet_pb2.Hello) -> None:
        async with self._store.write() as tx:
            row = await tx.session.get_one(schema.Agent, agent_uid)
            before = fleet_pb2.Hello.FromString(row.hello)
            row.hello = hello.SerializeToString(deterministic=True)
            row.resource_group = hello.resource_group
            # At its first hello everything is new, and nobody waits for word of it.
            if before.devices and (found := hellos.news(before.devices, hello.devices)):
                await node_news.tell(tx, row, found)
            # A group that an agent names and nobody made appears by itself.
            if await tx.session.get(schema.ResourceGroup, hello.resource_group) is None:
                tx.session.add(group_api.new_row(hello.resource_group))

    def _welcome(self, agent_uid: str) -> fleet_pb2.Welcome:
        return fleet_pb2.Welcome(
            agent_uid=agent_uid,
            heartbeat_interval_ms=liveness.HEARTBEAT_MS,
            storage_path=str(self._folders.root),
            storage_id=self._folders.storage_id,
        )

    async def _listen(self, connection: Connection, context: Context, observed: asyncio.Event) -> None:
        """Takes what the agent says, until it hangs up."""
        seen: set[str] = set()
        while True:
            # An agent that says nothing for three of the times after which it is lost is cut off.
            try:
                async with asyncio.timeout(liveness.SILENCE_MS * 3 / 1000):
                    message = await context.read()
            except TimeoutError as error:
                raise errors.TimedOut("this agent has sent no heartbeat for too long") from error
            if message is grpc.aio.EOF:
                return
            self._fleet.heard(connection.agent_uid)
            if message.HasField("heartbeat"):
                ack = fleet_pb2.HeartbeatAck(sequence=message.heartbeat.sequence)
                await streams.send(context, connection.sending, fleet_pb2.ConnectResponse(heartbeat_ack=ack))
            elif message.HasField("devices_changed"):
                await self._store_devices(connection.agent_uid, message.devices_changed)
            elif message.HasField("measurements"):
                self._measures.kernels(message.measurements.kernels)
            elif message.HasField("observed"):
                if not self._intake.report(connection.agent_uid, message.observed.kernels):
                    raise errors.ResourceExhausted("the manager is behind with reports; come again")
                if not observed.is_set():
                    seen.update(kernel.uid for kernel in message.observed.kernels)
                    if message.observed.complete:
                        await self._missing(connection.agent_uid, seen)
                        seen.clear()
                        observed.set()
                        # Now it can be given work.
                        await self._announce(connection.agent_uid)

    async def _store_devices(self, agent_uid: str, said: fleet_pb2.DevicesChanged) -> None:
        """In place of what stands in the hello, before anything that the agent says later is looked at."""
        devices, limitations = list(said.devices), said.limitations[: hellos.LIMITATIONS_MAX]
        hellos.check_devices(devices)
        async with self._store.write() as tx:
            row = await tx.session.get_one(schema.Agent, agent_uid)
            hello = fleet_pb2.Hello.FromString(row.hello)
            if list(hello.devices) == devices and list(hello.limitations) == limitations:
                return
            found = hellos.news(hello.devices, devices)
            del hello.devices[:], hello.limitations[:]
            hello.devices.extend(devices)
            hello.limitations.extend(limitations)
            row.hello = hello.SerializeToString(deterministic=True)
            await node_news.tell(tx, row, found)
            # There may be room for those that wait; and the endpoints there are to be looked at.
            tx.touch("agent", agent_uid)

    async def _announce(self, agent_uid: str) -> None:
        async with self._store.write() as tx:
            tx.touch("agent", agent_uid)

    async def _missing(self, agent_uid: str, seen: set[str]) -> None:
        """Kernels that the agent once had and does not find any more."""
        async with self._store.read() as session:
            rows = list(
                await session.scalars(
                    select(schema.Kernel).where(
                        schema.Kernel.agent_uid == agent_uid, schema.Kernel.phase != KernelPhase.GONE
                    )
                )
            )
        lost = []
        for row in rows:
            if row.uid in seen or (row.wanted and row.phase not in _CONFIRMED):
                continue
            status = fleet_pb2.KernelStatus.FromString(row.status)
            status.uid = row.uid
            status.phase = fleet_pb2.KERNEL_PHASE_GONE
            if row.wanted and not status.HasField("exit"):
                message = "the agent does not find it any more; it ended while the agent was away"
                status.exit.CopyFrom(fleet_pb2.KernelExit(reason="LOST", code=-1, message=message))
            lost.append(status)
        self._intake.report(agent_uid, lost)

    async def _tell(self, connection: Connection, context: Context, observed: asyncio.Event) -> None:
        """Tells the agent what is wanted: a snapshot once it has reported all, then what changes."""
        await observed.wait()
        first = True
        while True:
            connection.dirty.clear()
            specs, removals = await self._wanted(connection, everything=first)
            for message in _pieces(specs, removals, snapshot=first):
                await streams.send(context, connection.sending, fleet_pb2.ConnectResponse(desired=message))
            first = False
            await connection.dirty.wait()

    async def _wanted(
        self, connection: Connection, *, everything: bool
    ) -> tuple[list[fleet_pb2.KernelSpec], list[fleet_pb2.KernelRemoval]]:
        specs: list[fleet_pb2.KernelSpec] = []
        removals: list[fleet_pb2.KernelRemoval] = []
        async with self._store.read() as session:
            rows = list(
                await session.scalars(
                    select(schema.Kernel)
                    .where(
                        schema.Kernel.agent_uid == connection.agent_uid,
                        schema.Kernel.phase != KernelPhase.GONE,
                    )
                    .order_by(schema.Kernel.uid)
                )
            )
            for row in rows:
                if not everything and connection.sent.get(row.uid) == row.generation:
                    continue
                if row.wanted:
                    specs.append(await self._spec(session, row))
                else:
                    removals.append(fleet_pb2.KernelRemoval(uid=row.uid, generation=row.generation))
        connection.sent = {row.uid: row.generation for row in rows}
        return specs, removals

    async def _spec(self, session: Any, row: schema.Kernel) -> fleet_pb2.KernelSpec:
        replica = await session.get_one(schema.Replica, row.replica_uid)
        spec = fleet_pb2.KernelSpec()
        spec.CopyFrom(await self._template(session, row.endpoint_uid, replica.revision))
        spec.uid, spec.session_uid, spec.generation = row.uid, row.session_uid, row.generation
        spec.replica_uid = row.replica_uid
        spec.session_name = f"{spec.endpoint}-{row.replica_uid[-6:]}"
        spec.cluster.CopyFrom(await self._cluster(session, row))
        if row.role != "main":
            # Only main1 is probed; the others are fine as long as they run.
            spec.ClearField("health_check")
        if replica.ssh_key:
            spec.ssh_keys.CopyFrom(placing.ssh_key_pair(replica.ssh_key, spec.session_name))
        for slot, amount in row.slots.items():
            spec.slots[slot] = amount
        for share in row.devices:
            spec.devices.add(device=share["device"], slot=share["slot"], amount=share["amount"])
        if row.strict:
            spec.security_profile = fleet_pb2.SECURITY_PROFILE_STRICT
        spec.stop_grace_ms = self._stop_grace_ms
        return spec

    async def _template(self, session: Any, endpoint_uid: str, revision: int) -> fleet_pb2.KernelSpec:
        key = (endpoint_uid, revision)
        if key not in self._templates:
            row = await session.get_one(schema.Revision, key)
            self._templates[key] = fleet_pb2.KernelSpec.FromString(row.kernel)
            if len(self._templates) > TEMPLATES_MAX:
                self._templates.popitem(last=False)
        return self._templates[key]

    async def _cluster(self, session: Any, row: schema.Kernel) -> fleet_pb2.Cluster:
        """The place of a kernel among those of its session."""
        rows = await session.execute(
            select(schema.Kernel, schema.Agent.hello)
            .join(schema.Agent, schema.Agent.uid == schema.Kernel.agent_uid)
            .where(schema.Kernel.replica_uid == row.replica_uid)
        )
        ordered = sorted(rows, key=lambda found: (found[0].role, found[0].index))
        cluster = fleet_pb2.Cluster(role=row.role, index=row.index, size=len(ordered))
        cluster.one_node = all(kernel.agent_uid == row.agent_uid for kernel, _ in ordered)
        said = [fleet_pb2.Hello.FromString(hello) for _, hello in ordered]
        cluster.overlay = not cluster.one_node and hellos.have_overlay(said)
        for (kernel, _), hello in zip(ordered, said, strict=True):
            cluster.hosts.append(f"{kernel.role}{kernel.index}")
            cluster.addresses.append(hello.advertise_address)
            cluster.rendezvous_port = cluster.rendezvous_port or kernel.rendezvous_port
            if kernel.agent_uid == row.agent_uid and (kernel.role, kernel.index) < (row.role, row.index):
                cluster.local_rank += 1
        return cluster

    async def SendLogs(self, _requests: Any, context: Context) -> fleet_pb2.SendLogsResponse:
        await self._relay.take(auth.current().uid, context)
        return fleet_pb2.SendLogsResponse()

    async def GetImageCredential(
        self, request: fleet_pb2.GetImageCredentialRequest, context: Context
    ) -> fleet_pb2.GetImageCredentialResponse:
        async with self._store.read() as session:
            kernel = await session.get(schema.Kernel, request.kernel_uid)
            # An agent fetches the images of its own kernels, no others.
            if kernel is None or kernel.agent_uid != auth.current().uid or kernel.phase == KernelPhase.GONE:
                raise errors.PermissionDenied(f"this agent has no kernel {request.kernel_uid[:60]}")
            replica = await session.get_one(schema.Replica, kernel.replica_uid)
            endpoint = await session.get_one(schema.Endpoint, kernel.endpoint_uid)
            template = await self._template(session, endpoint.uid, replica.revision)
            host = images.registry_of(template.image)
            registry = await session.get(schema.Registry, (endpoint.project_uid, host))
        if registry is None or not template.image:
            return fleet_pb2.GetImageCredentialResponse()
        return fleet_pb2.GetImageCredentialResponse(
            username=registry.username, password=self._seal.open(registry.password)
        )

    async def GetFolderManifest(  # type: ignore[override]
        self, request: fleet_pb2.GetFolderManifestRequest, context: Context
    ) -> None:
        await self._may_read(request.folder_uid)
        files = await self._folders.manifest(request.folder_uid)
        for start in range(0, len(files), 1000):
            await context.write(fleet_pb2.GetFolderManifestResponse(files=files[start : start + 1000]))

    async def FetchFile(  # type: ignore[override]
        self, request: fleet_pb2.FetchFileRequest, context: Context
    ) -> None:
        await self._may_read(request.folder_uid)
        pieces = self._folders.read(request.folder_uid, request.path, request.offset, PIECE_BYTES)
        async for data in pieces:
            await context.write(fleet_pb2.FetchFileResponse(data=data))

    async def _may_read(self, folder_uid: str) -> None:
        """An agent reads the folders of its own kernels, no others."""
        async with self._store.read() as session:
            mounted = await session.scalar(
                select(schema.Kernel.uid)
                .join(schema.Replica, schema.Replica.uid == schema.Kernel.replica_uid)
                .join(
                    schema.RevisionFolder,
                    (schema.RevisionFolder.endpoint_uid == schema.Replica.endpoint_uid)
                    & (schema.RevisionFolder.number == schema.Replica.revision),
                )
                .where(
                    schema.Kernel.agent_uid == auth.current().uid,
                    schema.Kernel.phase != KernelPhase.GONE,
                    schema.RevisionFolder.folder_uid == folder_uid,
                )
                .limit(1)
            )
        if mounted is None:
            raise errors.PermissionDenied(f"no kernel of this agent mounts folder {folder_uid}")


async def _pass_on(connection: Connection, context: Context) -> None:
    while True:
        await streams.send(context, connection.sending, await connection.outbox.get())


def _pieces(
    specs: list[fleet_pb2.KernelSpec], removals: list[fleet_pb2.KernelRemoval], *, snapshot: bool
) -> list[fleet_pb2.Desired]:
    """Messages below the size limit; none if there is nothing to say, but a snapshot is always said."""
    pieces = [
        fleet_pb2.Desired(snapshot=snapshot, kernels=specs[start : start + PIECE_KERNELS])
        for start in range(0, len(specs), PIECE_KERNELS)
    ]
    pieces += [
        fleet_pb2.Desired(snapshot=snapshot, removals=removals[start : start + 1000])
        for start in range(0, len(removals), 1000)
    ]
    if snapshot:
        pieces = pieces or [fleet_pb2.Desired(snapshot=True)]
        pieces[-1].complete = True
    return pieces
