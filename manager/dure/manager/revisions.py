"""What a new revision is made of: the request checked as a whole, the files read, the result kept.

A revision holds what was asked for, what that came to, the definition's text, and a template of the kernels
that run it. Slots and environment merge key by key: request over preset over service definition over
runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.definitions.environ import too_large
from dure.definitions.service import RuntimeSection
from dure.fleet.v1 import fleet_pb2
from dure.manager import asked as fields
from dure.manager import changes, runtimes, schema
from dure.manager.asked import check_replica_count as check_replica_count
from dure.manager.catalogs import Catalogs, Image
from dure.manager.definitions import read_files
from dure.manager.folders import Folders
from dure.manager.mounts import extra_mounts, model_folder
from dure.v1 import catalog_pb2, endpoint_pb2
from dure.wire import errors, names, quantities
from dure.wire.errors import InvalidInput, Violation
from dure.wire.quantities import CPU, DEVICES, MEM, SHARES

# Every session needs some of both; what nobody says.
SLOT_DEFAULTS = {CPU: 1_000, MEM: (1 << 30) * 1_000}
# What of a revision's spec shapes its replicas; `resolved` follows from these and the kernel.
_SHAPES = (
    "asked", "folder", "resource_group", "slots", "cluster_mode", "cluster_size", "architecture",
    "needs_image",
)  # fmt: skip
_PULL_POLICIES = {
    endpoint_pb2.IMAGE_PULL_POLICY_ALWAYS: fleet_pb2.IMAGE_PULL_POLICY_ALWAYS,
    endpoint_pb2.IMAGE_PULL_POLICY_NEVER: fleet_pb2.IMAGE_PULL_POLICY_NEVER,
}


@dataclass(frozen=True)
class Draft:
    """A revision that is right, not yet stored. `asked` is canonical and whole: fields 10 to 49."""

    asked: endpoint_pb2.Endpoint
    folder_uids: tuple[str, ...]
    spec: dict[str, Any]
    definition: str
    kernel: bytes

    @property
    def folder_uid(self) -> str:
        """The model folder's."""
        return self.folder_uids[0]

    @property
    def priority(self) -> int:
        return self.asked.priority

    @property
    def rollout_policy(self) -> dict[str, Any]:
        return policy_dict(self.asked)

    def row(
        self, endpoint_uid: str, number: int, created_ms: int, *, author: str = "", change: str = ""
    ) -> schema.Revision:
        return schema.Revision(
            endpoint_uid=endpoint_uid,
            number=number,
            created_ms=created_ms,
            folder_uid=self.folder_uid,
            spec=self.spec,
            definition=self.definition,
            kernel=self.kernel,
            author=author,
            change=change,
        )

    def rows(
        self, endpoint_uid: str, number: int, created_ms: int, *, author: str = "", change: str = ""
    ) -> list[schema.Base]:
        """The revision with the folders that it mounts."""
        mounted = [
            schema.RevisionFolder(endpoint_uid=endpoint_uid, number=number, folder_uid=uid)
            for uid in self.folder_uids
        ]
        return [self.row(endpoint_uid, number, created_ms, author=author, change=change), *mounted]

    def differs(self, current: schema.Revision) -> bool:
        """Whether its replicas are others than those of a revision that is there."""
        return self.kernel != current.kernel or any(
            self.spec[key] != current.spec.get(key) for key in _SHAPES
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
    wrong = names.check_id(endpoint_id, names.ENDPOINT_ID, "endpoint_id")
    violations += [wrong] if wrong is not None else []
    asked = _checked(wanted, violations)
    catalogs = Catalogs(session, project, violations)
    runtime = await catalogs.runtime(asked.runtime)
    await catalogs.resource_group(asked.resource_group)
    preset = await catalogs.preset(asked.preset, asked.resource_group)
    folder = await model_folder(session, project, wanted.model, violations)
    mounts = await extra_mounts(session, folders, project, wanted, asked, violations)
    files = None
    if folder is not None and runtime is not None:
        known = await catalogs.runtime_names()
        files = await read_files(folders, folder, asked, runtime, known, violations)
    if folder is None or runtime is None or files is None:
        raise InvalidInput.of(violations)
    section = files.section
    image = await catalogs.image(asked, section)
    slots = _merged_slots(runtime, section, preset, asked)
    environ = {**runtime.environ, **section.environ, **asked.environ}
    if wrong_size := too_large(environ.items()):
        violations.append(Violation("endpoint.environ", f"with the runtime's and the folder's: {wrong_size}"))
    kernel = runtimes.launch(
        runtime,
        files.definition.kernel if files.definition is not None else None,
        asked.service,
        environ,
        slots,
        asked.model_mount_destination,
        files.ggufs,
        violations,
    )
    needs_image = not runtimes.has_command(kernel.command)
    _check_image(image, slots, asked.runtime, needs_image, violations)
    fields.check_enforcement(asked.require_enforcement, slots, violations)
    shared_memory = quantities.parse_slot(MEM, asked.shared_memory) // 1000 if asked.shared_memory else 0
    shared_memory = shared_memory or (preset.shared_memory if preset is not None else 0)
    if shared_memory * 1000 > slots[MEM]:
        more = f"{quantities.human_bytes(shared_memory)} is more than the memory of a replica, "
        more += quantities.human_slot(MEM, slots[MEM])
        violations.append(Violation("endpoint.shared_memory", more))
    if violations:
        raise InvalidInput.of(violations)
    kernel.endpoint, kernel.project, kernel.runtime = endpoint_id, project.name, asked.runtime
    kernel.model_name = kernel.model_name or folder.name
    kernel.model.CopyFrom(
        fleet_pb2.Mount(folder_uid=folder.uid, folder=folder.name, target=asked.model_mount_destination)
    )
    kernel.extra_mounts.extend(mounts)
    kernel.shared_memory_bytes = shared_memory
    kernel.image = image.reference
    kernel.require_enforcement = asked.require_enforcement
    # Defaults are left out: a revision from before there were such settings is still the same.
    if asked.image_pull_policy != endpoint_pb2.IMAGE_PULL_POLICY_IF_NOT_PRESENT:
        kernel.image_pull_policy = _PULL_POLICIES[asked.image_pull_policy]
    if asked.security_profile != endpoint_pb2.SECURITY_PROFILE_DEFAULT:
        kernel.security_profile = fleet_pb2.SECURITY_PROFILE_STRICT
    for name, value in environ.items():
        kernel.environ[name] = value
    resolved = _resolved(kernel, slots, environ, image, files.path)
    spec = {
        "asked": json_format.MessageToDict(_shaping(asked), preserving_proto_field_name=True),
        "resolved": json_format.MessageToDict(resolved, preserving_proto_field_name=True),
        "folder": folder.name,
        "resource_group": asked.resource_group,
        "slots": slots,
        "cluster_mode": endpoint_pb2.ClusterMode.Name(asked.cluster_mode).removeprefix("CLUSTER_MODE_"),
        "cluster_size": asked.cluster_size,
        "architecture": image.architecture,
        "needs_image": needs_image,
    }
    uids = tuple(dict.fromkeys([folder.uid, *(mount.folder_uid for mount in mounts)]))
    return Draft(asked, uids, spec, files.text, kernel.SerializeToString(deterministic=True))


async def redraft(
    session: AsyncSession,
    folders: Folders,
    project: schema.Project,
    row: schema.Endpoint,
    current: schema.Revision,
) -> Draft:
    """The same request with everything that it refers to as it is now: files, preset, image, runtime."""
    return await draft(session, folders, project, asked(row, current), row.name)


def policy_dict(endpoint: endpoint_pb2.Endpoint) -> dict[str, Any]:
    """The rollout policy as it is stored with an endpoint."""
    return json_format.MessageToDict(endpoint.rollout_policy, preserving_proto_field_name=True)


def asked(row: schema.Endpoint, revision: schema.Revision) -> endpoint_pb2.Endpoint:
    """What the user asked for so far: fields 10 to 49, the model by its bare name."""
    wanted = json_format.ParseDict(revision.spec["asked"], endpoint_pb2.Endpoint())
    wanted.replica_count, wanted.open_to_public = row.replica_count, row.open_to_public
    wanted.priority, wanted.metrics_path = row.priority, row.metrics_path
    wanted.scale_to_zero_after.FromMilliseconds(row.scale_to_zero_ms)
    json_format.ParseDict(row.rollout_policy, wanted.rollout_policy)
    return changes.canonical(wanted)


def checked(wanted: endpoint_pb2.Endpoint) -> endpoint_pb2.Endpoint:
    """What the request alone says, canonical, for changes that no replica is shaped by: reads no files.

    Raises InvalidInput with all that is wrong.
    """
    violations: list[Violation] = []
    asked = _checked(wanted, violations)
    if violations:
        raise InvalidInput.of(violations)
    return asked


async def check_folders(session: AsyncSession, draft: Draft) -> None:
    """For the writing transaction: files are read before it. Raises NotFound if a folder went meanwhile."""
    query = select(schema.Folder.uid).where(schema.Folder.uid.in_(draft.folder_uids))
    if len(set(await session.scalars(query))) != len(draft.folder_uids):
        raise errors.NotFound("a folder of the endpoint was deleted just now", reason="FOLDER_NOT_FOUND")


def _checked(wanted: endpoint_pb2.Endpoint, violations: list[Violation]) -> endpoint_pb2.Endpoint:
    """What the request alone says, canonical: defaults filled in, amounts exact."""
    wrong = check_replica_count(wanted.replica_count)
    violations += [wrong] if wrong is not None else []
    asked = changes.canonical(wanted)
    asked.cluster_mode, asked.cluster_size = fields.cluster(wanted, violations)
    asked.priority = fields.priority(wanted, violations)
    fields.scale_to_zero_ms(wanted, violations)
    asked.metrics_path = fields.metrics_path(wanted, violations)
    fields.image(wanted, violations)
    fields.containers(wanted, violations)
    asked.require_enforcement = fields.require_enforcement(wanted, violations)
    violations += runtimes.check_override(wanted.service)
    fields.check_environ(wanted.environ, violations)
    wrong = names.check_id(asked.resource_group, names.MEMBER_ID, "endpoint.resource_group")
    violations += [wrong] if wrong is not None else []
    slots = fields.slots(wanted.resource_slots, violations)
    asked.resource_slots.clear()
    asked.resource_slots.update({slot: quantities.format_slot(slot, slots[slot]) for slot in slots})
    size_bytes = fields.shared_memory(wanted.shared_memory, violations)
    asked.shared_memory = str(size_bytes) if size_bytes else ""
    at = "endpoint.model_mount_destination"
    asked.model_mount_destination = fields.mount_target(asked.model_mount_destination, at, violations)
    asked.rollout_policy.CopyFrom(fields.rollout_policy(wanted.rollout_policy, violations))
    changes.normalise_durations(asked)
    return asked


def _merged_slots(
    runtime: catalog_pb2.Runtime,
    section: RuntimeSection,
    preset: schema.Preset | None,
    asked: endpoint_pb2.Endpoint,
) -> dict[str, int]:
    """Slots of each kernel. Who asks for one kind of GPU slot drops the other kind of those below."""
    slots = dict(SLOT_DEFAULTS)
    layers: list[Mapping[str, int]] = [
        quantities.parse_slots(runtime.resource_slots, "runtime.resource_slots"),
        section.slots,
        preset.slots if preset is not None else {},
        quantities.parse_slots(asked.resource_slots, "endpoint.resource_slots"),
    ]
    for layer in layers:
        for slot, other in ((SHARES, DEVICES), (DEVICES, SHARES)):
            if slot in layer:
                slots.pop(other, None)
        slots.update(layer)
    return slots


def _check_image(
    image: Image,
    slots: Mapping[str, int],
    runtime: str,
    needs_image: bool,
    violations: list[Violation],
) -> None:
    if needs_image and not image.reference:
        what = f"is required: the runtime `{runtime}` runs its image's own command"
        violations.append(Violation("endpoint.image", what))
    if image.runtimes and runtime not in image.runtimes:
        made_for = ", ".join(f"`{name}`" for name in image.runtimes)
        what = f"image `{image.name}` is made for {made_for}, not for the runtime `{runtime}`"
        violations.append(Violation("endpoint.image", what))
    for slot, least in image.min_slots.items():
        if slots.get(slot, 0) < least:
            got = quantities.human_slot(slot, slots[slot]) if slot in slots else "nothing"
            what = f"image `{image.name}` needs {quantities.human_slot(slot, least)} or more, found {got}"
            violations.append(Violation(f"endpoint.resource_slots[{slot}]", what))


def _resolved(
    kernel: fleet_pb2.KernelSpec,
    slots: Mapping[str, int],
    environ: Mapping[str, str],
    image: Image,
    definition_path: str,
) -> endpoint_pb2.Resolved:
    return endpoint_pb2.Resolved(
        resource_slots={slot: quantities.format_slot(slot, amount) for slot, amount in slots.items()},
        environ=environ,
        image=image.reference,
        architecture=image.architecture,
        start_command=runtimes.shown_command(kernel.command),
        port=kernel.port,
        health_check_path=kernel.health_check.path,
        model_definition_path=definition_path,
    )


def _shaping(asked: endpoint_pb2.Endpoint) -> endpoint_pb2.Endpoint:
    shaping = endpoint_pb2.Endpoint()
    shaping.CopyFrom(asked)
    for name in changes.UNSHAPED:
        shaping.ClearField(name)  # type: ignore[arg-type]
    if shaping.image_pull_policy == endpoint_pb2.IMAGE_PULL_POLICY_IF_NOT_PRESENT:
        shaping.ClearField("image_pull_policy")
    if shaping.security_profile == endpoint_pb2.SECURITY_PROFILE_DEFAULT:
        shaping.ClearField("security_profile")
    return shaping
