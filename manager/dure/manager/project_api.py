"""ProjectService."""

from __future__ import annotations

from typing import Any

import grpc.aio
from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError

from dure.manager import auth, checks, messages, quota, schema, scope, usage
from dure.manager.audit import Trail
from dure.manager.auth import Gatekeeper
from dure.manager.store import Store, Tx, new_uid, now_ms
from dure.v1 import project_pb2, project_pb2_grpc
from dure.wire import errors, names
from dure.wire.errors import Violation
from dure.wire.quantities import format_slot

Context = grpc.aio.ServicerContext[Any, Any]

UPDATABLE = ("description", "quota_slots", "quota_endpoints")
ENDPOINTS_MAX = 100_000


class ProjectApi(project_pb2_grpc.ProjectServiceServicer):
    """Tenants, what they use, and the trail of what was changed."""

    def __init__(self, store: Store, gatekeeper: Gatekeeper, trail: Trail) -> None:
        self._store = store
        self._gatekeeper = gatekeeper
        self._trail = trail

    async def CreateProject(
        self, request: project_pb2.CreateProjectRequest, context: Context
    ) -> project_pb2.CreateProjectResponse:
        wrong = names.check_id(request.project_id, names.PROJECT_ID, "project_id")
        violations = [wrong] if wrong is not None else []
        quota_slots = _check(request.project, UPDATABLE, violations)
        if violations:
            raise errors.InvalidInput.of(violations)
        row = schema.Project(
            uid=new_uid(),
            name=request.project_id,
            created_ms=now_ms(),
            description=request.project.description,
            quota_slots=quota_slots,
            quota_endpoints=request.project.quota_endpoints,
        )
        try:
            async with self._store.write() as tx:
                tx.session.add(row)
        except IntegrityError as error:
            raise errors.AlreadyExists(
                f"there is a project `{request.project_id}` already", reason="PROJECT_EXISTS"
            ) from error
        return project_pb2.CreateProjectResponse(project=_message(row))

    async def GetProject(
        self, request: project_pb2.GetProjectRequest, context: Context
    ) -> project_pb2.GetProjectResponse:
        async with self._store.read() as session:
            row = await scope.project(session, request.name, "name")
        return project_pb2.GetProjectResponse(project=_message(row))

    async def ListProjects(
        self, request: project_pb2.ListProjectsRequest, context: Context
    ) -> project_pb2.ListProjectsResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        caller = auth.current()
        query = select(schema.Project).where(schema.Project.name > after).order_by(schema.Project.name)
        if not caller.admin and not caller.everywhere:
            query = query.where(schema.Project.uid.in_([grant.project_uid for grant in caller.grants]))
        async with self._store.read() as session:
            rows = list(await session.scalars(query.limit(size + 1)))
        rows, token = scope.page(rows, size, [row.name for row in rows])
        return project_pb2.ListProjectsResponse(
            projects=[_message(row) for row in rows], next_page_token=token
        )

    async def UpdateProject(
        self, request: project_pb2.UpdateProjectRequest, context: Context
    ) -> project_pb2.UpdateProjectResponse:
        wanted, paths = request.project, list(request.update_mask.paths)
        violations = checks.mask(paths, UPDATABLE)
        quota_slots = _check(wanted, paths, violations)
        if violations:
            raise errors.InvalidInput.of(violations)
        async with self._store.write() as tx:
            row = await scope.project(tx.session, wanted.name, "project.name")
            if "description" in paths:
                row.description = wanted.description
            if "quota_slots" in paths:
                auth.note(f"quota {_slots(row.quota_slots)} -> {_slots(quota_slots)}")
                row.quota_slots = quota_slots
            if "quota_endpoints" in paths:
                auth.note(f"quota of endpoints {row.quota_endpoints} -> {wanted.quota_endpoints}")
                row.quota_endpoints = wanted.quota_endpoints
        return project_pb2.UpdateProjectResponse(project=_message(row))

    async def DeleteProject(
        self, request: project_pb2.DeleteProjectRequest, context: Context
    ) -> project_pb2.DeleteProjectResponse:
        async with self._store.write() as tx:
            row = await scope.project(tx.session, request.name, "name")
            problems = await _still_has(tx, row)
            if problems:
                raise errors.FailedPrecondition(
                    f"project `{row.name}` still has {', '.join(problems)}; remove these first",
                    reason="PROJECT_IN_USE",
                )
            await _leave_groups(tx, row)
            for key in await tx.session.scalars(
                select(schema.ApiKey).where(schema.ApiKey.project_uid == row.uid)
            ):
                await tx.session.delete(key)
            await tx.session.execute(delete(schema.Registry).where(schema.Registry.project_uid == row.uid))
            await tx.session.delete(row)
        self._gatekeeper.forget()
        return project_pb2.DeleteProjectResponse()

    async def GetUsage(
        self, request: project_pb2.GetUsageRequest, context: Context
    ) -> project_pb2.GetUsageResponse:
        async with self._store.read() as session:
            row = await scope.project(session, request.name, "name")
            living = await quota.wanted(session, row.uid)
        used = usage.total(living.values())
        return project_pb2.GetUsageResponse(
            slots=[
                project_pb2.SlotUsage(
                    slot=slot,
                    used=format_slot(slot, used.get(slot, 0)),
                    quota=format_slot(slot, row.quota_slots[slot]) if slot in row.quota_slots else "",
                )
                for slot in sorted(used.keys() | row.quota_slots.keys())
            ],
            endpoints=len(living),
            quota_endpoints=row.quota_endpoints,
        )

    async def ListAuditRecords(
        self, request: project_pb2.ListAuditRecordsRequest, context: Context
    ) -> project_pb2.ListAuditRecordsResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        if request.max_age.ToMilliseconds() < 0:
            raise errors.InvalidInput.of([Violation("max_age", "must not be negative")])
        # A reader sees what was done just now.
        await self._trail.flush()
        query = select(schema.AuditRecord).order_by(schema.AuditRecord.uid.desc())
        if after:
            query = query.where(schema.AuditRecord.uid < after)
        if request.HasField("max_age"):
            since_ms = now_ms() - int(request.max_age.ToMilliseconds())
            query = query.where(schema.AuditRecord.uid >= names.new_uid(max(0, since_ms), 0))
        async with self._store.read() as session:
            if request.parent:
                project = await scope.project(session, request.parent)
                # Not what was done to an earlier project of the same name.
                query = query.where(
                    schema.AuditRecord.project == project.name,
                    schema.AuditRecord.uid >= names.new_uid(project.created_ms, 0),
                )
            else:
                auth.require_admin("the trail of the whole cluster (name a project to see its own)")
            rows = list(await session.scalars(query.limit(size + 1)))
        rows, token = scope.page(rows, size, [row.uid for row in rows])
        return project_pb2.ListAuditRecordsResponse(
            records=[_record(row) for row in rows], next_page_token=token
        )


