"""RegistryService: the credentials with which the images of a project are fetched.

A password is sealed when it comes in, and opened only for an agent that fetches such an image (see
`fleet_api`). It stands in no answer, record, event or log.
"""

from __future__ import annotations

from typing import Any

import grpc.aio
from sqlalchemy import func, select

from dure.manager import auth, messages, schema, scope
from dure.manager.sealing import Seal
from dure.manager.store import Store, now_ms
from dure.v1 import registry_pb2, registry_pb2_grpc
from dure.wire import errors, images, names
from dure.wire.errors import Violation

Context = grpc.aio.ServicerContext[Any, Any]

REGISTRIES_MAX = 100
USERNAME_MAX = 255
# Cloud registries take whole key files as a password.
PASSWORD_BYTES_MAX = 16 * 1024


class RegistryApi(registry_pb2_grpc.RegistryServiceServicer):
    """Registries of projects."""

    def __init__(self, store: Store, seal: Seal) -> None:
        self._store = store
        self._seal = seal

    async def SetRegistry(
        self, request: registry_pb2.SetRegistryRequest, context: Context
    ) -> registry_pb2.SetRegistryResponse:
        wanted = request.registry
        project_id, host = names.parse(wanted.name, "projects/{}/registries/{}", "registry.name")
        violations: list[Violation] = []
        try:
            host = images.registry_host(host)
        except ValueError as error:
            violations.append(Violation("registry.name", str(error)))
        violations += _check(wanted)
        if violations:
            raise errors.InvalidInput.of(violations)
        now, sealed = now_ms(), self._seal.close(wanted.password)
        async with self._store.write() as tx:
            project = await scope.project(tx.session, names.project(project_id), "registry.name")
            row = await tx.session.get(schema.Registry, (project.uid, host))
            if row is None:
                kept = await tx.session.scalar(
                    select(func.count())
                    .select_from(schema.Registry)
                    .where(schema.Registry.project_uid == project.uid)
                )
                if (kept or 0) >= REGISTRIES_MAX:
                    raise errors.ResourceExhausted(
                        f"project `{project.name}` has {REGISTRIES_MAX} registries already; delete some: "
                        "dure registry list"
                    )
                row = schema.Registry(project_uid=project.uid, host=host, created_ms=now)
                tx.session.add(row)
                auth.note("a new credential")
            else:
                auth.note("another credential in place of the one before")
            row.username, row.password, row.updated_ms = wanted.username, sealed, now
        return registry_pb2.SetRegistryResponse(registry=_message(row, project.name))

    async def ListRegistries(
        self, request: registry_pb2.ListRegistriesRequest, context: Context
    ) -> registry_pb2.ListRegistriesResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            project = await scope.project(session, request.parent)
            query = select(schema.Registry).where(
                schema.Registry.project_uid == project.uid, schema.Registry.host > after
            )
            rows = list(await session.scalars(query.order_by(schema.Registry.host).limit(size + 1)))
        rows, token = scope.page(rows, size, [row.host for row in rows])
        return registry_pb2.ListRegistriesResponse(
            registries=[_message(row, project.name) for row in rows], next_page_token=token
        )

    async def DeleteRegistry(
        self, request: registry_pb2.DeleteRegistryRequest, context: Context
    ) -> registry_pb2.DeleteRegistryResponse:
        project_id, host = names.parse(request.name, "projects/{}/registries/{}")
        try:
            host = images.registry_host(host)
        except ValueError as error:
            raise errors.InvalidInput.of([Violation("name", str(error))]) from error
        async with self._store.write() as tx:
            project = await scope.project(tx.session, names.project(project_id), "name")
            row = await tx.session.get(schema.Registry, (project.uid, host))
            if row is None:
                raise errors.NotFound(
                    f"project `{project.name}` has no credential for `{host}`; `dure registry list` shows "
                    "all",
                    reason="REGISTRY_NOT_FOUND",
                )
            await tx.session.delete(row)
        return registry_pb2.DeleteRegistryResponse()


def _check(wanted: registry_pb2.Registry) -> list[Violation]:
    """What is wrong with user and password, in words that do not quote the password."""
    violations = []
    if not wanted.username:
        violations.append(Violation("registry.username", "is required"))
    elif len(wanted.username) > USERNAME_MAX or ":" in wanted.username or not wanted.username.isprintable():
        limits = f"must have at most {USERNAME_MAX} characters, no colon and no control characters"
        violations.append(Violation("registry.username", limits))
    if not wanted.password:
        violations.append(Violation("registry.password", "is required"))
    elif len(wanted.password.encode()) > PASSWORD_BYTES_MAX:
        violations.append(Violation("registry.password", f"is longer than {PASSWORD_BYTES_MAX} bytes"))
    elif "\0" in wanted.password:
        violations.append(Violation("registry.password", "has a null character"))
    return violations


def _message(row: schema.Registry, project: str) -> registry_pb2.Registry:
    return registry_pb2.Registry(
        name=names.registry(project, row.host),
        username=row.username,
        create_time=messages.timestamp(row.created_ms),
        update_time=messages.timestamp(row.updated_ms),
    )
