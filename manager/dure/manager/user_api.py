"""UserService: users. Their keys are in key_api."""

from __future__ import annotations

from typing import Any

import grpc.aio
from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import access, auth, checks, messages, schema, scope
from dure.manager.auth import Gatekeeper
from dure.manager.key_api import Keys, key_message
from dure.manager.store import Store, Tx, new_uid, now_ms
from dure.v1 import project_pb2, project_pb2_grpc
from dure.wire import errors, names
from dure.wire.errors import Violation

Context = grpc.aio.ServicerContext[Any, Any]

UPDATABLE = ("admin", "memberships", "description", "disabled")
MEMBERSHIPS_MAX = 1_000
_ROLES = {project_pb2.ROLE_MEMBER: access.MEMBER, project_pb2.ROLE_VIEWER: access.VIEWER}
_ROLE_VALUES = {role: value for value, role in _ROLES.items()}


class UserApi(Keys, project_pb2_grpc.UserServiceServicer):
    """Who calls the API, what they may do, and by which keys."""

    def __init__(self, store: Store, gatekeeper: Gatekeeper) -> None:
        super().__init__(store, gatekeeper)

    async def CreateUser(
        self, request: project_pb2.CreateUserRequest, context: Context
    ) -> project_pb2.CreateUserResponse:
        wrong = names.check_id(request.user_id, names.MEMBER_ID, "user_id")
        violations = [wrong] if wrong is not None else []
        violations += checks.description(request.user.description, "user.description")
        row = schema.User(
            uid=new_uid(),
            name=request.user_id,
            admin=request.user.admin,
            disabled=request.user.disabled,
            description=request.user.description,
            created_ms=now_ms(),
        )
        try:
            async with self._store.write() as tx:
                wanted = await _memberships(tx.session, request.user, violations)
                if violations:
                    raise errors.InvalidInput.of(violations)
                tx.session.add(row)
                await tx.session.flush()
                message = await _replace_memberships(tx, row, wanted)
        except IntegrityError as error:
            raise errors.AlreadyExists(
                f"there is a user `{request.user_id}` already", reason="USER_EXISTS"
            ) from error
        return project_pb2.CreateUserResponse(user=message)

    async def GetUser(
        self, request: project_pb2.GetUserRequest, context: Context
    ) -> project_pb2.GetUserResponse:
        async with self._store.read() as session:
            row = await scope.user(session, request.name)
            (message,) = await _messages(session, [row])
        return project_pb2.GetUserResponse(user=message)

    async def ListUsers(
        self, request: project_pb2.ListUsersRequest, context: Context
    ) -> project_pb2.ListUsersResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            rows = list(
                await session.scalars(
                    select(schema.User)
                    .where(schema.User.name > after)
                    .order_by(schema.User.name)
                    .limit(size + 1)
                )
            )
            rows, token = scope.page(rows, size, [row.name for row in rows])
            users = await _messages(session, rows)
        return project_pb2.ListUsersResponse(users=users, next_page_token=token)

    async def UpdateUser(
        self, request: project_pb2.UpdateUserRequest, context: Context
    ) -> project_pb2.UpdateUserResponse:
        wanted, paths = request.user, list(request.update_mask.paths)
        violations = checks.mask(paths, UPDATABLE)
        if "description" in paths:
            violations += checks.description(wanted.description, "user.description")
        async with self._store.write() as tx:
            row = await scope.user(tx.session, wanted.name, "user.name")
            memberships = (
                await _memberships(tx.session, wanted, violations) if "memberships" in paths else None
            )
            if violations:
                raise errors.InvalidInput.of(violations)
            admin = wanted.admin if "admin" in paths else row.admin
            disabled = wanted.disabled if "disabled" in paths else row.disabled
            if row.admin and not row.disabled and not (admin and not disabled):
                await _check_not_last(tx.session, row, "disabled" if disabled else "demoted")
            for what, before, after in (("admin", row.admin, admin), ("disabled", row.disabled, disabled)):
                if before != after:
                    auth.note(f"{what} {before} -> {after}".lower())
            row.admin, row.disabled = admin, disabled
            if "description" in paths:
                row.description = wanted.description
            if memberships is not None:
                message = await _replace_memberships(tx, row, memberships)
            else:
                (message,) = await _messages(tx.session, [row])
        self._gatekeeper.forget()
        return project_pb2.UpdateUserResponse(user=message)

    async def DeleteUser(
        self, request: project_pb2.DeleteUserRequest, context: Context
    ) -> project_pb2.DeleteUserResponse:
        async with self._store.write() as tx:
            row = await scope.user(tx.session, request.name)
            if row.admin and not row.disabled:
                await _check_not_last(tx.session, row, "deleted")
            await tx.session.execute(delete(schema.ApiKey).where(schema.ApiKey.user_uid == row.uid))
            await tx.session.execute(delete(schema.Membership).where(schema.Membership.user_uid == row.uid))
            await tx.session.delete(row)
        self._gatekeeper.forget()
        return project_pb2.DeleteUserResponse()

    async def GetCaller(
        self, request: project_pb2.GetCallerRequest, context: Context
    ) -> project_pb2.GetCallerResponse:
        caller = auth.current()
        async with self._store.read() as session:
            user = await session.get(schema.User, caller.user_uid)
            key = await session.get(schema.ApiKey, caller.uid)
            if user is None or key is None:
                raise errors.Unauthenticated("this API key was deleted just now", reason="UNKNOWN_SECRET")
            (message,) = await _messages(session, [user])
            return project_pb2.GetCallerResponse(user=message, key=await key_message(session, user, key))