def _check(wanted: project_pb2.Project, paths: Any, violations: list[Violation]) -> dict[str, int]:
    """Adds what is wrong with the fields that `paths` names; returns the quota of slots."""
    if "description" in paths:
        violations += checks.description(wanted.description, "project.description")
    if "quota_endpoints" in paths and not 0 <= wanted.quota_endpoints <= ENDPOINTS_MAX:
        violations.append(
            Violation("project.quota_endpoints", f"must be from 0 (no limit) to {ENDPOINTS_MAX}")
        )
    if "quota_slots" not in paths:
        return {}
    return checks.limits(wanted.quota_slots, "project.quota_slots", violations)


async def _still_has(tx: Tx, row: schema.Project) -> list[str]:
    async def count(query: Any) -> int:
        return int(await tx.session.scalar(query) or 0)

    counts = {
        "endpoint": await count(
            select(func.count())
            .select_from(schema.Endpoint)
            .where(schema.Endpoint.project_uid == row.uid, schema.Endpoint.deleted_ms.is_(None))
        ),
        "folder": await count(
            select(func.count()).select_from(schema.Folder).where(schema.Folder.project_uid == row.uid)
        ),
        "member": await count(
            select(func.count())
            .select_from(schema.Membership)
            .where(schema.Membership.project_uid == row.uid)
        ),
    }
    return [f"{number} {what}{'s' if number > 1 else ''}" for what, number in counts.items() if number]


async def _leave_groups(tx: Tx, row: schema.Project) -> None:
    """Takes it out of the groups that name it. One that nobody else may use would open to all by that."""
    for group in await tx.session.scalars(select(schema.ResourceGroup)):
        if row.uid not in group.allowed_projects:
            continue
        left = [uid for uid in group.allowed_projects if uid != row.uid]
        if not left:
            raise errors.FailedPrecondition(
                f"resource group `{group.name}` is for project `{row.name}` only; change or delete it first: "
                f"dure group update {group.name} --allow PROJECT",
                reason="PROJECT_IN_USE",
            )
        group.allowed_projects = left


def _message(row: schema.Project) -> project_pb2.Project:
    return project_pb2.Project(
        name=names.project(row.name),
        uid=row.uid,
        description=row.description,
        quota_slots={slot: format_slot(slot, amount) for slot, amount in row.quota_slots.items()},
        quota_endpoints=row.quota_endpoints,
        create_time=messages.timestamp(row.created_ms),
    )


def _record(row: schema.AuditRecord) -> project_pb2.AuditRecord:
    return project_pb2.AuditRecord(
        time=messages.timestamp(row.time_ms),
        actor=row.actor,
        key=row.key_uid,
        project=row.project,
        method=row.method,
        resource=row.resource,
        detail=row.detail,
        outcome=row.outcome,
        peer=row.peer,
    )


def _slots(amounts: dict[str, Any]) -> str:
    return ", ".join(f"{slot}={format_slot(slot, amounts[slot])}" for slot in sorted(amounts)) or "none"
