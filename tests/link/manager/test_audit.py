"""The audit trail's own bounds: merging, refusals, room, and a store that fails for a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from dure.manager import audit, schema
from dure.manager.audit import Entry, Trail
from dure.manager.store import Store, Tx
from dure.v1.endpoint_pb2 import Endpoint


class FlakyStore(Store):
    """Fails as often as it is told to."""

    failures = 0

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[Tx]:
        if self.failures:
            self.failures -= 1
            raise OperationalError("INSERT", {}, Exception("disk is full"))
        async with super().write() as tx:
            yield tx


def entry(method: str = "UpdateEndpoint", outcome: str = "OK", key: str = "k", detail: str = "") -> Entry:
    merges = method == "UploadFile"
    return Entry("alice", key, "a", method, "projects/a/folders/f", detail, outcome, "ipv4:1", merges)


def with_trail(tmp_path: Path, body: Callable[[FlakyStore, Trail], Awaitable[None]]) -> None:
    async def run() -> None:
        store = FlakyStore(tmp_path / "dure.db")
        await store.open()
        try:
            async with asyncio.timeout(20):
                await body(store, Trail(store))
        finally:
            await store.close()

    asyncio.run(run())


async def stored(store: Store) -> list[schema.AuditRecord]:
    async with store.read() as session:
        return list(await session.scalars(select(schema.AuditRecord).order_by(schema.AuditRecord.uid)))


def test_files_of_one_upload_are_one_record(tmp_path: Path) -> None:
    async def body(store: FlakyStore, trail: Trail) -> None:
        for number in range(100):
            trail.record(entry("UploadFile", detail=f"file-{number}"))
        trail.record(entry(detail="x -> y"))
        trail.record(entry("UploadFile", detail="other", key="k2"))
        await trail.flush()
        assert [row.detail for row in await stored(store)] == ["file-0 and 99 more", "x -> y", "other"]

    with_trail(tmp_path, body)


def test_who_is_refused_does_not_wash_out_the_others(tmp_path: Path) -> None:
    async def body(store: FlakyStore, trail: Trail) -> None:
        for _ in range(1_000):
            trail.record(entry(outcome="PERMISSION_DENIED", key="bad"))
        for key in ("good", "bad"):
            trail.record(entry(key=key))
        trail.record(entry(outcome="PERMISSION_DENIED", key="good"))
        await trail.flush()
        rows = await stored(store)
        assert sum(row.key_uid == "bad" for row in rows) == audit.REFUSED_PER_KEY_MAX + 1
        assert [row.outcome for row in rows if row.key_uid == "good"] == ["OK", "PERMISSION_DENIED"]

    with_trail(tmp_path, body)


def test_a_store_that_fails_loses_nothing_that_there_is_room_for(tmp_path: Path) -> None:
    async def body(store: FlakyStore, trail: Trail) -> None:
        store.failures = 2
        task = asyncio.create_task(trail.run())
        trail.record(entry(detail="first"))
        while store.failures == 2:
            await asyncio.sleep(0.01)
        trail.record(entry(detail="second"))
        while len(await stored(store)) < 2:
            await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert sorted(row.detail for row in await stored(store)) == ["first", "second"]
        for _ in range(audit.PENDING_MAX + 10):
            trail.record(entry())
        await trail.flush()
        assert len(await stored(store)) == audit.PENDING_MAX + 2

    with_trail(tmp_path, body)


def test_long_texts_are_cut(tmp_path: Path) -> None:
    async def body(store: FlakyStore, trail: Trail) -> None:
        long = "x" * 5_000
        trail.record(Entry(long, long, long, long, long, long, "OK", long))
        await trail.flush()
        (row,) = await stored(store)
        assert (len(row.detail), len(row.resource)) == (audit.DETAIL_MAX, audit.RESOURCE_MAX)
        assert (len(row.actor), len(row.project), len(row.peer)) == (80, 64, 64)

    with_trail(tmp_path, body)


def test_values_of_variables_are_hidden_but_changes_show() -> None:
    before = Endpoint(environ={"SAME": "secret-1", "OTHER": "secret-2", "GONE": "secret-3"})
    after = Endpoint(environ={"SAME": "secret-1", "OTHER": "secret-4", "NEW": "secret-5"})
    hidden = audit.without_values(before, after)
    assert "secret" not in str(hidden)
    assert hidden[0].environ["SAME"] == hidden[1].environ["SAME"]
    assert hidden[0].environ["OTHER"] != hidden[1].environ["OTHER"]
    assert set(hidden[0].environ) == {"SAME", "OTHER", "GONE"}
    assert set(hidden[1].environ) == {"SAME", "OTHER", "NEW"}
    assert "secret-1" in str(before)
