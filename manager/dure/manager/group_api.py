"""ResourceGroupService."""

from __future__ import annotations

from typing import Any

import grpc.aio
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import auth, checks, messages, schema, scope
from dure.manager.store import Store, Tx, now_ms
from dure.v1 import catalog_pb2, catalog_pb2_grpc, endpoint_pb2
from dure.wire import errors, names
from dure.wire.errors import Violation

Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT = "default"
UPDATABLE = ("policy", "allowed_projects", "proxy_group", "description", "security_profile")
ALLOWED_MAX = 1_000
_POLICIES = {
    catalog_pb2.PLACEMENT_POLICY_UNSPECIFIED: "SPREAD",
    catalog_pb2.PLACEMENT_POLICY_SPREAD: "SPREAD",
    catalog_pb2.PLACEMENT_POLICY_PACK: "PACK",
}
_PROFILES = {
    endpoint_pb2.SECURITY_PROFILE_UNSPECIFIED: "DEFAULT",
    endpoint_pb2.SECURITY_PROFILE_DEFAULT: "DEFAULT",
    endpoint_pb2.SECURITY_PROFILE_STRICT: "STRICT",
}


class GroupApi(catalog_pb2_grpc.ResourceGroupServiceServicer):
    """Sets of agents with a policy. Who is no administrator sees those that one of their projects may use."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def CreateResourceGroup(
        self, request: catalog_pb2.CreateResourceGroupRequest, context: Context
    ) -> catalog_pb2.CreateResourceGroupResponse:
        wanted = request.resource_group
        wrong = names.check_id(request.resource_group_id, names.MEMBER_ID, "resource_group_id")
        violations = [wrong] if wrong is not None else []
        try:
            async with self._store.write() as tx:
                allowed = await _check(tx.session, wanted, UPDATABLE, violations)
                row = new_row(request.resource_group_id)
                row.policy = _POLICIES[wanted.policy]
                row.security_profile = _PROFILES[wanted.security_profile]
                row.allowed_projects = allowed
                row.proxy_group = wanted.proxy_group or DEFAULT
                row.description = wanted.description
                tx.session.add(row)
                await tx.session.flush()
                (message,) = await _messages(tx.session, [row])
        except IntegrityError as error:
            raise errors.AlreadyExists(
                f"there is a resource group `{request.resource_group_id}` already", reason="GROUP_EXISTS"
            ) from error
        return catalog_pb2.CreateResourceGroupResponse(resource_group=message)

    async def GetResourceGroup(
        self, request: catalog_pb2.GetResourceGroupRequest, context: Context
    ) -> catalog_pb2.GetResourceGroupResponse:
        async with self._store.read() as session:
            row = await _find(session, request.name)
            (message,) = await _messages(session, [row])
        return catalog_pb2.GetResourceGroupResponse(resource_group=message)

    async def ListResourceGroups(
        self, request: catalog_pb2.ListResourceGroupsRequest, context: Context
    ) -> catalog_pb2.ListResourceGroupsResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            rows = [
                row
                for row in await session.scalars(
                    select(schema.ResourceGroup)
                    .where(schema.ResourceGroup.name > after)
                    .order_by(schema.ResourceGroup.name)
                )
                if _visible(row)
            ][: size + 1]
            rows, token = scope.page(rows, size, [row.name for row in rows])
            groups = await _messages(session, rows)
        return catalog_pb2.ListResourceGroupsResponse(resource_groups=groups, next_page_token=token)

    async def UpdateResourceGroup(
        self, request: catalog_pb2.UpdateResourceGroupRequest, context: Context
    ) -> catalog_pb2.UpdateResourceGroupResponse:
        wanted, paths = request.resource_group, list(request.update_mask.paths)
        violations = checks.mask(paths, UPDATABLE)
        async with self._store.write() as tx:
            row = await _find(tx.session, wanted.name, "resource_group.name")
            allowed = await _check(tx.session, wanted, paths, violations)
            if "policy" in paths:
                auth.note(f"policy {row.policy} -> {_POLICIES[wanted.policy]}".lower())
                row.policy = _POLICIES[wanted.policy]
            if "security_profile" in paths:
                after = _PROFILES[wanted.security_profile]
                auth.note(f"security profile {row.security_profile} -> {after}".lower())
                row.security_profile = after
            if "allowed_projects" in paths:
                auth.note(f"allowed projects: {', '.join(wanted.allowed_projects) or 'all'}")
                row.allowed_projects = allowed
            if "proxy_group" in paths:
                row.proxy_group = wanted.proxy_group or DEFAULT
            if "description" in paths:
                row.description = wanted.description
            await tx.session.flush()
            (message,) = await _messages(tx.session, [row])
            await _touch_endpoints(tx, row)
        return catalog_pb2.UpdateResourceGroupResponse(resource_group=message)

    async def DeleteResourceGroup(
        self, request: catalog_pb2.DeleteResourceGroupRequest, context: Context
    ) -> catalog_pb2.DeleteResourceGroupResponse:
        async with self._store.write() as tx:
            row = await _find(tx.session, request.name)
            if row.name == DEFAULT:
                raise errors.FailedPrecondition(
                    "the resource group `default` is what endpoints get that name none; it stays",
                    reason="GROUP_IN_USE",
                )
            users = await _users(tx.session, row.name)
            if users:
                raise errors.FailedPrecondition(
                    f"resource group `{row.name}` still has {'; '.join(users)}", reason="GROUP_IN_USE"
                )
            await tx.session.delete(row)
        return catalog_pb2.DeleteResourceGroupResponse()


def new_row(name: str) -> schema.ResourceGroup:
    """A group as it is when nobody said anything about it: open to all projects."""
    return schema.ResourceGroup(
        name=name,
        policy="SPREAD",
        allowed_projects=[],
        proxy_group=DEFAULT,
        description="",
        created_ms=now_ms(),
        security_profile="DEFAULT",
    )


def _visible(row: schema.ResourceGroup) -> bool:
    caller = auth.current()
    return not row.allowed_projects or any(caller.role_in(uid) for uid in row.allowed_projects)


async def _find(session: AsyncSession, name: str, field: str = "name") -> schema.ResourceGroup:
    (group_id,) = names.parse(name, "resourceGroups/{}", field)
    row = await session.get(schema.ResourceGroup, group_id)
    if row is None or not _visible(row):
        raise errors.NotFound(
            f"no resource group `{group_id}`; `dure group list` shows those that you may use",
            reason="GROUP_NOT_FOUND",
        )
    return row


async def _check(
    session: AsyncSession, wanted: catalog_pb2.ResourceGroup, paths: Any, violations: list[Violation]
) -> list[str]:
    """Uids of the allowed projects. Raises InvalidInput with these violations and more."""
    if "policy" in paths and wanted.policy not in _POLICIES:
        violations.append(Violation("resource_group.policy", "must be SPREAD or PACK"))
    if "security_profile" in paths and wanted.security_profile not in _PROFILES:
        violations.append(Violation("resource_group.security_profile", "must be DEFAULT or STRICT"))
    if "proxy_group" in paths and wanted.proxy_group:
        wrong = names.check_id(wanted.proxy_group, names.MEMBER_ID, "resource_group.proxy_group")
        violations += [wrong] if wrong is not None else []
    if "description" in paths:
        violations += checks.description(wanted.description, "resource_group.description")
    uids: list[str] = []
    if "allowed_projects" in paths:
        asked = [name.removeprefix("projects/") for name in wanted.allowed_projects]
        rows = await session.execute(
            select(schema.Project.name, schema.Project.uid).where(
                schema.Project.name.in_(asked[:ALLOWED_MAX])
            )
        )
        known: dict[str, str] = dict(rows.all())
        for index, name in enumerate(asked):
            if name not in known:
                found = f"no project `{name[:60]}`; `dure project list` shows all"
                violations.append(Violation(f"resource_group.allowed_projects[{index}]", found))
        if len(asked) > ALLOWED_MAX:
            violations.append(Violation("resource_group.allowed_projects", f"at most {ALLOWED_MAX}"))
        uids = sorted(set(known.values()))
    if violations:
        raise errors.InvalidInput.of(violations)
    return uids


async def _users(session: AsyncSession, group: str) -> list[str]:
    """What keeps a group: a few words for each kind."""
    found: dict[str, Any] = {
        "agents, which must join another group": select(schema.Agent.name).where(
            schema.Agent.resource_group == group
        ),
        "endpoints, to be deleted or moved (dure endpoint update NAME --group OTHER)": select(
            schema.Endpoint.name
        )
        .join(schema.Revision, schema.Revision.endpoint_uid == schema.Endpoint.uid)
        .where(
            schema.Endpoint.deleted_ms.is_(None),
            schema.Revision.number == schema.Endpoint.revision,
            schema.Revision.spec["resource_group"].as_string() == group,
        ),
        "presets (dure preset delete NAME)": select(schema.Preset.name).where(
            schema.Preset.resource_group == group
        ),
    }
    problems = []
    for what, query in found.items():
        users = list(await session.scalars(query.limit(6)))
        if users:
            shown = ", ".join(f"`{name}`" for name in users[:5]) + (" ..." if len(users) > 5 else "")
            problems.append(f"{what}: {shown}")
    return problems


async def _touch_endpoints(tx: Tx, row: schema.ResourceGroup) -> None:
    """A policy that changed may find a place for what waits."""
    for uid in await tx.session.scalars(
        select(schema.Endpoint.uid)
        .join(schema.Revision, schema.Revision.endpoint_uid == schema.Endpoint.uid)
        .where(
            schema.Endpoint.deleted_ms.is_(None),
            schema.Revision.number == schema.Endpoint.revision,
            schema.Revision.spec["resource_group"].as_string() == row.name,
        )
        .limit(1_000)
    ):
        tx.touch("endpoint", uid)


async def _messages(
    session: AsyncSession, rows: list[schema.ResourceGroup]
) -> list[catalog_pb2.ResourceGroup]:
    caller = auth.current()
    uids = {uid for row in rows for uid in row.allowed_projects if caller.role_in(uid)}
    named = await session.execute(
        select(schema.Project.uid, schema.Project.name).where(schema.Project.uid.in_(uids))
    )
    projects: dict[str, str] = dict(named.all())
    counted = await session.execute(
        select(schema.Agent.resource_group, func.count()).group_by(schema.Agent.resource_group)
    )
    counts: dict[str, int] = dict(counted.all())
    return [
        catalog_pb2.ResourceGroup(
            name=names.resource_group(row.name),
            policy=catalog_pb2.PlacementPolicy.Value(f"PLACEMENT_POLICY_{row.policy}"),
            # Others' projects are nothing that a member should learn of.
            allowed_projects=sorted(projects[uid] for uid in row.allowed_projects if uid in projects),
            proxy_group=row.proxy_group,
            description=row.description,
            create_time=messages.timestamp(row.created_ms),
            agents=counts.get(row.name, 0),
            security_profile=endpoint_pb2.SecurityProfile.Value(f"SECURITY_PROFILE_{row.security_profile}"),
        )
        for row in rows
    ]
