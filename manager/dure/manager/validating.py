"""ValidateEndpoint: a dry run of everything and, if asked, a real session that never outlives the call.

The session is that of an endpoint without name and address, marked as a validation: the controller runs it
as any other, no route leads to it, and it is deleted when the call ends, however it ends. A manager
that starts deletes those that one before it left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import messages, placement, placing, revisions, schema, scope, views
from dure.manager.explaining import needs
from dure.manager.fleet import Fleet
from dure.manager.folders import Folders
from dure.manager.log_reader import LogReader
from dure.manager.model import EndpointStatus, ReplicaStatus
from dure.manager.placement import Placed
from dure.manager.pulls import Pulls
from dure.manager.revising import Revising
from dure.manager.showing import shown_replicas
from dure.manager.store import Key, Store, new_uid, now_ms
from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import ValidateEndpointResponse, ValidationOutcome
from dure.wire import errors, names
from dure.wire.errors import Violation

Context = grpc.aio.ServicerContext[Any, Any]

NAME = "validation"
TIMEOUT_DEFAULT_S, TIMEOUT_MAX_S = 300.0, 3600.0
OPEN_MAX = 16
SEND_WAIT_S = 30.0
# After the end of the session its last log lines are still under way.
LOGS_WAIT_S = 2.0
POLL_S = 5.0
# One that failed its health check too often may still come up, but is not waited for any longer than this.
UNHEALTHY_GRACE_MS = 20_000


class Validating:
    """Serves validations."""

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        folders: Folders,
        revising: Revising,
        log_reader: LogReader,
        pulls: Pulls,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._folders = folders
        self._revising = revising
        self._log_reader = log_reader
        self._pulls = pulls
        self._open = 0

    async def clean_up(self) -> None:
        """Deletes what a manager before this one left behind. Call before the controller runs."""
        async with self._store.write() as tx:
            for row in await tx.session.scalars(
                select(schema.Endpoint).where(
                    schema.Endpoint.validation, schema.Endpoint.deleted_ms.is_(None)
                )
            ):
                row.deleting = True
                tx.touch("endpoint", row.uid)

    async def validate(self, request: endpoint_pb2.ValidateEndpointRequest, context: Context) -> None:
        """Streams what happens; the last message is the outcome. Raises as CreateEndpoint does."""
        timeout_s = _timeout_s(request)
        endpoint_id = request.endpoint_id or NAME
        async with self._store.read() as session:
            project = await scope.project(session, request.parent)
            draft = await revisions.draft(session, self._folders, project, request.endpoint, endpoint_id)
            # Only a value for placement: it is never stored.
            revision = draft.row("", 1, now_ms())
            wanted = await placing.request(session, revision, {})
            nodes = await views.nodes(session, wanted.resource_group, self._fleet.statuses())
        await _tell(context, "VALIDATION_CHECKED", f"all fields and files are right; needs {needs(wanted)}")
        found = placement.place(wanted, nodes)
        if not isinstance(found, Placed):
            sentence = found.sentence(wanted)
            await _tell(context, "VALIDATION_NO_PLACE", sentence, warning=True)
            await _end(context, endpoint_pb2.VALIDATION_RESULT_FAILED, endpoint_pb2.HEALTH_UNKNOWN, sentence)
            return
        await _tell(context, "VALIDATION_PLACEMENT", f"a session would start on {found.nodes}")
        if request.dry_run:
            detail = "the dry run found nothing wrong; no session was started"
            await _end(context, endpoint_pb2.VALIDATION_RESULT_FINISHED, endpoint_pb2.HEALTH_UNKNOWN, detail)
            return
        if self._open >= OPEN_MAX:
            raise errors.ResourceExhausted(f"{OPEN_MAX} validations are running; try again later")
        self._open += 1
        try:
            await self._run(request, project, endpoint_id, draft, context, timeout_s)
        finally:
            self._open -= 1

    async def _run(
        self,
        request: endpoint_pb2.ValidateEndpointRequest,
        project: schema.Project,
        endpoint_id: str,
        draft: revisions.Draft,
        context: Context,
        timeout_s: float,
    ) -> None:
        async with self._store.write() as tx:
            row = await self._revising.insert(
                tx, project, endpoint_id, request.endpoint, draft, validation=True
            )
        try:
            sending = asyncio.Lock()
            async with asyncio.TaskGroup() as group:
                logs = group.create_task(self._logs(row.uid, context, sending))
                try:
                    async with asyncio.timeout(timeout_s):
                        outcome = await self._follow(row, project.name, context, sending)
                except TimeoutError:
                    outcome = await self._timed_out(row, timeout_s)
                await asyncio.wait([logs], timeout=LOGS_WAIT_S)
                logs.cancel()
            await _send(context, ValidateEndpointResponse(outcome=outcome))
        finally:
            # The caller may be gone, and its task cancelled: the session must go all the same.
            await asyncio.shield(self._remove(row.uid))

    async def _follow(
        self, row: schema.Endpoint, project: str, context: Context, sending: asyncio.Lock
    ) -> ValidationOutcome:
        """Sends events, and how far images are, until the session is healthy or has failed."""
        seen = ""
        pulling: dict[str, endpoint_pb2.Kernel] = {}
        async for _ in self._changes(row.uid):
            async with self._store.read() as session:
                events = list(
                    await session.scalars(
                        select(schema.Event)
                        .where(schema.Event.endpoint_uid == row.uid, schema.Event.uid > seen)
                        .order_by(schema.Event.uid)
                    )
                )
                current = await session.get_one(schema.Endpoint, row.uid)
                replicas = list(
                    await session.scalars(
                        select(schema.Replica)
                        .where(schema.Replica.endpoint_uid == row.uid)
                        .order_by(schema.Replica.uid)
                    )
                )
                kernels = await self._pulling(session, project, row, replicas)
            for event in events:
                seen = event.uid
                message = messages.event(event, project, row.name)
                async with sending:
                    await _send(context, ValidateEndpointResponse(event=message))
            for kernel in _news(pulling, kernels):
                async with sending:
                    await _send(context, ValidateEndpointResponse(kernel=kernel))
            pulling = kernels
            outcome = _outcome(current, replicas)
            if outcome is not None:
                return outcome
        raise AssertionError("changes do not end")

    async def _pulling(
        self,
        session: AsyncSession,
        project: str,
        row: schema.Endpoint,
        replicas: list[schema.Replica],
    ) -> dict[str, endpoint_pb2.Kernel]:
        """Kernels whose image is being fetched, by uid."""
        replicas_shown = await shown_replicas(session, project, row, replicas)
        self._pulls.show(replicas_shown)
        return {
            kernel.uid: kernel
            for replica in replicas_shown
            for kernel in replica.kernels
            if kernel.HasField("pull")
        }

    async def _changes(self, uid: str) -> AsyncIterator[None]:
        """Comes back whenever the store has changed, an image of this endpoint moved on, and now and then."""
        changed = asyncio.Event()

        def listen(_revision: int, keys: list[Key]) -> None:
            if any(key == ("progress", uid) or key[0] != "progress" for key in keys):
                changed.set()

        unlisten = self._store.listen(listen)
        try:
            while True:
                changed.clear()
                yield
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await changed.wait()
        finally:
            unlisten()

    async def _logs(self, endpoint_uid: str, context: Context, sending: asyncio.Lock) -> None:
        async with contextlib.aclosing(self._log_reader.read(endpoint_uid, follow=True)) as chunks:
            async for chunk in chunks:
                async with sending:
                    await _send(context, ValidateEndpointResponse(log=chunk))

    async def _timed_out(self, row: schema.Endpoint, timeout_s: float) -> ValidationOutcome:
        async with self._store.read() as session:
            current = await session.get_one(schema.Endpoint, row.uid)
            statuses = set(
                await session.scalars(
                    select(schema.Replica.status).where(
                        schema.Replica.endpoint_uid == row.uid, schema.Replica.ended_ms.is_(None)
                    )
                )
            )
        health = endpoint_pb2.HEALTH_UNKNOWN
        if ReplicaStatus.UNHEALTHY in statuses:
            health = endpoint_pb2.HEALTH_UNHEALTHY
        elif ReplicaStatus.DEGRADED in statuses:
            health = endpoint_pb2.HEALTH_DEGRADED
        detail = f"not healthy within {timeout_s:g} s: {current.status_reason or current.status}"
        return ValidationOutcome(
            result=endpoint_pb2.VALIDATION_RESULT_TIMED_OUT, health=health, detail=detail
        )

    async def _remove(self, uid: str) -> None:
        async with self._store.write() as tx:
            row = await tx.session.get_one(schema.Endpoint, uid)
            row.deleting, row.updated_ms = True, now_ms()
            row.status = EndpointStatus.TERMINATING.value
            tx.touch("endpoint", uid)


def _news(
    before: dict[str, endpoint_pb2.Kernel], after: dict[str, endpoint_pb2.Kernel]
) -> list[endpoint_pb2.Kernel]:
    """Kernels of which the fetching moved on; without `pull` those of which it ended."""
    news = [kernel for uid, kernel in after.items() if before.get(uid) != kernel]
    for uid in before.keys() - after.keys():
        ended = endpoint_pb2.Kernel()
        ended.CopyFrom(before[uid])
        ended.ClearField("pull")
        news.append(ended)
    return news


def _outcome(row: schema.Endpoint, replicas: list[schema.Replica]) -> ValidationOutcome | None:
    for replica in replicas:
        if replica.status == ReplicaStatus.HEALTHY:
            return ValidationOutcome(
                result=endpoint_pb2.VALIDATION_RESULT_FINISHED,
                health=endpoint_pb2.HEALTH_HEALTHY,
                detail="the session answers its health check",
            )
        unhealthy = replica.status == ReplicaStatus.UNHEALTHY
        if unhealthy and now_ms() - replica.since_ms >= UNHEALTHY_GRACE_MS:
            return ValidationOutcome(
                result=endpoint_pb2.VALIDATION_RESULT_FINISHED,
                health=endpoint_pb2.HEALTH_UNHEALTHY,
                detail=replica.reason or "the session failed its health check too often",
            )
        if replica.status == ReplicaStatus.FAILED:
            return ValidationOutcome(
                result=endpoint_pb2.VALIDATION_RESULT_FAILED,
                health=endpoint_pb2.HEALTH_UNKNOWN,
                detail=replica.reason,
            )
    if row.deleting:
        return ValidationOutcome(
            result=endpoint_pb2.VALIDATION_RESULT_FAILED,
            health=endpoint_pb2.HEALTH_UNKNOWN,
            detail="the validation was ended by the manager",
        )
    return None


def _timeout_s(request: endpoint_pb2.ValidateEndpointRequest) -> float:
    asked_s = request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else TIMEOUT_DEFAULT_S
    if not 0 < asked_s <= TIMEOUT_MAX_S:
        limit = f"must be more than 0 s and at most {TIMEOUT_MAX_S:.0f} s"
        raise errors.InvalidInput.of([Violation("timeout", limit)])
    return asked_s


async def _tell(context: Context, reason: str, message: str, *, warning: bool = False) -> None:
    """An event of the validation itself: sent, not stored."""
    event = endpoint_pb2.Event(
        name=names.event("-", NAME, new_uid()),
        time=messages.timestamp(now_ms()),
        reason=reason,
        message=message,
        warning=warning,
    )
    await _send(context, ValidateEndpointResponse(event=event))


async def _end(
    context: Context,
    result: endpoint_pb2.ValidationResult.ValueType,
    health: endpoint_pb2.Health.ValueType,
    detail: str,
) -> None:
    outcome = ValidationOutcome(result=result, health=health, detail=detail)
    await _send(context, ValidateEndpointResponse(outcome=outcome))


async def _send(context: Context, message: ValidateEndpointResponse) -> None:
    async with asyncio.timeout(SEND_WAIT_S):
        await context.write(message)
