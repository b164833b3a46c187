"""ImageService."""

from __future__ import annotations

import re
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
from dure.wire.quantities import format_slot

Context = grpc.aio.ServicerContext[Any, Any]

UPDATABLE = ("reference", "architecture", "runtimes", "min_slots", "description")
ARCHITECTURES = ("x86_64", "aarch64")
RUNTIMES_MAX = 100
# `[host[:port]/]path[:tag][@digest]`, path in lower case.
_REFERENCE = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::\d{1,5})?/)?"
    r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
REFERENCE_MAX = 400


class ImageApi(catalog_pb2_grpc.ImageServiceServicer):
    """Images that endpoints may name."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def CreateImage(
        self, request: catalog_pb2.CreateImageRequest, context: Context
    ) -> catalog_pb2.CreateImageResponse:
        wrong = names.check_id(request.image_id, names.MEMBER_ID, "image_id")
        violations = [wrong] if wrong is not None else []
        row = schema.Image(
            name=request.image_id,
            reference="",
            architecture="",
            runtimes=[],
            min_slots={},
            description="",
            created_ms=now_ms(),
        )
        try:
            async with self._store.write() as tx:
                await _apply(tx.session, row, request.image, UPDATABLE, violations)
                tx.session.add(row)
        except IntegrityError as error:
            raise errors.AlreadyExists(
                f"there is an image `{request.image_id}` already", reason="IMAGE_EXISTS"
            ) from error
        auth.note(f"{row.reference} for {row.architecture}")
        return catalog_pb2.CreateImageResponse(image=_message(row))

    async def GetImage(
        self, request: catalog_pb2.GetImageRequest, context: Context
    ) -> catalog_pb2.GetImageResponse:
        async with self._store.read() as session:
            row = await _find(session, request.name)
        return catalog_pb2.GetImageResponse(image=_message(row))

    async def ListImages(
        self, request: catalog_pb2.ListImagesRequest, context: Context
    ) -> catalog_pb2.ListImagesResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        query = select(schema.Image).where(schema.Image.name > after).order_by(schema.Image.name)
        async with self._store.read() as session:
            rows = list(await session.scalars(query.limit(size + 1)))
        rows, token = scope.page(rows, size, [row.name for row in rows])
        return catalog_pb2.ListImagesResponse(images=[_message(row) for row in rows], next_page_token=token)

    async def UpdateImage(
        self, request: catalog_pb2.UpdateImageRequest, context: Context
    ) -> catalog_pb2.UpdateImageResponse:
        paths = list(request.update_mask.paths)
        violations = checks.mask(paths, UPDATABLE)
        async with self._store.write() as tx:
            row = await _find(tx.session, request.image.name, "image.name")
            before = row.reference
            await _apply(tx.session, row, request.image, paths, violations)
            if row.reference != before:
                auth.note(f"reference {before} -> {row.reference}")
        return catalog_pb2.UpdateImageResponse(image=_message(row))

    async def DeleteImage(
        self, request: catalog_pb2.DeleteImageRequest, context: Context
    ) -> catalog_pb2.DeleteImageResponse:
        async with self._store.write() as tx:
            await tx.session.delete(await _find(tx.session, request.name))
        return catalog_pb2.DeleteImageResponse()


async def _find(session: AsyncSession, name: str, field: str = "name") -> schema.Image:
    (image_id,) = names.parse(name, "images/{}", field)
    row = await session.get(schema.Image, image_id)
    if row is None:
        raise errors.NotFound(f"no image `{image_id}`; `dure image list` shows all", reason="IMAGE_NOT_FOUND")
    return row


async def _apply(
    session: AsyncSession,
    row: schema.Image,
    wanted: catalog_pb2.Image,
    paths: Any,
    violations: list[Violation],
) -> None:
    """Takes over the fields that `paths` names. Raises InvalidInput with these violations and more."""
    reference = wanted.reference if "reference" in paths else row.reference
    architecture = wanted.architecture if "architecture" in paths else row.architecture
    min_slots = row.min_slots
    if "reference" in paths and (len(reference) > REFERENCE_MAX or not _REFERENCE.fullmatch(reference)):
        found = f"`{reference[:80]}` is not one" if reference else "is required"
        violations.append(
            Violation("image.reference", f"{found}; write it such as `example.com/model-server:latest`")
        )
    if "architecture" in paths and architecture not in ARCHITECTURES:
        found = f"found `{architecture[:40]}`" if architecture else "is required"
        violations.append(Violation("image.architecture", f"{found}; expected {' or '.join(ARCHITECTURES)}"))
    if "runtimes" in paths:
        await _check_runtimes(session, list(wanted.runtimes), violations)
    if "min_slots" in paths:
        min_slots = checks.slots(wanted.min_slots, "image.min_slots", violations)
    if "description" in paths:
        violations += checks.description(wanted.description, "image.description")
    if violations:
        raise errors.InvalidInput.of(violations)
    # Endpoints may name an image by its reference: that must say which one.
    same = await session.scalar(
        select(schema.Image.name).where(
            schema.Image.reference == reference,
            schema.Image.architecture == architecture,
            schema.Image.name != row.name,
        )
    )
    if same is not None:
        raise errors.AlreadyExists(
            f"image `{same}` has this reference and architecture already", reason="IMAGE_EXISTS"
        )
    row.reference, row.architecture, row.min_slots = reference, architecture, min_slots
    if "runtimes" in paths:
        row.runtimes = sorted(set(wanted.runtimes))
    if "description" in paths:
        row.description = wanted.description


async def _check_runtimes(session: AsyncSession, asked: list[str], violations: list[Violation]) -> None:
    if len(asked) > RUNTIMES_MAX:
        violations.append(Violation("image.runtimes", f"at most {RUNTIMES_MAX}"))
        return
    known = set(await session.scalars(select(schema.Runtime.name)))
    for index, name in enumerate(asked):
        if name not in known:
            found = f"no runtime `{name[:60]}`; `dure runtime list` shows all"
            violations.append(Violation(f"image.runtimes[{index}]", found))


def _message(row: schema.Image) -> catalog_pb2.Image:
    return catalog_pb2.Image(
        name=names.image(row.name),
        reference=row.reference,
        architecture=row.architecture,
        runtimes=row.runtimes,
        min_slots={slot: format_slot(slot, amount) for slot, amount in row.min_slots.items()},
        description=row.description,
        create_time=messages.timestamp(row.created_ms),
    )
