"""Calls about registries: with what the images of a project are fetched."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.v1 import registry_pb2, registry_pb2_grpc
from dure.v1.registry_pb2 import Registry
from dure.wire import names
from dure.wire.errors import InvalidInput, Violation
from dure.wire.images import registry_host


class RegistryGroup:
    """`client.registries`. A host is given as it stands in images, `registry.example.com:5000`; `docker.io`
    is for images that name none."""

    def __init__(self, caller: Caller, project: str) -> None:
        self._caller = caller
        self._project = project
        self._stub = registry_pb2_grpc.RegistryServiceStub(caller.channel)

    async def set(self, host: str, username: str, password: str) -> Registry:
        """Keeps a credential, in place of one for the same host. The password is never shown again."""
        wanted = Registry(name=self._name(host), username=username, password=password)
        request = registry_pb2.SetRegistryRequest(registry=wanted)
        return (await self._caller.unary(self._stub.SetRegistry, request)).registry

    def list(self) -> AsyncGenerator[Registry, None]:
        """By host, without passwords."""

        async def fetch(token: str) -> tuple[list[Registry], str]:
            request = registry_pb2.ListRegistriesRequest(
                parent=names.project(self._project), page_size=PAGE_SIZE, page_token=token
            )
            page = await self._caller.unary(self._stub.ListRegistries, request)
            return [*page.registries], page.next_page_token

        return all_pages(fetch)

    async def delete(self, host: str) -> None:
        request = registry_pb2.DeleteRegistryRequest(name=self._name(host))
        await self._caller.unary(self._stub.DeleteRegistry, request, idempotent=False)

    def _name(self, host: str) -> str:
        """Raises InvalidInput."""
        if host.startswith("projects/"):
            return host
        try:
            return names.registry(self._project, registry_host(host))
        except ValueError as error:
            raise InvalidInput.of([Violation("host", str(error))]) from error
