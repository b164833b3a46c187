"""What a new endpoint is made of: the request checked as a whole, the definition file read, the result kept.

A revision holds what was asked for, the definition's text, and a template of the kernels that run it.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from sqlalchemy.ext.asyncio import AsyncSession

from dure.fleet.v1 import fleet_pb2
from dure.manager import definition, schema, scope
from dure.manager.folders import Folders, check_path
from dure.v1 import endpoint_pb2
from dure.wire import errors, names, quantities
from dure.wire.errors import InvalidInput, Violation
from dure.wire.quantities import CPU, MEM

RUNTIMES = ("custom",)
MOUNT_DESTINATION = "/models"
REPLICAS_MAX = 10_000
ENVIRON_MAX, ENVIRON_BYTES_MAX = 200, 64 * 1024
# Every session needs some of both; what a request leaves out.
SLOT_DEFAULTS = {CPU: 1_000, MEM: (1 << 30) * 1_000}
# The node's own folders; a model that covers one of them would take its system away.
_NOT_MOUNTABLE = (
    "/",
    "/proc",
    "/sys",
    "/dev",
    "/etc",
    "/usr",
    "/bin",
    "/lib",
    "/lib64",
    "/sbin",
    "/run",
    "/home/work",
    "/root",
    "/tmp",
    "/var",
    "/opt",
    "/boot",
)


@dataclass(frozen=True)
class Draft:
    """A revision that is right, not yet stored."""

    folder_uid: str
    spec: dict[str, Any]
    definition: str
    kernel: bytes

    def row(self, endpoint_uid: str, number: int, created_ms: int) -> schema.Revision:
        return schema.Revision(
            endpoint_uid=endpoint_uid,
            number=number,
            created_ms=created_ms,
            folder_uid=self.folder_uid,
            spec=self.spec,
            definition=self.definition,
            kernel=self.kernel,
        )


async def draft(
    session: AsyncSession,
    folders: Folders,
    project: schema.Project,
    wanted: endpoint_pb2.Endpoint,
    endpoint_id: str,
) -> Draft:
    """Checks everything and raises InvalidInput with all that is wrong at once (NotFound for the folder)."""
    violations: list[Violation] = []

    def check(violation: Violation | None) -> None:
        if violation is not None:
            violations.append(violation)

    check(names.check_id(endpoint_id, names.ENDPOINT_ID, "endpoint_id"))
    check(check_replica_count(wanted.replica_count))
    runtime = wanted.runtime or "custom"
    if runtime not in RUNTIMES:
        known = ", ".join(f"`{name}`" for name in RUNTIMES)
        check(Violation("endpoint.runtime", f"unknown runtime `{runtime[:60]}`; known: {known}"))
    slots = dict(SLOT_DEFAULTS)
    try:
        slots |= quantities.parse_slots(wanted.resource_slots, "endpoint.resource_slots")
    except InvalidInput as error:
        violations.extend(error.violations)
    target = _mount_destination(wanted.model_mount_destination, violations)
    _check_environ(wanted, violations)
    group = wanted.resource_group or "default"
    check(names.check_id(group, names.MEMBER_ID, "endpoint.resource_group"))
    folder = await _model_folder(session, project, wanted.model, violations)
    parsed: definition.Definition | None = None
    path, text = wanted.model_definition_path, ""
    if folder is not None:
        try:
            path, text = await _definition_text(folders, folder, wanted.model_definition_path)
            parsed = definition.parse(text, path)
        except InvalidInput as error:
            violations.extend(error.violations)
    if violations:
        raise InvalidInput.of(violations)
    assert folder is not None and parsed is not None
    kernel = fleet_pb2.KernelSpec()
    kernel.CopyFrom(parsed.kernel)
    kernel.endpoint, kernel.project = endpoint_id, project.name
    kernel.model.CopyFrom(fleet_pb2.Mount(folder_uid=folder.uid, folder=folder.name, target=target))
    for key, value in wanted.environ.items():
        kernel.environ[key] = value
    asked = endpoint_pb2.Endpoint(
        model=folder.name,
        runtime=runtime,
        model_mount_destination=target,
        # As asked for: empty means the default names, which a retry tries again.
        model_definition_path=wanted.model_definition_path,
        resource_group=group,
        resource_slots={
            slot: quantities.format_slot(slot, slots[slot]) for slot in wanted.resource_slots if slot in slots
        },
        environ=wanted.environ,
    )
    resolved = endpoint_pb2.Resolved(
        resource_slots={slot: quantities.format_slot(slot, amount) for slot, amount in slots.items()},
        environ=wanted.environ,
    )
    spec = {
        "asked": json_format.MessageToDict(asked, preserving_proto_field_name=True),
        "resolved": json_format.MessageToDict(resolved, preserving_proto_field_name=True),
        "folder": folder.name,
        "resource_group": group,
        "slots": slots,
        "cluster_mode": "SINGLE_NODE",
        "cluster_size": 1,
        "architecture": "",
        "needs_image": False,
    }
    return Draft(folder.uid, spec, text, kernel.SerializeToString(deterministic=True))


async def redraft(
    session: AsyncSession,
    folders: Folders,
    project: schema.Project,
    row: schema.Endpoint,
    current: schema.Revision,
) -> Draft:
    """The same request with the definition file as it is now."""
    wanted = json_format.ParseDict(current.spec["asked"], endpoint_pb2.Endpoint())
    wanted.replica_count = row.replica_count
    return await draft(session, folders, project, wanted, row.name)


def check_replica_count(count: int) -> Violation | None:
    if 0 <= count <= REPLICAS_MAX:
        return None
    return Violation("endpoint.replica_count", f"found {count}, expected 0 to {REPLICAS_MAX}")


def _mount_destination(asked: str, violations: list[Violation]) -> str:
    target = asked or MOUNT_DESTINATION
    field = "endpoint.model_mount_destination"
    if not target.startswith("/") or re.search(r"[\x00-\x1f:]", target) or ".." in target.split("/"):
        violations.append(Violation(field, f"`{target[:120]}` is not an absolute path without `..`"))
        return target
    target = posixpath.normpath(target).replace("//", "/")
    covered = [path for path in _NOT_MOUNTABLE if path == target or path.startswith(target.rstrip("/") + "/")]
    if covered or target.startswith(("/proc/", "/sys/", "/dev/")):
        violations.append(Violation(field, f"`{target}` would cover a folder of the system; choose another"))
    return target


def _check_environ(wanted: endpoint_pb2.Endpoint, violations: list[Violation]) -> None:
    environ = wanted.environ
    size = sum(len(key.encode()) + len(value.encode()) for key, value in environ.items())
    if len(environ) > ENVIRON_MAX or size > ENVIRON_BYTES_MAX:
        limit = f"at most {ENVIRON_MAX} variables of {ENVIRON_BYTES_MAX} bytes in all"
        violations.append(Violation("endpoint.environ", limit))
    for key, value in environ.items():
        field = f"endpoint.environ[{key[:60]}]"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            violations.append(Violation(field, "a name has letters, digits and `_` and begins with no digit"))
        elif key == "PORT" or key.startswith("DURE_"):
            violations.append(Violation(field, "is set by Dure itself; choose another name"))
        elif "\0" in value:
            violations.append(Violation(field, "must not contain a NUL character"))


async def _model_folder(
    session: AsyncSession, project: schema.Project, model: str, violations: list[Violation]
) -> schema.Folder | None:
    if not model:
        violations.append(Violation("endpoint.model", "a model folder is required"))
        return None
    name = model if "/" in model else names.folder(project.name, model)
    try:
        _, folder = await scope.folder(session, name, "endpoint.model")
    except errors.NotFound as error:
        if violations:
            violations.append(Violation("endpoint.model", error.message))
            return None
        raise
    except InvalidInput as error:
        violations.extend(error.violations)
        return None
    if folder.project_uid != project.uid:
        violations.append(Violation("endpoint.model", "the folder belongs to another project"))
    elif folder.usage != "MODEL":
        found = f"folder `{folder.name}` has usage {folder.usage.lower()}; a model folder is needed"
        violations.append(Violation("endpoint.model", found))
    else:
        return folder
    return None


async def _definition_text(folders: Folders, folder: schema.Folder, asked: str) -> tuple[str, str]:
    """Path and text of the definition file: the one asked for, else the default names in order."""
    if asked:
        check_path(asked)
    for path in [asked] if asked else list(definition.DEFAULT_NAMES):
        text = await folders.read_text(folder.uid, path, definition.DEFINITION_BYTES_MAX)
        if text is not None:
            return path, text
    wanted = f"`{asked}`" if asked else " or ".join(f"`{name}`" for name in definition.DEFAULT_NAMES)
    raise InvalidInput.of(
        [
            Violation(
                asked or definition.DEFAULT_NAMES[0],
                f"folder `{folder.name}` has no {wanted}; upload it: dure folder upload {folder.name} FILE",
            )
        ]
    )
