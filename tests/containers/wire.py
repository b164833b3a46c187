"""Stands between an agent and its engine: lets everything through, hangs, breaks off, or is not there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from containers import engines

PIECE_BYTES = 256 * 1024


class Wire:
    """Lives on one event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._flows = asyncio.Event()
        self._flows.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._path}"

    async def open(self) -> None:
        """There is an engine again."""
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def close(self) -> None:
        """There is none: connections break, and new ones are refused."""
        assert self._server is not None
        self._server.close()
        self._path.unlink(missing_ok=True)
        await self.cut()

    async def cut(self) -> None:
        """Breaks all connections."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def hang(self) -> None:
        """From now on nothing comes through, in no direction, and nothing is refused."""
        self._flows.clear()

    def go_on(self) -> None:
        self._flows.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._flows.wait()
            there_reader, there_writer = await asyncio.open_unix_connection(engines.path())
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, there_writer))
                    await self._pump(there_reader, writer)
                    raise asyncio.CancelledError
            finally:
                there_writer.close()
        except (OSError, asyncio.CancelledError, ExceptionGroup):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(PIECE_BYTES):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()


@contextlib.asynccontextmanager
async def between(path: Path) -> AsyncIterator[Wire]:
    wire = Wire(path)
    await wire.open()
    try:
        yield wire
    finally:
        wire.go_on()
        await wire.close()
