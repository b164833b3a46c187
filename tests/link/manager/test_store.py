"""The store: no lost update, no half transaction, a log that watches can trust, and bounds."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from sqlalchemy import func, select

from dure.manager import retention, schema
from dure.manager import store as module
from dure.manager.store import Key, Store, new_uid, now_ms


def with_store(tmp_path: Path, body) -> None:
    async def run() -> None:
        store = Store(tmp_path / "dure.db")
        await store.open()
        try:
            async with asyncio.timeout(30):
                await body(store)
        finally:
            await store.close()

    asyncio.run(run())


def test_two_hundred_writers_lose_nothing(tmp_path: Path) -> None:
    async def body(store: Store) -> None:
        async with store.write() as tx:
            await store.set_meta(tx.session, "n", "0")

        async def add_one() -> None:
            async with store.write() as tx:
                value = int(await store.meta(tx.session, "n") or 0)
                await asyncio.sleep(0)
                await store.set_meta(tx.session, "n", str(value + 1))

        await asyncio.gather(*(add_one() for _ in range(200)))
        async with store.read() as session:
            assert await store.meta(session, "n") == "200"

    with_store(tmp_path, body)


def test_a_failed_transaction_leaves_and_tells_nothing(tmp_path: Path) -> None:
    async def body(store: Store) -> None:
        told: list[tuple[int, list[Key]]] = []
        store.listen(lambda revision, keys: told.append((revision, keys)))
        with pytest.raises(RuntimeError, match="stop"):
            async with store.write() as tx:
                await store.set_meta(tx.session, "x", "1")
                tx.touch("endpoint", "e")
                await tx.session.flush()
                raise RuntimeError("stop")
        async with store.read() as session:
            assert await store.meta(session, "x") is None
        assert told == []
        async with store.write() as tx:
            tx.touch("endpoint", "e")
            tx.touch("endpoint", "e")
            tx.touch("agent", "a")
        assert told == [(2, [("endpoint", "e"), ("agent", "a")])]
        assert await store.changes_after(0, "endpoint") == ["e"]
        assert await store.changes_after(2, "endpoint") == []

    with_store(tmp_path, body)


def test_the_log_is_compacted_and_says_so(tmp_path: Path) -> None:
    async def body(store: Store) -> None:

        for number in range(5):
            async with store.write() as tx:
                for each in range(module.CHANGES_KEPT // 4):
                    tx.touch("endpoint", f"{number}-{each}")
        await store.compact()
        assert await store.changes_after(0, "endpoint") is None
        floor = await store.compacted()
        assert floor == store.revision - module.CHANGES_KEPT
        assert len(await store.changes_after(floor, "endpoint") or []) == module.CHANGES_KEPT

    with_store(tmp_path, body)


def test_events_do_not_pile_up(tmp_path: Path) -> None:
    async def body(store: Store) -> None:
        async with store.write() as tx:
            for number in range(retention.EVENTS_PER_ENDPOINT_MAX + 50):
                tx.event("busy", "X", f"{number}")
            tx.event("quiet", "X", "stays")
            claims = {"label": "", "key_id": "k", "issued_s": 1, "expires_s": 2, "revoked_ms": None}
            tx.session.add(schema.Token(uid=new_uid(), endpoint_uid="e", **claims))
        await retention.prune(store)
        async with store.read() as session:
            count = select(func.count()).select_from(schema.Event)
            busy = await session.scalar(count.where(schema.Event.endpoint_uid == "busy"))
            assert busy == retention.EVENTS_PER_ENDPOINT_MAX
            assert await session.scalar(count.where(schema.Event.endpoint_uid == "quiet")) == 1
            assert await session.scalar(select(func.count()).select_from(schema.Token)) == 0

    with_store(tmp_path, body)


def test_a_caller_that_leaves_within_a_transaction_locks_nobody_out(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(tmp_path / "dure.db")
        await store.open()

        async def write(name: str) -> None:
            async with store.write() as tx:
                for number in range(5):
                    row = schema.Project(uid=new_uid(), name=f"{name}-{number}", created_ms=now_ms())
                    tx.session.add(row)
                    await tx.session.flush()
                    await tx.session.scalars(select(schema.Project.uid).limit(100))

        for number in range(100):
            leaving = asyncio.create_task(write(f"leaving-{number}"))
            # Somewhere within: another statement each time.
            for _ in range(number):
                await asyncio.sleep(0)
            await asyncio.sleep(number / 10_000)
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leaving
            async with asyncio.timeout(5):
                await write(f"staying-{number}")
        async with store.read() as session:
            names = list(await session.scalars(select(schema.Project.name)))
        assert sum(name.startswith("staying") for name in names) == 500
        whole = [name for name in names if name.startswith("leaving")]
        assert len(whole) % 5 == 0, "a transaction is whole, or not there"
        assert len(whole) < 500, "some of them were cancelled in time"
        await store.close()

    asyncio.run(run())


def test_a_time_limit_holds_though_a_statement_is_waited_for(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(tmp_path / "dure.db")
        await store.open()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), store.write() as tx:
                while True:
                    await tx.session.scalar(select(schema.Project.uid))
        async with asyncio.timeout(5), store.write() as tx:
            tx.session.add(schema.Project(uid=new_uid(), name="after", created_ms=now_ms()))
        await store.close()

    asyncio.run(run())
