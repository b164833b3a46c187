"""PresetService."""

from __future__ import annotations

from typing import Any

import grpc.aio
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import auth, checks, messages, schema, scope
from dure.manager.store import Store, now_ms
from dure.v1 import catalog_pb2, catalog_pb2_grpc
from dure.wire import errors, names
from dure.wire.errors import Violation
from dure.wire.quantities import MEM, MILLI, format_slot, parse_slot

Context = grpc.aio.ServicerContext[Any, Any]

UPDATABLE = ("resource_slots", "shared_memory", "resource_group", "description")


class PresetApi(catalog_pb2_grpc.PresetServiceServicer):
    """Named sets of slots."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def CreatePreset(
        self, request: catalog_pb2.CreatePresetRequest, context: Context
    ) -> catalog_pb2.CreatePresetResponse:
        wrong = names.check_id(request.preset_id, names.MEMBER_ID, "preset_id")
        violations = [wrong] if wrong is not None else []
        row = schema.Preset(
            name=request.preset_id,
            slots={},
            shared_memory=0,
            resource_group="",
            description="",
            created_ms=now_ms(),
        )
        try:
            async with self._store.write() as tx:
                await _apply(tx.session, row, request.preset, UPDATABLE, violations)
                tx.session.add(row)
        except IntegrityError as error:
            raise errors.AlreadyExists(
                f"there is a preset `{request.preset_id}` already", reason="PRESET_EXISTS"
            ) from error
        return catalog_pb2.CreatePresetResponse(preset=_message(row))

    async def GetPreset(
        self, request: catalog_pb2.GetPresetRequest, context: Context
    ) -> catalog_pb2.GetPresetResponse:
        async with self._store.read() as session:
            row = await _find(session, request.name)
        return catalog_pb2.GetPresetResponse(preset=_message(row))

    async def ListPresets(
        self, request: catalog_pb2.ListPresetsRequest, context: Context
    ) -> catalog_pb2.ListPresetsResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        query = select(schema.Preset).where(schema.Preset.name > after).order_by(schema.Preset.name)
        async with self._store.read() as session:
            rows = list(await session.scalars(query.limit(size + 1)))
        rows, token = scope.page(rows, size, [row.name for row in rows])
        return catalog_pb2.ListPresetsResponse(presets=[_message(row) for row in rows], next_page_token=token)

    async def UpdatePreset(
        self, request: catalog_pb2.UpdatePresetRequest, context: Context
    ) -> catalog_pb2.UpdatePresetResponse:
        paths = list(request.update_mask.paths)
        violations = checks.mask(paths, UPDATABLE)
        async with self._store.write() as tx:
            row = await _find(tx.session, request.preset.name, "preset.name")
            before = _slots(row)
            await _apply(tx.session, row, request.preset, paths, violations)
            if _slots(row) != before:
                auth.note(f"slots {before} -> {_slots(row)}")
        return catalog_pb2.UpdatePresetResponse(preset=_message(row))

    async def DeletePreset(
        self, request: catalog_pb2.DeletePresetRequest, context: Context
    ) -> catalog_pb2.DeletePresetResponse:
        async with self._store.write() as tx:
            await tx.session.delete(await _find(tx.session, request.name))
        return catalog_pb2.DeletePresetResponse()


async def _find(session: AsyncSession, name: str, field: str = "name") -> schema.Preset:
    (preset_id,) = names.parse(name, "presets/{}", field)
    row = await session.get(schema.Preset, preset_id)
    if row is None:
        raise errors.NotFound(
            f"no preset `{preset_id}`; `dure preset list` shows all", reason="PRESET_NOT_FOUND"
        )
    return row


async def _apply(
    session: AsyncSession,
    row: schema.Preset,
    wanted: catalog_pb2.Preset,
    paths: Any,
    violations: list[Violation],
) -> None:
    """Takes over the fields that `paths` names. Raises InvalidInput with these violations and more."""
    slots, shared_memory = row.slots, row.shared_memory
    if "resource_slots" in paths:
        slots = checks.slots(wanted.resource_slots, "preset.resource_slots", violations)
        if not wanted.resource_slots:
            violations.append(
                Violation("preset.resource_slots", "at least one slot is required, such as cpu")
            )
    if "shared_memory" in paths:
        shared_memory = 0
        if wanted.shared_memory:
            try:
                shared_memory = parse_slot(MEM, wanted.shared_memory) // MILLI
            except ValueError as error:
                violations.append(Violation("preset.shared_memory", str(error)))
    if (
        "resource_group" in paths
        and wanted.resource_group
        and await session.get(schema.ResourceGroup, wanted.resource_group) is None
    ):
        found = f"no resource group `{wanted.resource_group[:60]}`; `dure group list` shows all"
        violations.append(Violation("preset.resource_group", found))
    if "description" in paths:
        violations += checks.description(wanted.description, "preset.description")
    if violations:
        raise errors.InvalidInput.of(violations)
    row.slots, row.shared_memory = slots, shared_memory
    if "resource_group" in paths:
        row.resource_group = wanted.resource_group
    if "description" in paths:
        row.description = wanted.description


def _slots(row: schema.Preset) -> str:
    return ", ".join(f"{slot}={format_slot(slot, row.slots[slot])}" for slot in sorted(row.slots))


def _message(row: schema.Preset) -> catalog_pb2.Preset:
    return catalog_pb2.Preset(
        name=names.preset(row.name),
        resource_slots={slot: format_slot(slot, amount) for slot, amount in row.slots.items()},
        shared_memory=str(row.shared_memory) if row.shared_memory else "",
        resource_group=row.resource_group,
        description=row.description,
        create_time=messages.timestamp(row.created_ms),
    )
