"""Calls about endpoints."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Unpack

from google.protobuf import field_mask_pb2

from dure.client import logs as reading
from dure.client import streams, waits
from dure.client import watch as watching
from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.client.waits import Notify
from dure.client.wanted import EndpointFields, endpoint_of
from dure.v1 import endpoint_pb2, endpoint_pb2_grpc
from dure.v1.endpoint_pb2 import (
    Endpoint,
    Event,
    ExplainEndpointResponse,
    LogChunk,
    Replica,
    Revision,
    ValidateEndpointResponse,
    WatchEndpointsResponse,
)
from dure.wire import names
from dure.wire.errors import DureError

VALIDATE_S = 300.0


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
        dry_run: bool = False,
        **fields: Unpack[EndpointFields],
    ) -> Endpoint:
        """Returns at once: `wait` for it to become HEALTHY. A `dry_run` checks everything and makes nothing.

            await client.endpoints.create(
                "chat", model="llama", runtime="vllm", replicas=2,
                resource_slots={"cpu": "4", "mem": "16g", "cuda.shares": "0.5"},
                environ={"VLLM_EXTRA_ARGS": "--max-model-len 4096"},
                rollout_policy=RolloutPolicy(max_surge="50%"),
            )

        `replicas` is 1 unless given.
        """
        wanted, _ = endpoint_of({"runtime": "custom", "replicas": 1, **fields})
        wanted.model = model
        request = endpoint_pb2.CreateEndpointRequest(
            parent=names.project(self._project),
            endpoint_id=name,
            endpoint=wanted,
            # Makes it safe to repeat when an answer was lost.
            request_id=str(uuid.uuid4()),
            validate_only=dry_run,
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
        self, name: str, *, etag: str = "", dry_run: bool = False, **fields: Unpack[EndpointFields]
    ) -> Endpoint:
        """Changes what is given, and nothing else.

            await client.endpoints.update("chat", replicas=3)
            await client.endpoints.update("chat", environ={**now.environ, "MODE": "b"}, etag=now.etag)

        What shapes a replica makes a new revision, which is rolled out: `wait` with its number for the end
        of that. With an `etag` only if nobody else changed it meanwhile (else Conflict). A `dry_run` returns
        what would be.
        """
        wanted, paths = endpoint_of(fields)
        wanted.name, wanted.etag = self.full_name(name), etag
        request = endpoint_pb2.UpdateEndpointRequest(
            endpoint=wanted, update_mask=field_mask_pb2.FieldMask(paths=paths), validate_only=dry_run
        )
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

    def history(self, name: str) -> AsyncIterator[Revision]:
        """Its revisions, newest first."""

        async def fetch(token: str) -> tuple[list[Revision], str]:
            request = endpoint_pb2.ListRevisionsRequest(
                parent=self.full_name(name), page_size=PAGE_SIZE, page_token=token
            )
            page = await self._caller.unary(self._stub.ListRevisions, request)
            return [*page.revisions], page.next_page_token

        return all_pages(fetch)

    async def rollback(self, name: str, revision: int = 0) -> Endpoint:
        """Rolls out an earlier revision again: the newest before that was healthy, or the one given.

        endpoint = await client.endpoints.rollback("chat")
        await client.endpoints.wait("chat", timeout_s=300, revision=endpoint.revision)
        """
        request = endpoint_pb2.RollbackEndpointRequest(name=self.full_name(name), revision=revision)
        # Repeated after a lost answer, it would go back by one more.
        response = await self._caller.unary(self._stub.RollbackEndpoint, request, idempotent=revision > 0)
        return response.endpoint

    async def pause_rollout(self, name: str) -> Endpoint:
        """No replica is replaced until `resume_rollout`."""
        request = endpoint_pb2.PauseRolloutRequest(name=self.full_name(name))
        return (await self._caller.unary(self._stub.PauseRollout, request)).endpoint

    async def resume_rollout(self, name: str, *, full: bool = False) -> Endpoint:
        """Ends a pause, or takes the step that waits; `full` skips all steps that are left."""
        request = endpoint_pb2.ResumeRolloutRequest(name=self.full_name(name), full=full)
        # Repeated after a lost answer, it would take one step more.
        return (await self._caller.unary(self._stub.ResumeRollout, request, idempotent=full)).endpoint

    async def explain(self, name: str) -> ExplainEndpointResponse:
        """Of each node whether another replica would fit there now, and why not."""
        request = endpoint_pb2.ExplainEndpointRequest(name=self.full_name(name))
        return await self._caller.unary(self._stub.ExplainEndpoint, request)

    def validate(
        self,
        name: str = "",
        *,
        model: str,
        dry_run: bool = False,
        timeout_s: float = VALIDATE_S,
        **fields: Unpack[EndpointFields],
    ) -> AsyncGenerator[ValidateEndpointResponse, None]:
        """Tries out what an endpoint would be: events and logs as they come, the outcome last.

            async with aclosing(client.endpoints.validate(model="llama", runtime="vllm")) as pieces:
                async for piece in pieces:
                    ...
            print(piece.outcome.detail)

        Closing it early ends the session of the validation, too. A `dry_run` checks files, image, slots and
        placement, and starts none.
        """
        wanted, _ = endpoint_of({"runtime": "custom", **fields})
        wanted.model = model
        request = endpoint_pb2.ValidateEndpointRequest(
            parent=names.project(self._project), endpoint_id=name, endpoint=wanted, dry_run=dry_run
        )
        request.timeout.FromNanoseconds(round(timeout_s * 1e9))
        return streams.validation(self._caller, self._stub, request)

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

    def follow_events(self, name: str, *, max_age_s: float | None = None) -> AsyncGenerator[Event, None]:
        """Oldest first: those there are (not older than `max_age_s`), then new ones until it is gone."""
        return streams.new_events(lambda age_s: self.events(name, max_age_s=age_s), max_age_s)

    def logs(
        self,
        name: str,
        *,
        replica: str = "",
        kernel: str = "",
        follow: bool = False,
        tail_lines: int = 100,
        max_age_s: float | None = None,
        previous: bool = False,
        reconnect_s: float = 60.0,
    ) -> AsyncGenerator[LogChunk, None]:
        """What its sessions wrote: the last `tail_lines` of each kernel (0: all), those not older than
        `max_age_s`; of one `replica` (a uid), of one `kernel` (`main1`), of those that ended (`previous`).

        With `follow` goes on with what comes, also of new replicas and through reconnects, without
        repeating a line. Close it (`contextlib.aclosing`) when leaving it early.
        """
        full = self.full_name(name)
        request = endpoint_pb2.ReadLogsRequest(
            name=f"{full}/replicas/{replica}" if replica else full,
            kernel=kernel,
            follow=follow,
            tail_lines=tail_lines,
            previous=previous,
        )
        if max_age_s is not None:
            request.max_age.FromNanoseconds(round(max_age_s * 1e9))
        return reading.read_logs(self._caller, self._stub, request, reconnect_s)

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
        self,
        name: str,
        *,
        timeout_s: float,
        revision: int | None = None,
        notify: Notify | None = None,
        reconnect_s: float = 60.0,
    ) -> Endpoint:
        """Returns when it is as its user wants it: all replicas HEALTHY, or none left where none are wanted.

        With a `revision` all of them must run it, and a rollout that waits for ResumeRollout ends the wait.
        Fails early when it cannot get there by itself: it is BLOCKED, deleted, went back to another revision,
        or its rollout is paused. Raises TimedOut. `notify` sees every change.
        """
        batches = self.watch(name, reconnect_s=reconnect_s)
        try:
            return await waits.until_ready(self.full_name(name), batches, timeout_s, notify, revision)
        except DureError as error:
            if error.reason != "ROLLED_BACK":
                raise
            async for item in self.history(name):
                if item.number == revision and item.reason:
                    raise DureError(f"{error.message}: {item.reason}", reason=error.reason) from None
            raise

    async def wait_gone(
        self, name: str, *, timeout_s: float, notify: Notify | None = None, reconnect_s: float = 60.0
    ) -> None:
        """Returns when no such endpoint lives any more. Raises TimedOut."""
        batches = self.watch(name, reconnect_s=reconnect_s)
        await waits.until_gone(self.full_name(name), batches, timeout_s, notify)

    def full_name(self, name: str) -> str:
        return name if "/" in name else names.endpoint(self._project, name)
