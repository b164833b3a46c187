"""EndpointService."""

from __future__ import annotations

from typing import Any

import grpc.aio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import messages, schema, scope
from dure.manager.explaining import explain
from dure.manager.fleet import Fleet
from dure.manager.log_reader import LogReader
from dure.manager.model import EndpointStatus
from dure.manager.pulls import Pulls
from dure.manager.revising import Revising, stale
from dure.manager.showing import shown, shown_replicas
from dure.manager.store import Store, new_uid, now_ms
from dure.manager.validating import Validating
from dure.manager.watch import Watcher
from dure.v1 import endpoint_pb2, endpoint_pb2_grpc
from dure.wire import names

Context = grpc.aio.ServicerContext[Any, Any]


class EndpointApi(endpoint_pb2_grpc.EndpointServiceServicer):
    """What users call to keep endpoints."""

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        revising: Revising,
        validating: Validating,
        log_reader: LogReader,
        pulls: Pulls,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._revising = revising
        self._validating = validating
        self._log_reader = log_reader
        self._pulls = pulls
        self._watcher = Watcher(store)

    async def create(
        self,
        parent: str,
        endpoint_id: str,
        wanted: endpoint_pb2.Endpoint,
        *,
        request_id: str = "",
        validate_only: bool = False,
    ) -> endpoint_pb2.Endpoint:
        """What CreateEndpoint does, for other services that make endpoints."""
        return await self._revising.create(
            parent, endpoint_id, wanted, request_id=request_id, validate_only=validate_only
        )

    async def CreateEndpoint(
        self, request: endpoint_pb2.CreateEndpointRequest, context: Context
    ) -> endpoint_pb2.CreateEndpointResponse:
        endpoint = await self.create(
            request.parent,
            request.endpoint_id,
            request.endpoint,
            request_id=request.request_id,
            validate_only=request.validate_only,
        )
        return endpoint_pb2.CreateEndpointResponse(endpoint=endpoint)

    async def GetEndpoint(
        self, request: endpoint_pb2.GetEndpointRequest, context: Context
    ) -> endpoint_pb2.GetEndpointResponse:
        async with self._store.read() as session:
            project, row = await scope.endpoint(session, request.name)
            return endpoint_pb2.GetEndpointResponse(
                endpoint=await self._shown(session, project.name, row, replicas=True)
            )

    async def _shown(
        self, session: AsyncSession, project: str, row: schema.Endpoint, *, replicas: bool
    ) -> endpoint_pb2.Endpoint:
        """As it is stored, and how far its images are."""
        endpoint = await shown(session, project, row, replicas=replicas)
        self._pulls.show(endpoint.replicas)
        return endpoint

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
        endpoint = await self._revising.update(
            request.endpoint, list(request.update_mask.paths), validate_only=request.validate_only
        )
        return endpoint_pb2.UpdateEndpointResponse(endpoint=endpoint)

    async def DeleteEndpoint(
        self, request: endpoint_pb2.DeleteEndpointRequest, context: Context
    ) -> endpoint_pb2.DeleteEndpointResponse:
        async with self._store.write() as tx:
            project, row = await scope.endpoint(tx.session, request.name)
            if request.etag and request.etag != row.etag:
                raise stale(row)
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
        return endpoint_pb2.RetryEndpointResponse(endpoint=await self._revising.retry(request.name))

    async def ListRevisions(
        self, request: endpoint_pb2.ListRevisionsRequest, context: Context
    ) -> endpoint_pb2.ListRevisionsResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            project, endpoint = await scope.endpoint(session, request.parent, "parent")
            query = select(schema.Revision).where(schema.Revision.endpoint_uid == endpoint.uid)
            if after.isdecimal():
                query = query.where(schema.Revision.number < int(after))
            rows = list(await session.scalars(query.order_by(schema.Revision.number.desc()).limit(size + 1)))
        rows, token = scope.page(rows, size, [str(row.number) for row in rows])
        found = [messages.revision(row, endpoint, project.name) for row in rows]
        return endpoint_pb2.ListRevisionsResponse(revisions=found, next_page_token=token)

    async def RollbackEndpoint(
        self, request: endpoint_pb2.RollbackEndpointRequest, context: Context
    ) -> endpoint_pb2.RollbackEndpointResponse:
        endpoint = await self._revising.rollback(request.name, request.revision)
        return endpoint_pb2.RollbackEndpointResponse(endpoint=endpoint)

    async def PauseRollout(
        self, request: endpoint_pb2.PauseRolloutRequest, context: Context
    ) -> endpoint_pb2.PauseRolloutResponse:
        return endpoint_pb2.PauseRolloutResponse(endpoint=await self._revising.pause(request.name))

    async def ResumeRollout(
        self, request: endpoint_pb2.ResumeRolloutRequest, context: Context
    ) -> endpoint_pb2.ResumeRolloutResponse:
        endpoint = await self._revising.resume(request.name, full=request.full)
        return endpoint_pb2.ResumeRolloutResponse(endpoint=endpoint)

    async def ExplainEndpoint(
        self, request: endpoint_pb2.ExplainEndpointRequest, context: Context
    ) -> endpoint_pb2.ExplainEndpointResponse:
        async with self._store.read() as session:
            _, row = await scope.endpoint(session, request.name)
            return await explain(session, row, self._fleet.statuses())

    async def ValidateEndpoint(  # type: ignore[override]
        self, request: endpoint_pb2.ValidateEndpointRequest, context: Context
    ) -> None:
        await self._validating.validate(request, context)

    async def ReadLogs(  # type: ignore[override]
        self, request: endpoint_pb2.ReadLogsRequest, context: Context
    ) -> None:
        await self._log_reader.serve(request, context)

    async def WatchEndpoints(  # type: ignore[override]
        self, request: endpoint_pb2.WatchEndpointsRequest, context: Context
    ) -> None:
        await self._watcher.watch(request, context, self._shown)

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
            replicas = await shown_replicas(session, project.name, endpoint, rows)
            self._pulls.show(replicas)
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