async def _check_not_last(session: AsyncSession, row: schema.User, how: str) -> None:
    others = await session.scalar(
        select(func.count())
        .select_from(schema.User)
        .where(schema.User.admin, schema.User.disabled.is_(False), schema.User.uid != row.uid)
    )
    if not others:
        raise errors.FailedPrecondition(
            f"`{row.name}` is the last administrator and cannot be {how}; make another one first: "
            "dure user create NAME --admin",
            reason="LAST_ADMIN",
        )


async def _memberships(
    session: AsyncSession, wanted: project_pb2.User, violations: list[Violation]
) -> dict[str, tuple[str, str]]:
    """Uid of each project to its name and the role in it; adds what is wrong to the violations."""
    if len(wanted.memberships) > MEMBERSHIPS_MAX:
        violations.append(Violation("user.memberships", f"at most {MEMBERSHIPS_MAX}"))
        return {}
    asked = [each.project.removeprefix("projects/") for each in wanted.memberships]
    rows = await session.execute(
        select(schema.Project.name, schema.Project.uid).where(schema.Project.name.in_(asked))
    )
    known: dict[str, str] = dict(rows.all())
    found: dict[str, tuple[str, str]] = {}
    for index, (project, each) in enumerate(zip(asked, wanted.memberships, strict=True)):
        field = f"user.memberships[{index}]"
        if each.role not in _ROLES:
            violations.append(
                Violation(f"{field}.role", "must be MEMBER or VIEWER; an administrator is made by `admin`")
            )
        if project not in known:
            violations.append(
                Violation(f"{field}.project", f"no project `{project[:60]}`; `dure project list` shows all")
            )
        elif known[project] in found:
            violations.append(Violation(f"{field}.project", f"`{project}` comes twice"))
        elif each.role in _ROLES:
            found[known[project]] = (project, _ROLES[each.role])
    return found


async def _replace_memberships(
    tx: Tx, row: schema.User, wanted: dict[str, tuple[str, str]]
) -> project_pb2.User:
    """Makes the wanted ones all that there are. Returns the user as it then is."""
    current = {
        each.project_uid: each
        for each in await tx.session.scalars(
            select(schema.Membership).where(schema.Membership.user_uid == row.uid)
        )
    }
    for project_uid, each in current.items():
        if project_uid not in wanted:
            project = await tx.session.get(schema.Project, project_uid)
            auth.note(f"no longer {each.role} of {project.name if project is not None else project_uid}")
            await tx.session.delete(each)
    for project_uid, (project_name, role) in wanted.items():
        known = current.get(project_uid)
        if known is None:
            auth.note(f"{role} of {project_name}")
            tx.session.add(schema.Membership(user_uid=row.uid, project_uid=project_uid, role=role))
        elif known.role != role:
            auth.note(f"{known.role} -> {role} of {project_name}")
            known.role = role
    await tx.session.flush()
    (message,) = await _messages(tx.session, [row])
    return message


async def _messages(session: AsyncSession, rows: list[schema.User]) -> list[project_pb2.User]:
    memberships: dict[str, list[project_pb2.Membership]] = {}
    for user_uid, project, role in await session.execute(
        select(schema.Membership.user_uid, schema.Project.name, schema.Membership.role)
        .join(schema.Project, schema.Project.uid == schema.Membership.project_uid)
        .where(schema.Membership.user_uid.in_([row.uid for row in rows]))
        .order_by(schema.Project.name)
    ):
        memberships.setdefault(user_uid, []).append(
            project_pb2.Membership(project=project, role=_ROLE_VALUES[role])
        )
    return [
        project_pb2.User(
            name=names.user(row.name),
            uid=row.uid,
            admin=row.admin,
            memberships=memberships.get(row.uid, ()),
            description=row.description,
            disabled=row.disabled,
            create_time=messages.timestamp(row.created_ms),
        )
        for row in rows
    ]
