"""Folders that a request names: the model folder, and those beside it."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.fleet.v1 import fleet_pb2
from dure.manager import asked as fields
from dure.manager import schema
from dure.manager.folders import Folders
from dure.v1 import endpoint_pb2
from dure.wire import errors, names
from dure.wire.errors import InvalidInput, Violation


async def model_folder(
    session: AsyncSession, project: schema.Project, model: str, violations: list[Violation]
) -> schema.Folder | None:
    """Raises NotFound if there is no such folder, and nothing else is wrong so far."""
    field = "endpoint.model"
    if not model:
        violations.append(Violation(field, "a model folder is required"))
        return None
    try:
        folder = await _folder(session, project, model, field)
    except errors.NotFound as error:
        if not violations:
            raise
        violations.append(Violation(field, error.message))
        return None
    except InvalidInput as error:
        violations.extend(error.violations)
        return None
    if folder.usage != "MODEL":
        found = f"folder `{folder.name}` has usage {folder.usage.lower()}; a model folder is needed"
        violations.append(Violation(field, found))
        return None
    return folder


async def extra_mounts(
    session: AsyncSession,
    folders: Folders,
    project: schema.Project,
    wanted: endpoint_pb2.Endpoint,
    asked: endpoint_pb2.Endpoint,
    violations: list[Violation],
) -> list[fleet_pb2.Mount]:
    """The mounts that `wanted` names; their targets are written to `asked`, its canonical form."""
    if len(asked.extra_mounts) > fields.EXTRA_MOUNTS_MAX:
        found = f"found {len(asked.extra_mounts)}, expected at most {fields.EXTRA_MOUNTS_MAX}"
        violations.append(Violation("endpoint.extra_mounts", found))
        return []
    targets = [("endpoint.model_mount_destination", asked.model_mount_destination)]
    mounts: list[fleet_pb2.Mount] = []
    for index, (named, mount) in enumerate(zip(wanted.extra_mounts, asked.extra_mounts, strict=True)):
        field = f"endpoint.extra_mounts[{index}]"
        if not named.folder:
            violations.append(Violation(f"{field}.folder", "a folder is required"))
            continue
        mount.target = fields.mount_target(mount.target, f"{field}.target", violations)
        mount.subpath = mount.subpath.strip("/")
        targets.append((f"{field}.target", mount.target))
        try:
            folder = await _folder(session, project, named.folder, f"{field}.folder")
            if folder.usage == "MODEL":
                used = "only data and general folders can be mounted beside the model"
                found = f"folder `{folder.name}` has usage model; {used}"
                violations.append(Violation(f"{field}.folder", found))
            elif mount.subpath and not await folders.has_directory(folder.uid, mount.subpath):
                missing = f"folder `{folder.name}` has no sub-folder `{mount.subpath[:120]}`"
                violations.append(Violation(f"{field}.subpath", missing))
        except errors.NotFound as error:
            violations.append(Violation(f"{field}.folder", error.message))
            continue
        except InvalidInput as error:
            for wrong in error.violations:
                at = f"{field}.subpath" if wrong.field == "path" else wrong.field
                violations.append(Violation(at, wrong.description))
            continue
        mounts.append(
            fleet_pb2.Mount(
                folder_uid=folder.uid,
                folder=folder.name,
                target=mount.target,
                writable=mount.writable,
                subpath=mount.subpath,
            )
        )
    fields.check_overlaps(targets, violations)
    return mounts


async def _folder(session: AsyncSession, project: schema.Project, name: str, field: str) -> schema.Folder:
    """A folder of the endpoint's own project, by its bare or its whole name.

    Of other projects nothing is said, not even whether they have the folder. Raises NotFound, InvalidInput.
    """
    folder_id = name
    if "/" in name:
        project_id, folder_id = names.parse(name, "projects/{}/folders/{}", field)
        if project_id != project.name:
            other = f"`{name[:120]}` belongs to another project; an endpoint uses folders of its own project"
            raise InvalidInput.of([Violation(field, other)])
    row = await session.scalar(
        select(schema.Folder).where(schema.Folder.project_uid == project.uid, schema.Folder.name == folder_id)
    )
    if row is None:
        raise errors.NotFound(
            f"no folder `{folder_id[:120]}` in project `{project.name}`", reason="FOLDER_NOT_FOUND"
        )
    return row
