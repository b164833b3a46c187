"""EndpointService."""

from __future__ import annotations

from typing import Any

import grpc.aio
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import messages, revisions, schema, scope, views
from dure.manager.addresses import assign_address
from dure.manager.folders import Folders
from dure.manager.model import EndpointStatus
from dure.manager.store import Store, Tx, new_uid, now_ms
from dure.manager.watch import Watcher
from dure.v1 import endpoint_pb2, endpoint_pb2_grpc
from dure.wire import errors, names
from dure.wire.errors import Violation

Context = grpc.aio.ServicerContext[Any, Any]

REPLICAS_SHOWN = 1000
PRIORITY_DEFAULT = 10
UPDATABLE = ("replica_count", "open_to_public")


class EndpointApi(endpoint_pb2_grpc.EndpointServiceServicer):
    """What users call to keep endpoints."""

    def __init__(self, store: Store, folders: Folders) -> None:
        self._store = store
        self._folders = folders
        self._watcher = Watcher(store)

    async def CreateEndpoint(
        self, request: endpoint_pb2.CreateEndpointRequest, context: Context
    ) -> endpoint_pb2.CreateEndpointResponse:
        if len(request.request_id) > 128:
            raise errors.InvalidInput.of([Violation("request_id", "is longer than 128 characters")])
        async with self._store.read() as session:
            project = await scope.project(session, request.parent)
            earlier = await _earlier(session, project, request.request_id)
            if earlier is not None:
                return endpoint_pb2.CreateEndpointResponse(
                    endpoint=await shown(session, project.name, earlier, replicas=False)
                )
            draft = await revisions.draft(
                session, self._folders, project, request.endpoint, request.endpoint_id
            )
        try:
            async with self._store.write() as tx:
                row = await self._insert(tx, project, request, draft)
                endpoint = await shown(tx.session, project.name, row, replicas=False)
        except IntegrityError as error:
            raise errors.AlreadyExists(
                f"project `{project.name}` has an endpoint `{request.endpoint_id}` already; delete it first, "
                "or choose another name",
                reason="ENDPOINT_EXISTS",
            ) from error
        return endpoint_pb2.CreateEndpointResponse(endpoint=endpoint)

    async def _insert(
        self,
        tx: Tx,
        project: schema.Project,
        request: endpoint_pb2.CreateEndpointRequest,
        draft: revisions.Draft,
    ) -> schema.Endpoint:
        # The folder was read outside of this transaction: nothing may have removed it since.
        if await tx.session.get(schema.Folder, draft.folder_uid) is None:
            raise errors.NotFound("the model folder was deleted just now", reason="FOLDER_NOT_FOUND")
        wanted, now = request.endpoint, now_ms()
        row = schema.Endpoint(
            uid=new_uid(),
            project_uid=project.uid,
            name=request.endpoint_id,
            living_name=request.endpoint_id,
            request_id=request.request_id or None,
            created_ms=now,
            updated_ms=now,
            deleting=False,
            deleted_ms=None,
            replica_count=wanted.replica_count,
            open_to_public=wanted.open_to_public,
            priority=wanted.priority or PRIORITY_DEFAULT,
            rollout_policy={},
            etag=new_uid(),
            revision=1,
            newest_revision=1,
            stable_revision=0,
            validation=False,
            proxy_group="default",
            port=None,
            address="",
            status=(EndpointStatus.PENDING if wanted.replica_count else EndpointStatus.STOPPED).value,
            status_reason="",
            desired_replicas=wanted.replica_count,
            ready_replicas=0,
            conditions=[],
            blocked=False,
            errors=[],
            failures=0,
            failed_ms=0,
            rollout={},
        )
        tx.session.add(row)
        tx.session.add(draft.row(row.uid, 1, now))
        await tx.session.flush()
        await assign_address(tx, row, required=True)
        count = wanted.replica_count
        tx.event(row.uid, "ENDPOINT_CREATED", f"created with {count} replica(s), revision 1")
        tx.touch("endpoint", row.uid)
        return row

    async def GetEndpoint(
        self, request: endpoint_pb2.GetEndpointRequest, context: Context
    ) -> endpoint_pb2.GetEndpointResponse:
        async with self._store.read() as session:
            project, row = await scope.endpoint(session, request.name)
            return endpoint_pb2.GetEndpointResponse(
                endpoint=await shown(session, project.name, row, replicas=True)
            )

    async def ListEndpoints(
        self, request: endpoint_pb2.ListEndpointsRequest, context: Context
    ) -> endpoint_pb2.ListEndpointsResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            project = await scope.project(session, request.parent)
            rows = list(
                await session.scalars(
                    select(schema.Endpoint)
                    .where(schema.Endpoint.project_uid == project.uid, schema.Endpoint.living_name > after)
                    .order_by(schema.Endpoint.living_name)
                    .limit(size + 1)
                )
            )
            rows, token = scope.page(rows, size, [row.name for row in rows])
            endpoints = [await shown(session, project.name, row, replicas=False) for row in rows]
        return endpoint_pb2.ListEndpointsResponse(endpoints=endpoints, next_page_token=token)

    async def UpdateEndpoint(
        self, request: endpoint_pb2.UpdateEndpointRequest, context: Context
    ) -> endpoint_pb2.UpdateEndpointResponse:
        wanted, paths = request.endpoint, list(request.update_mask.paths)
        violations = [
            Violation(
                f"update_mask.paths[{index}]",
                f"`{path[:60]}` cannot be changed; those that can are {', '.join(UPDATABLE)}",
            )
            for index, path in enumerate(paths)
            if path not in UPDATABLE
        ]
        if not paths:
            violations.append(Violation("update_mask", f"is required; name some of {', '.join(UPDATABLE)}"))
        if "replica_count" in paths:
            wrong = revisions.check_replica_count(wanted.replica_count)
            violations += [wrong] if wrong is not None else []
        if violations:
            raise errors.InvalidInput.of(violations)
        async with self._store.write() as tx:
            project, row = await scope.endpoint(tx.session, wanted.name, "endpoint.name")
            _check_changeable(row, wanted.etag)
            changes: list[str] = []
            if "replica_count" in paths and row.replica_count != wanted.replica_count:
                changes.append(f"replicas {row.replica_count} -> {wanted.replica_count}")
                row.replica_count = row.desired_replicas = wanted.replica_count
                _foresee_status(row)
            if "open_to_public" in paths and row.open_to_public != wanted.open_to_public:
                changes.append(f"open to public {row.open_to_public} -> {wanted.open_to_public}".lower())
                row.open_to_public = wanted.open_to_public
            if changes:
                row.etag, row.updated_ms = new_uid(), now_ms()
                tx.event(row.uid, "ENDPOINT_UPDATED", ", ".join(changes))
                tx.touch("endpoint", row.uid)
            endpoint = await shown(tx.session, project.name, row, replicas=False)
        return endpoint_pb2.UpdateEndpointResponse(endpoint=endpoint)

    async def DeleteEndpoint(
        self, request: endpoint_pb2.DeleteEndpointRequest, context: Context
    ) -> endpoint_pb2.DeleteEndpointResponse:
        async with self._store.write() as tx:
            project, row = await scope.endpoint(tx.session, request.name)
            if request.etag and request.etag != row.etag:
                raise _stale(row)
            if not row.deleting:
                row.deleting, row.updated_ms, row.etag = True, now_ms(), new_uid()
                row.status, row.status_reason = EndpointStatus.TERMINATING.value, ""
                tx.event(row.uid, "ENDPOINT_DELETING", "deletion was asked for; replicas drain and stop")
                tx.touch("endpoint", row.uid)
            endpoint = await shown(tx.session, project.name, row, replicas=False)
        return endpoint_pb2.DeleteEndpointResponse(endpoint=endpoint)

    async def RetryEndpoint(
        self, request: endpoint_pb2.RetryEndpointRequest, context: Context
    ) -> endpoint_pb2.RetryEndpointResponse:
        async with self._store.read() as session:
            project, row = await scope.endpoint(session, request.name)
            revision = await session.get_one(schema.Revision, (row.uid, row.revision))
            draft = await revisions.redraft(session, self._folders, project, row, revision)
        async with self._store.write() as tx:
            project, row = await scope.endpoint(tx.session, request.name)
            _check_changeable(row, "")
            row.blocked, row.errors, row.failures, row.failed_ms = False, [], 0, 0
            row.etag, row.updated_ms = new_uid(), now_ms()
            sentence = "errors are cleared; replicas are started again"
            current = await tx.session.get_one(schema.Revision, (row.uid, row.revision))
            if draft.kernel != current.kernel:
                row.revision += 1
                tx.session.add(draft.row(row.uid, row.revision, now_ms()))
                await tx.session.flush()
                sentence += f" as revision {row.revision}, since the definition file has changed"
            tx.event(row.uid, "ENDPOINT_RETRIED", sentence)
            tx.touch("endpoint", row.uid)
            endpoint = await shown(tx.session, project.name, row, replicas=False)
        return endpoint_pb2.RetryEndpointResponse(endpoint=endpoint)

    async def WatchEndpoints(  # type: ignore[override]
        self, request: endpoint_pb2.WatchEndpointsRequest, context: Context
    ) -> None:
        await self._watcher.watch(request, context, shown)

    async def ListReplicas(
        self, request: endpoint_pb2.ListReplicasRequest, context: Context
    ) -> endpoint_pb2.ListReplicasResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            project, endpoint = await scope.endpoint(session, request.parent, "parent")
            query = select(schema.Replica).where(
                schema.Replica.endpoint_uid == endpoint.uid, schema.Replica.uid > after
            )
            if not request.show_ended:
                query = query.where(schema.Replica.ended_ms.is_(None))
            rows = list(await session.scalars(query.order_by(schema.Replica.uid).limit(size + 1)))
            rows, token = scope.page(rows, size, [row.uid for row in rows])
            replicas = await _replicas(session, project.name, endpoint, rows)
        return endpoint_pb2.ListReplicasResponse(replicas=replicas, next_page_token=token)

    async def ListEvents(
        self, request: endpoint_pb2.ListEventsRequest, context: Context
    ) -> endpoint_pb2.ListEventsResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            project, endpoint = await scope.endpoint(session, request.parent, "parent")
            query = select(schema.Event).where(schema.Event.endpoint_uid == endpoint.uid)
            if after:
                query = query.where(schema.Event.uid < after)
            if request.HasField("max_age"):
                since_ms = now_ms() - int(request.max_age.ToMilliseconds())
                query = query.where(schema.Event.uid >= names.new_uid(max(0, since_ms), 0))
            rows = list(await session.scalars(query.order_by(schema.Event.uid.desc()).limit(size + 1)))
            rows, token = scope.page(rows, size, [row.uid for row in rows])
        events = [messages.event(row, project.name, endpoint.name) for row in rows]
        return endpoint_pb2.ListEventsResponse(events=events, next_page_token=token)


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
        living = await _replicas(session, project, row, list(rows))
    return messages.endpoint(row, project, revision, living)


