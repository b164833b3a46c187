"""The store: transactions that write the revision log, and those who are told of it.

SQLite has one writer: writing transactions are serialised here, on one connection, by BEGIN IMMEDIATE;
readers have connections of their own and see a snapshot. (With the driver's default transactions, two
writers lose each other's updates in silence, and a deferred read-then-write fails with BUSY_SNAPSHOT.)
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, delete, event, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from dure.manager import driver, schema
from dure.wire import names
from dure.wire.prometheus import Histogram

# `progress` of an endpoint is told and not kept: see Store.tell.
Kind = Literal["endpoint", "agent", "proxy", "folder", "progress"]
Key = tuple[Kind, str]
# Revisions kept for watches that resume; a tail that fell behind further starts over.
CHANGES_KEPT = 20_000
READERS = 4
WRITE_WAIT_S = 30.0


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def new_uid() -> str:
    return names.new_uid(now_ms(), secrets.randbits(74))


class Tx:
    """A writing transaction. `touch` names what it changes; nothing is told if nothing was touched."""

    def __init__(self, session: AsyncSession) -> None:
        self.session = session
        self.touched: dict[Key, None] = {}

    def touch(self, kind: Kind, uid: str) -> None:
        self.touched[kind, uid] = None

    def event(
        self, endpoint_uid: str, reason: str, message: str, *, replica: str = "", warning: bool = False
    ) -> None:
        """Writes an event: a stable word, and a sentence for people."""
        self.session.add(
            schema.Event(
                uid=new_uid(),
                endpoint_uid=endpoint_uid,
                replica_uid=replica,
                time_ms=now_ms(),
                reason=reason,
                message=message[:4000],
                warning=warning,
            )
        )


Listener = Callable[[int, list[Key]], None]


class Store:
    """Opens the database of a data folder, migrating it first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _migrate(path)
        self._writer = _engine(path, "BEGIN IMMEDIATE", size=1)
        self._readers = _engine(path, "BEGIN", size=READERS)
        self._write_lock = asyncio.Lock()
        self._listeners: list[Listener] = []
        self.revision = 0
        # For /metrics: how long writers waited for their turn, and how long their turns took.
        self.waits, self.turns = Histogram(), Histogram()

    async def open(self) -> None:
        """Reads where the revision log stands. Call before anything else."""
        async with self.read() as session:
            newest = await session.scalar(select(func.max(schema.Change.revision)))
            self.revision = max(newest or 0, await self.compacted())

    async def close(self) -> None:
        await self._writer.dispose()
        await self._readers.dispose()

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener(revision, keys)` after each commit, on the loop. Returns how to end it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def tell(self, keys: list[Key]) -> None:
        """Tells listeners of what is not in the store, and so in no revision."""
        for listener in list(self._listeners):
            listener(self.revision, keys)

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A consistent snapshot."""
        async with AsyncSession(self._readers, expire_on_commit=False) as session:
            yield session

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[Tx]:
        """One transaction; commits on leaving, unless an exception passes."""
        asked_s = time.monotonic()
        async with asyncio.timeout(WRITE_WAIT_S):
            await self._write_lock.acquire()
        began_s = time.monotonic()
        self.waits.observe(began_s - asked_s)
        try:
            async with AsyncSession(self._writer, expire_on_commit=False) as session:
                tx = Tx(session)
                yield tx
                changes = [schema.Change(kind=kind, uid=uid) for kind, uid in tx.touched]
                session.add_all(changes)
                await session.flush()
                revision = max((change.revision for change in changes), default=self.revision)
                await session.commit()
            if tx.touched:
                self.revision = revision
                self.tell(list(tx.touched))
        finally:
            self._write_lock.release()
            self.turns.observe(time.monotonic() - began_s)

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Nobody is within a writing transaction as long as it is held."""
        async with asyncio.timeout(WRITE_WAIT_S):
            await self._write_lock.acquire()
        try:
            yield
        finally:
            self._write_lock.release()

    async def compacted(self) -> int:
        """Revisions up to this one are no longer in the log."""
        async with self.read() as session:
            return int(await self.meta(session, "compacted") or 0)

    async def changes_after(self, revision: int, kind: Kind) -> list[str] | None:
        """Uids of `kind` that changed after a revision; None if the log does not reach back so far."""
        async with self.read() as session:
            if revision < int(await self.meta(session, "compacted") or 0):
                return None
            rows = await session.scalars(
                select(schema.Change.uid)
                .where(schema.Change.revision > revision, schema.Change.kind == kind)
                .distinct()
            )
            return list(rows)

    async def compact(self) -> None:
        """Drops the old end of the log."""
        floor = self.revision - CHANGES_KEPT
        if floor <= 0:
            return
        async with self.write() as tx:
            await tx.session.execute(delete(schema.Change).where(schema.Change.revision <= floor))
            await self.set_meta(tx.session, "compacted", str(floor))

    async def meta(self, session: AsyncSession, key: str) -> str | None:
        row = await session.get(schema.Meta, key)
        return row.value if row is not None else None

    async def set_meta(self, session: AsyncSession, key: str, value: str) -> None:
        await session.merge(schema.Meta(key=key, value=value))


async def rows_by_uid(session: AsyncSession, table: Any, uids: Iterable[str]) -> dict[str, Any]:
    """Rows of a table by uid, in bounded statements."""
    wanted = list(uids)
    found: dict[str, Any] = {}
    for start in range(0, len(wanted), 500):
        rows = await session.scalars(select(table).where(table.uid.in_(wanted[start : start + 500])))
        found.update({row.uid: row for row in rows})
    return found


def _engine(path: Path, begin: str, size: int) -> AsyncEngine:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{path}",
        async_creator=partial(driver.connect, path),
        pool_size=size,
        max_overflow=0,
        pool_timeout=WRITE_WAIT_S,
    )
    _prepare(engine.sync_engine, begin)
    return engine


def _prepare(engine: Engine, begin: str) -> None:
    """Takes the transactions out of the driver's hands; DDL then is part of them, too."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=10000"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)


def _migrate(path: Path) -> None:
    """Brings the database up to this version, before anything else uses it."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    engine = create_engine(f"sqlite:///{path}")
    _prepare(engine, "BEGIN IMMEDIATE")
    try:
        with engine.connect() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()
    finally:
        engine.dispose()
    path.chmod(0o600)
