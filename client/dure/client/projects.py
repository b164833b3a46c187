"""Calls about projects: what they may use, what they use, and who changed what."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.v1 import project_pb2, project_pb2_grpc
from dure.v1.project_pb2 import AuditRecord, GetUsageResponse, Project
from dure.wire import names


class ProjectGroup:
    """`client.projects`. Where a name is left out, the client's own project is meant."""

    def __init__(self, caller: Caller, project: str) -> None:
        self._caller = caller
        self._project = project
        self._stub = project_pb2_grpc.ProjectServiceStub(caller.channel)

    async def create(
        self,
        name: str,
        *,
        description: str = "",
        quota_slots: Mapping[str, str] | None = None,
        quota_endpoints: int = 0,
    ) -> Project:
        """A slot that `quota_slots` leaves out has no limit, and 0 endpoints is none."""
        wanted = Project(description=description, quota_slots=quota_slots, quota_endpoints=quota_endpoints)
        request = project_pb2.CreateProjectRequest(project_id=name, project=wanted)
        return (await self._caller.unary(self._stub.CreateProject, request, idempotent=False)).project

    async def get(self, name: str = "") -> Project:
        request = project_pb2.GetProjectRequest(name=self._name(name))
        return (await self._caller.unary(self._stub.GetProject, request)).project

    def list(self) -> AsyncGenerator[Project, None]:
        """Those that the caller has a role in, by name."""

        async def fetch(token: str) -> tuple[list[Project], str]:
            request = project_pb2.ListProjectsRequest(page_size=PAGE_SIZE, page_token=token)
            page = await self._caller.unary(self._stub.ListProjects, request)
            return [*page.projects], page.next_page_token

        return all_pages(fetch)

    async def update(
        self,
        name: str,
        *,
        description: str | None = None,
        quota_slots: Mapping[str, str] | None = None,
        quota_endpoints: int | None = None,
    ) -> Project:
        """Changes what is given; `quota_slots` replaces all of them."""
        request = project_pb2.UpdateProjectRequest(project=Project(name=self._name(name)))
        if description is not None:
            request.project.description = description
            request.update_mask.paths.append("description")
        if quota_slots is not None:
            request.project.quota_slots.update(quota_slots)
            request.update_mask.paths.append("quota_slots")
        if quota_endpoints is not None:
            request.project.quota_endpoints = quota_endpoints
            request.update_mask.paths.append("quota_endpoints")
        return (await self._caller.unary(self._stub.UpdateProject, request)).project

    async def delete(self, name: str) -> None:
        """Refused while it has endpoints, folders or members."""
        request = project_pb2.DeleteProjectRequest(name=self._name(name))
        await self._caller.unary(self._stub.DeleteProject, request, idempotent=False)

    async def usage(self, name: str = "") -> GetUsageResponse:
        request = project_pb2.GetUsageRequest(name=self._name(name))
        return await self._caller.unary(self._stub.GetUsage, request)

    def audit(
        self, name: str | None = "", *, max_age_s: float | None = None
    ) -> AsyncGenerator[AuditRecord, None]:
        """Who changed what, newest first; `name` None is for the whole cluster (administrators)."""
        parent = "" if name is None else self._name(name)

        async def fetch(token: str) -> tuple[list[AuditRecord], str]:
            request = project_pb2.ListAuditRecordsRequest(
                parent=parent, page_size=PAGE_SIZE, page_token=token
            )
            if max_age_s is not None:
                request.max_age.FromNanoseconds(round(max_age_s * 1e9))
            page = await self._caller.unary(self._stub.ListAuditRecords, request)
            return [*page.records], page.next_page_token

        return all_pages(fetch)

    def _name(self, name: str) -> str:
        return name if "/" in name else names.project(name or self._project)
