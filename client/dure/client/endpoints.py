"""Calls about endpoints."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing

from google.protobuf import field_mask_pb2

from dure.client import watch as watching
from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.client.waiting import judge, summary
from dure.v1 import endpoint_pb2, endpoint_pb2_grpc
from dure.v1.endpoint_pb2 import Endpoint, Event, Replica, WatchEndpointsResponse
from dure.wire import names
from dure.wire.errors import DureError, NotFound, TimedOut

Notify = Callable[[Endpoint], None]


class EndpointGroup:
    """`client.endpoints`."""

    def __init__(self, caller: Caller, project: str) -> None:
        self._caller = caller
        self._project = project
        self._stub = endpoint_pb2_grpc.EndpointServiceStub(caller.channel)

    async def create(
        self,
        name: str,
        *,
        model: str,
        runtime: str = "custom",
        replicas: int = 1,
        resource_slots: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
        open_to_public: bool = False,
        resource_group: str = "",
        model_mount_destination: str = "",
        model_definition_path: str = "",
    ) -> Endpoint:
        """Returns at once: `wait` for it to become HEALTHY. What is left empty is the manager's default."""
        wanted = Endpoint(
            model=model,
            runtime=runtime,
            replica_count=replicas,
            resource_slots=resource_slots,
            environ=environ,
            open_to_public=open_to_public,
            resource_group=resource_group,
            model_mount_destination=model_mount_destination,
            model_definition_path=model_definition_path,
        )
        request = endpoint_pb2.CreateEndpointRequest(
            parent=names.project(self._project),
            endpoint_id=name,
            endpoint=wanted,
            # Makes it safe to repeat when an answer was lost.
            request_id=str(uuid.uuid4()),
        )
        return (await self._caller.unary(self._stub.CreateEndpoint, request)).endpoint

    async def get(self, name: str) -> Endpoint:
        """With its replicas."""
        request = endpoint_pb2.GetEndpointRequest(name=self.full_name(name))
        return (await self._caller.unary(self._stub.GetEndpoint, request)).endpoint

    def list(self) -> AsyncIterator[Endpoint]:
        """Without their replicas, by name."""

        async def fetch(token: str) -> tuple[list[Endpoint], str]:
            request = endpoint_pb2.ListEndpointsRequest(
                parent=names.project(self._project), page_size=PAGE_SIZE, page_token=token
            )
            page = await self._caller.unary(self._stub.ListEndpoints, request)
            return [*page.endpoints], page.next_page_token

        return all_pages(fetch)

    async def update(
        self, name: str, *, replicas: int | None = None, open_to_public: bool | None = None, etag: str = ""
    ) -> Endpoint:
        """Changes what is given. With an `etag` only if nobody else changed it meanwhile (else Conflict)."""
        wanted = Endpoint(name=self.full_name(name), etag=etag)
        mask = field_mask_pb2.FieldMask()
        if replicas is not None:
            wanted.replica_count = replicas
            mask.paths.append("replica_count")
        if open_to_public is not None:
            wanted.open_to_public = open_to_public
            mask.paths.append("open_to_public")
        request = endpoint_pb2.UpdateEndpointRequest(endpoint=wanted, update_mask=mask)
        # Repeated after a lost answer, the etag would be out of date by our own change.
        response = await self._caller.unary(self._stub.UpdateEndpoint, request, idempotent=not etag)
        return response.endpoint

    async def delete(self, name: str, *, etag: str = "") -> Endpoint:
        """Returns at once: `wait_gone` for the end of it."""
        request = endpoint_pb2.DeleteEndpointRequest(name=self.full_name(name), etag=etag)
        response = await self._caller.unary(self._stub.DeleteEndpoint, request, idempotent=False)
        return response.endpoint

    async def retry(self, name: str) -> Endpoint:
        """Clears its errors and reads its definition file again."""
        request = endpoint_pb2.RetryEndpointRequest(name=self.full_name(name))
        return (await self._caller.unary(self._stub.RetryEndpoint, request)).endpoint

    def replicas(self, name: str, *, show_ended: bool = False) -> AsyncIterator[Replica]:
        """Oldest first."""

        async def fetch(token: str) -> tuple[list[Replica], str]:
            request = endpoint_pb2.ListReplicasRequest(
                parent=self.full_name(name), page_size=PAGE_SIZE, page_token=token, show_ended=show_ended
            )
            page = await self._caller.unary(self._stub.ListReplicas, request)
            return [*page.replicas], page.next_page_token

        return all_pages(fetch)

    def events(self, name: str, *, max_age_s: float | None = None) -> AsyncGenerator[Event, None]:
        """Newest first."""

        async def fetch(token: str) -> tuple[list[Event], str]:
            request = endpoint_pb2.ListEventsRequest(
                parent=self.full_name(name), page_size=PAGE_SIZE, page_token=token
            )
            if max_age_s is not None:
                request.max_age.FromNanoseconds(round(max_age_s * 1e9))
            page = await self._caller.unary(self._stub.ListEvents, request)
            return [*page.events], page.next_page_token

        return all_pages(fetch)

    def watch(
        self, name: str | None = None, *, reconnect_s: float = 60.0
    ) -> AsyncGenerator[WatchEndpointsResponse, None]:
        """A snapshot of all endpoints (or of one, with its replicas), then every change.

        Goes on through reconnects; raises ManagerUnreachable after `reconnect_s` without a manager.
        Close it (`contextlib.aclosing`) when leaving it early.
        """
        target = names.project(self._project) if name is None else self.full_name(name)
        return watching.watch_endpoints(self._caller, self._stub, target, reconnect_s)

    async def wait(
        self, name: str, *, timeout_s: float, notify: Notify | None = None, reconnect_s: float = 60.0
    ) -> Endpoint:
        """Returns when it is as its user wants it: all replicas HEALTHY, or none left where none are wanted.

        Fails early when it is BLOCKED or deleted. Raises TimedOut. `notify` sees every change.
        """
        newest: Endpoint | None = None
        full = self.full_name(name)
        try:
            async with (
                asyncio.timeout(timeout_s),
                aclosing(self.watch(name, reconnect_s=reconnect_s)) as batches,
            ):
                async for batch in batches:
                    for newest in batch.endpoints:
                        if notify:
                            notify(newest)
                        verdict = judge(newest)
                        if verdict.failed:
                            raise DureError(verdict.failed, reason="WAIT_FAILED")
                        if verdict.done:
                            return newest
                    if full in batch.removed or (batch.synced and newest is None):
                        raise NotFound(f"endpoint {_short(full)} is gone")
        except TimeoutError:
            raise TimedOut(
                f"endpoint {_short(full)} is not ready after {timeout_s:g} s"
                + (f": {summary(newest)}" if newest is not None else ""),
                reason="WAIT_TIMED_OUT",
            ) from None
        raise AssertionError("a watch does not end")

    async def wait_gone(
        self, name: str, *, timeout_s: float, notify: Notify | None = None, reconnect_s: float = 60.0
    ) -> None:
        """Returns when no such endpoint lives any more. Raises TimedOut."""
        newest: Endpoint | None = None
        uid = ""
        full = self.full_name(name)
        try:
            async with (
                asyncio.timeout(timeout_s),
                aclosing(self.watch(name, reconnect_s=reconnect_s)) as batches,
            ):
                async for batch in batches:
                    for newest in batch.endpoints:
                        uid = uid or newest.uid
                        if newest.uid != uid:  # a new one has taken the name
                            return
                        if notify:
                            notify(newest)
                    if full in batch.removed or (batch.synced and newest is None):
                        return
        except NotFound:
            return
        except TimeoutError:
            raise TimedOut(
                f"endpoint {_short(full)} is not gone after {timeout_s:g} s"
                + (f": {summary(newest)}" if newest is not None else ""),
                reason="WAIT_TIMED_OUT",
            ) from None

    def full_name(self, name: str) -> str:
        return name if "/" in name else names.endpoint(self._project, name)


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1]
