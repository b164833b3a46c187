"""Calls about the model store."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator

from dure.client.call import Caller, all_pages
from dure.v1 import model_pb2, model_pb2_grpc
from dure.v1.endpoint_pb2 import Endpoint
from dure.v1.model_pb2 import Model
from dure.wire import names

# The manager reads the files of every model of a page.
MODEL_PAGE_SIZE = 50


class ModelGroup:
    """`client.models`: model folders by what their definition files say.

    async for model in client.models.list():
        print(model.folder, model.runnable)
    endpoint = await client.models.run("smollm2")
    """

    def __init__(self, caller: Caller, project: str) -> None:
        self._caller = caller
        self._project = project
        self._stub = model_pb2_grpc.ModelServiceStub(caller.channel)

    async def get(self, name: str) -> Model:
        request = model_pb2.GetModelRequest(name=self._full_name(name))
        return (await self._caller.unary(self._stub.GetModel, request)).model

    async def run(
        self,
        name: str,
        *,
        endpoint_id: str = "",
        runtime: str = "",
        replicas: int = 1,
        endpoint: Endpoint | None = None,
    ) -> Endpoint:
        """Makes an endpoint from the service definition; `endpoint` has what else is wanted over it."""
        wanted = Endpoint()
        if endpoint is not None:
            wanted.CopyFrom(endpoint)
        wanted.replica_count = replicas
        request = model_pb2.RunModelRequest(
            name=self._full_name(name),
            endpoint_id=endpoint_id,
            runtime=runtime,
            endpoint=wanted,
            # Makes it safe to repeat when an answer was lost.
            request_id=str(uuid.uuid4()),
        )
        return (await self._caller.unary(self._stub.RunModel, request)).endpoint

    # Below it, `list` in an annotation would mean this.
    def list(self) -> AsyncGenerator[Model, None]:
        """By name of their folders."""

        async def fetch(token: str) -> tuple[list[Model], str]:
            request = model_pb2.ListModelsRequest(
                parent=names.project(self._project), page_size=MODEL_PAGE_SIZE, page_token=token
            )
            page = await self._caller.unary(self._stub.ListModels, request)
            return [*page.models], page.next_page_token

        return all_pages(fetch)

    def _full_name(self, name: str) -> str:
        return name if "/" in name else names.folder(self._project, name)
