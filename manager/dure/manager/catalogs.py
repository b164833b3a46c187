"""What a request names of the catalogs: runtime, resource group, preset, image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.definitions.problems import nearest
from dure.definitions.service import RuntimeSection
from dure.manager import schema
from dure.v1 import catalog_pb2, endpoint_pb2
from dure.wire.errors import Violation

NAMES_MAX = 1000


@dataclass(frozen=True)
class Image:
    """An image as replicas get it; `name` is its short one if it is in the catalog."""

    reference: str = ""
    architecture: str = ""
    name: str = ""
    runtimes: Sequence[str] = ()
    min_slots: Mapping[str, int] = field(default_factory=dict)


class Catalogs:
    """Looks names up for one request; each that leads nowhere becomes a violation."""

    def __init__(self, session: AsyncSession, project: schema.Project, violations: list[Violation]) -> None:
        self._session = session
        self._project = project
        self._violations = violations

    async def runtime(self, name: str) -> catalog_pb2.Runtime | None:
        row = await self._session.get(schema.Runtime, name[:64])
        if row is not None and row.name == name:
            return catalog_pb2.Runtime.FromString(row.content)
        known = await self.runtime_names()
        self._unknown("endpoint.runtime", "runtime", name, known)
        return None

    async def runtime_names(self) -> list[str]:
        query = select(schema.Runtime.name).order_by(schema.Runtime.name).limit(NAMES_MAX)
        return list(await self._session.scalars(query))

    async def resource_group(self, name: str) -> None:
        field = "endpoint.resource_group"
        row = await self._session.get(schema.ResourceGroup, name)
        if row is not None and (not row.allowed_projects or self._project.uid in row.allowed_projects):
            return
        if row is not None:
            denied = f"project `{self._project.name}` may not use the resource group `{name}`; "
            self._violations.append(
                Violation(field, denied + "choose another one (`dure group list`) or ask an administrator")
            )
            return
        rows = await self._session.scalars(select(schema.ResourceGroup).limit(NAMES_MAX))
        allowed = [
            row.name for row in rows if not row.allowed_projects or self._project.uid in row.allowed_projects
        ]
        self._unknown(field, "resource group", name, allowed)

    async def preset(self, name: str, group: str) -> schema.Preset | None:
        if not name:
            return None
        row = await self._session.get(schema.Preset, name.removeprefix("presets/"))
        if row is None:
            query = select(schema.Preset.name).limit(NAMES_MAX)
            self._unknown("endpoint.preset", "preset", name, list(await self._session.scalars(query)))
            return None
        if row.resource_group and row.resource_group != group:
            other = f"preset `{name}` is for the resource group `{row.resource_group}`, not for `{group}`"
            self._violations.append(Violation("endpoint.preset", other))
        return row

    async def image(self, asked: endpoint_pb2.Endpoint, section: RuntimeSection) -> Image:
        """Image and architecture: the request's, else the service definition's, else the catalog's."""
        wanted = asked.image.removeprefix("images/") if asked.image else section.image
        said = asked.architecture or ("" if asked.image else section.architecture)
        if not wanted:
            return Image(architecture=said)
        query = select(schema.Image).where(or_(schema.Image.name == wanted, schema.Image.reference == wanted))
        rows = list(await self._session.scalars(query.order_by(schema.Image.name).limit(NAMES_MAX)))
        rows = [row for row in rows if row.name == wanted] or rows
        fitting = [row for row in rows if not said or row.architecture == said]
        if fitting:
            row = fitting[0]
            return Image(row.reference, said or row.architecture, row.name, row.runtimes, row.min_slots)
        if rows:
            other = f"image `{rows[0].name}` is for {rows[0].architecture}, not for {said}"
            self._violations.append(Violation("endpoint.architecture", other))
        elif not any(sign in wanted for sign in "/:@."):
            query_names = select(schema.Image.name).limit(NAMES_MAX)
            known = list(await self._session.scalars(query_names))
            near = nearest(wanted, known)
            hint = f"did you mean `{near}`?" if near else "`dure image list` shows them"
            self._violations.append(
                Violation(
                    "endpoint.image",
                    f"no image has the short name `{wanted[:60]}`; {hint}, or write its full path, such as "
                    "`example.com/model-server:latest`",
                )
            )
        return Image(wanted, said)

    def _unknown(self, field: str, what: str, name: str, known: list[str]) -> None:
        near = nearest(name, known)
        if near is not None:
            hint = f"did you mean `{near}`?"
        else:
            hint = f"known: {', '.join(f'`{one}`' for one in known[:20])}" if known else f"there is no {what}"
        self._violations.append(Violation(field, f"unknown {what} `{name[:60]}`; {hint}"))
