"""Calls about users and their API keys."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.v1 import project_pb2, project_pb2_grpc
from dure.v1.project_pb2 import ApiKey, GetCallerResponse, Membership, Role, User
from dure.wire import names


class UserGroup:
    """`client.users`. Memberships map a project to ROLE_MEMBER or ROLE_VIEWER."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = project_pb2_grpc.UserServiceStub(caller.channel)

    async def create(
        self,
        name: str,
        *,
        admin: bool = False,
        memberships: Mapping[str, Role.ValueType] | None = None,
        description: str = "",
    ) -> User:
        """A user has no key yet: `client.keys.create(user=name)` makes one."""
        wanted = User(admin=admin, memberships=_memberships(memberships or {}), description=description)
        request = project_pb2.CreateUserRequest(user_id=name, user=wanted)
        return (await self._caller.unary(self._stub.CreateUser, request, idempotent=False)).user

    async def get(self, name: str) -> User:
        request = project_pb2.GetUserRequest(name=_user(name))
        return (await self._caller.unary(self._stub.GetUser, request)).user

    def list(self) -> AsyncGenerator[User, None]:
        """By name."""

        async def fetch(token: str) -> tuple[list[User], str]:
            request = project_pb2.ListUsersRequest(page_size=PAGE_SIZE, page_token=token)
            page = await self._caller.unary(self._stub.ListUsers, request)
            return [*page.users], page.next_page_token

        return all_pages(fetch)

    async def update(
        self,
        name: str,
        *,
        admin: bool | None = None,
        memberships: Mapping[str, Role.ValueType] | None = None,
        description: str | None = None,
        disabled: bool | None = None,
    ) -> User:
        """Changes what is given; `memberships` replaces all of them."""
        request = project_pb2.UpdateUserRequest(user=User(name=_user(name)))
        if admin is not None:
            request.user.admin = admin
            request.update_mask.paths.append("admin")
        if memberships is not None:
            request.user.memberships.extend(_memberships(memberships))
            request.update_mask.paths.append("memberships")
        if description is not None:
            request.user.description = description
            request.update_mask.paths.append("description")
        if disabled is not None:
            request.user.disabled = disabled
            request.update_mask.paths.append("disabled")
        return (await self._caller.unary(self._stub.UpdateUser, request)).user

    async def delete(self, name: str) -> None:
        """With all of its keys."""
        request = project_pb2.DeleteUserRequest(name=_user(name))
        await self._caller.unary(self._stub.DeleteUser, request, idempotent=False)

    async def caller(self) -> GetCallerResponse:
        """Who this client is, and by which key."""
        return await self._caller.unary(self._stub.GetCaller, project_pb2.GetCallerRequest())


class KeyGroup:
    """`client.keys`. Where a user is left out, the caller is meant."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = project_pb2_grpc.UserServiceStub(caller.channel)

    async def create(
        self,
        *,
        user: str = "",
        label: str = "",
        role: Role.ValueType = project_pb2.ROLE_UNSPECIFIED,
        project: str = "",
        ttl_s: float | None = None,
    ) -> ApiKey:
        """With its secret, which is not shown again. `role` and `project` bound what it allows."""
        wanted = ApiKey(label=label, role=role, project=project)
        request = project_pb2.CreateApiKeyRequest(parent=_user(user) if user else "", key=wanted)
        if ttl_s is not None:
            request.ttl.FromNanoseconds(round(ttl_s * 1e9))
        return (await self._caller.unary(self._stub.CreateApiKey, request, idempotent=False)).key

    def list(self, user: str = "") -> AsyncGenerator[ApiKey, None]:
        """Oldest first, without their secrets."""

        async def fetch(token: str) -> tuple[list[ApiKey], str]:
            request = project_pb2.ListApiKeysRequest(
                parent=_user(user) if user else "", page_size=PAGE_SIZE, page_token=token
            )
            page = await self._caller.unary(self._stub.ListApiKeys, request)
            return [*page.keys], page.next_page_token

        return all_pages(fetch)

    async def delete(self, name: str) -> None:
        """By its full name, `users/{user}/keys/{uid}`. It ends at once."""
        request = project_pb2.DeleteApiKeyRequest(name=name)
        await self._caller.unary(self._stub.DeleteApiKey, request, idempotent=False)


def _user(name: str) -> str:
    return name if "/" in name else names.user(name)


def _memberships(wanted: Mapping[str, Role.ValueType]) -> list[Membership]:
    return [Membership(project=project, role=role) for project, role in wanted.items()]