async def _replicas(
    session: AsyncSession, project: str, endpoint: schema.Endpoint, rows: list[schema.Replica]
) -> list[endpoint_pb2.Replica]:
    kernels: dict[str, list[schema.Kernel]] = {}
    for kernel in await session.scalars(
        select(schema.Kernel).where(schema.Kernel.replica_uid.in_([row.uid for row in rows]))
    ):
        kernels.setdefault(kernel.replica_uid, []).append(kernel)
    agents = await views.agent_names(session, [k.agent_uid for ks in kernels.values() for k in ks])
    return [messages.replica(row, kernels.get(row.uid, ()), agents, project, endpoint.name) for row in rows]


async def _earlier(session: AsyncSession, project: schema.Project, request_id: str) -> schema.Endpoint | None:
    """What an earlier call with the same request id made."""
    if not request_id:
        return None
    return await session.scalar(
        select(schema.Endpoint).where(
            schema.Endpoint.project_uid == project.uid, schema.Endpoint.request_id == request_id
        )
    )


def _foresee_status(row: schema.Endpoint) -> None:
    """The status that a new replica count brings at once: who reads, or waits, before the controller has
    run must not be told of a health that belongs to the old count."""
    if row.replica_count == 0:
        row.status, row.status_reason = EndpointStatus.STOPPED.value, "zero replicas are wanted"
    elif row.ready_replicas < row.replica_count and row.status in (
        EndpointStatus.STOPPED,
        EndpointStatus.HEALTHY,
    ):
        row.status = EndpointStatus.DEGRADED.value
        row.status_reason = f"{row.ready_replicas} of {row.replica_count} healthy"


def _check_changeable(row: schema.Endpoint, etag: str) -> None:
    if row.deleting:
        raise errors.FailedPrecondition(f"endpoint `{row.name}` is being deleted")
    if etag and etag != row.etag:
        raise _stale(row)


def _stale(row: schema.Endpoint) -> errors.Conflict:
    return errors.Conflict(
        f"endpoint `{row.name}` has changed since you read it; read it again", reason="ETAG_MISMATCH"
    )
