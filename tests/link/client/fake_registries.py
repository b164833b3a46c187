"""The fake manager's RegistryService."""

from __future__ import annotations

from typing import Any

from link.client.fake_state import FakeManager, page, refuses

from dure.v1 import registry_pb2, registry_pb2_grpc
from dure.wire.errors import NotFound


class Registries(registry_pb2_grpc.RegistryServiceServicer):
    """Keeps what it is given, passwords included, for the test to look at."""

    def __init__(self, fake: FakeManager) -> None:
        self.fake = fake

    @refuses
    async def SetRegistry(self, request: Any, context: Any) -> registry_pb2.SetRegistryResponse:
        self.fake.called("SetRegistry")
        kept = registry_pb2.Registry()
        kept.CopyFrom(request.registry)
        kept.create_time.GetCurrentTime()
        kept.update_time.GetCurrentTime()
        self.fake.registries[kept.name] = kept
        return registry_pb2.SetRegistryResponse(registry=shown(kept))

    @refuses
    async def ListRegistries(self, request: Any, context: Any) -> registry_pb2.ListRegistriesResponse:
        self.fake.called("ListRegistries")
        mine = sorted(name for name in self.fake.registries if name.startswith(f"{request.parent}/"))
        items, token = page([shown(self.fake.registries[name]) for name in mine], request, self.fake)
        return registry_pb2.ListRegistriesResponse(registries=items, next_page_token=token)

    @refuses
    async def DeleteRegistry(self, request: Any, context: Any) -> registry_pb2.DeleteRegistryResponse:
        self.fake.called("DeleteRegistry")
        if self.fake.registries.pop(request.name, None) is None:
            raise NotFound("no credential for this host; `dure registry list` shows all")
        return registry_pb2.DeleteRegistryResponse()


def shown(registry: registry_pb2.Registry) -> registry_pb2.Registry:
    answer = registry_pb2.Registry()
    answer.CopyFrom(registry)
    answer.ClearField("password")
    return answer
