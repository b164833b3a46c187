"""The SQLite driver with one change: a statement that has begun is waited for, cancelled or not.

A caller that is cancelled within a statement (its client hung up) would leave the connection behind in the
middle of a transaction, and with it SQLite's one lock: nobody could write any more until the manager was
started again. So a cancellation waits for the end of its statement, which takes milliseconds, and at most
`busy_timeout`; and a connection that is closed gives the lock back first.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import aiosqlite


class _Connection(aiosqlite.Connection):
    async def _execute(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        statement = asyncio.ensure_future(super()._execute(fn, *args, **kwargs))  # type: ignore[no-untyped-call]
        cancelled: asyncio.CancelledError | None = None
        while not statement.done():
            try:
                await asyncio.wait([statement])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            statement.exception()
            raise cancelled
        return statement.result()

    async def close(self) -> None:
        """Gives the lock back first: a connection with an unfinished result keeps it though it is closed."""
        with contextlib.suppress(sqlite3.Error, ValueError):
            await self.rollback()
        await super().close()


async def connect(path: Path) -> aiosqlite.Connection:
    """A connection to the database at `path`."""
    connection = _Connection(lambda: sqlite3.connect(path), iter_chunk_size=64)
    # A thread that hangs must not keep the manager from ending.
    connection._thread.daemon = True
    return await connection
