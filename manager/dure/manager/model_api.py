"""ModelService: the model store."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any, Protocol

import grpc.aio
from sqlalchemy import select

from dure.definitions.check import Report
from dure.definitions.problems import Problem, invalid
from dure.manager import messages, schema, scope
from dure.manager.definitions import check_folder
from dure.manager.folders import Folders
from dure.manager.runtime_api import RUNTIMES_MAX
from dure.manager.store import Store
from dure.v1 import endpoint_pb2, model_pb2, model_pb2_grpc
from dure.wire import errors, names
from dure.wire.errors import InvalidInput, Violation

Context = grpc.aio.ServicerContext[Any, Any]

PAGE_MAX = 100


class Create(Protocol):
    """Makes an endpoint, as CreateEndpoint does."""

    def __call__(
        self, parent: str, endpoint_id: str, wanted: endpoint_pb2.Endpoint, *, request_id: str = ""
    ) -> Awaitable[endpoint_pb2.Endpoint]: ...


class ModelApi(model_pb2_grpc.ModelServiceServicer):
    """Model folders by what their definition files say, read anew at every call."""

    def __init__(self, store: Store, folders: Folders, create: Create) -> None:
        self._store = store
        self._folders = folders
        self._create = create

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: Context
    ) -> model_pb2.GetModelResponse:
        project, folder, known = await self._find(request.name)
        report = await self._report(folder, known)
        return model_pb2.GetModelResponse(model=_shown(project.name, folder, report))

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        size = min(scope.page_size(request.page_size), PAGE_MAX)
        after = scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            project = await scope.project(session, request.parent)
            known = list(await session.scalars(select(schema.Runtime.name).limit(RUNTIMES_MAX)))
            rows = list(
                await session.scalars(
                    select(schema.Folder)
                    .where(
                        schema.Folder.project_uid == project.uid,
                        schema.Folder.usage == "MODEL",
                        schema.Folder.name > after,
                    )
                    .order_by(schema.Folder.name)
                    .limit(size + 1)
                )
            )
        rows, token = scope.page(rows, size, [row.name for row in rows])
        models = [_shown(project.name, row, await self._report(row, known)) for row in rows]
        return model_pb2.ListModelsResponse(models=models, next_page_token=token)

    async def RunModel(
        self, request: model_pb2.RunModelRequest, context: Context
    ) -> model_pb2.RunModelResponse:
        project, folder, known = await self._find(request.name)
        report = await self._report(folder, known)
        if report.problems:
            raise invalid(report.problems)
        sections = report.service or {}
        wanted = endpoint_pb2.Endpoint()
        wanted.CopyFrom(request.endpoint)
        if wanted.model and wanted.model.rsplit("/", 1)[-1] != folder.name:
            clash = f"found `{wanted.model[:120]}`, expected nothing, or `{folder.name}`"
            raise InvalidInput.of([Violation("endpoint.model", clash)])
        wanted.model = folder.name
        wanted.runtime = request.runtime or wanted.runtime or next(iter(sections))
        if wanted.runtime not in sections:
            there = ", ".join(f"`{name}`" for name in sections)
            missing = f"the service definition has no section for `{wanted.runtime[:60]}`; it has {there}"
            raise InvalidInput.of([Violation("runtime", missing)])
        wanted.replica_count = wanted.replica_count or 1
        endpoint = await self._create(
            names.project(project.name),
            request.endpoint_id or endpoint_id_of(folder.name),
            wanted,
            request_id=request.request_id,
        )
        return model_pb2.RunModelResponse(endpoint=endpoint)

    async def _find(self, name: str) -> tuple[schema.Project, schema.Folder, list[str]]:
        async with self._store.read() as session:
            project, folder = await scope.folder(session, name)
            known = list(await session.scalars(select(schema.Runtime.name).limit(RUNTIMES_MAX)))
        if folder.usage != "MODEL":
            raise errors.NotFound(
                f"folder `{folder.name}` has usage {folder.usage.lower()}: it is no model",
                reason="MODEL_NOT_FOUND",
            )
        return project, folder, known

    async def _report(self, folder: schema.Folder, known: list[str]) -> Report:
        """With a problem for each of the two files that is missing."""
        try:
            report = await check_folder(self._folders, folder, known)
        except InvalidInput as error:
            problems = [Problem(wrong.field, 0, "", wrong.description) for wrong in error.violations]
            return Report(problems, [])
        told = {problem.file for problem in report.problems}
        say = "there is no such file in the folder; the model store runs a model by it"
        missing = [Problem(name, 0, "", say) for name in report.missing if name not in told]
        return replace(report, problems=[*report.problems, *missing])


def endpoint_id_of(folder: str) -> str:
    """A name for an endpoint: the folder's in lower case, with `-` for what cannot stand in one."""
    made = re.sub(r"[^a-z0-9]+", "-", folder.lower()).strip("-")[:63].rstrip("-")
    return made if re.match(r"[a-z]", made) else f"model-{made}"[:63].rstrip("-")


def _shown(project: str, folder: schema.Folder, report: Report) -> model_pb2.Model:
    model = model_pb2.Model(
        folder=names.folder(project, folder.name),
        runtimes=list(report.service or ()),
        runnable=not report.problems,
        problems=[messages.file_problem(problem) for problem in report.problems],
    )
    if report.definition is not None:
        model.model_name = report.definition.model_name
        model.metadata.CopyFrom(model_pb2.ModelMetadata(**report.definition.metadata))
    return model
