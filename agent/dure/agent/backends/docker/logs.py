"""Copies what a container writes into the log of its kernel, where all else reads it.

The engine tells the time of each line, and gives those from a time on. What was copied by then is known by
the newest time and the number of lines that had it, so that a copy which is begun again, after an agent or an
engine was away, repeats nothing and leaves nothing out.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from dure.agent.backends.docker import streams
from dure.agent.backends.docker.engine import Engine, EngineError, NotThere
from dure.agent.backends.docker.labels import unix_ns
from dure.agent.log_files import LogCursor
from dure.agent.shim.log import LineLog, now_ms
from dure.wire.backoff import backoff_s

# Lines at the end of a log that are looked through for what was copied: as many as may have one time.
BACK_LINES = 20_000
# Frames after which others have their turn, while a container floods.
TURN_FRAMES = 64
_log = logging.getLogger(__name__)


class Place:
    """How far a log was copied: the newest time, in nanoseconds or, as a log on disk tells it, in
    milliseconds, and how many lines had it."""

    def __init__(self, newest: int = 0, count: int = 0, unit_ns: int = 1) -> None:
        self._newest, self._count, self._unit_ns = newest, count, unit_ns
        self._again = 0

    def since(self) -> str:
        """From when on to read, in Unix seconds; empty for all. What comes then may have been copied
        before."""
        self._again = 0
        nanoseconds = self._newest * self._unit_ns
        return f"{nanoseconds // 10**9}.{nanoseconds % 10**9:09d}" if nanoseconds else ""

    def is_new(self, time_ns: int) -> bool:
        """Of the next line. One that is older than the newest was written later, and is new: of stdout and
        stderr neither waits for the other's time."""
        time = time_ns // self._unit_ns
        if time > self._newest:
            self._newest, self._count, self._again, self._unit_ns = time_ns, 1, 1, 1
            return True
        if time < self._newest:
            return True
        self._again += 1
        if self._again <= self._count:
            return False
        self._count = self._again
        return True


class LogCopy:
    """The log of one kernel. `write` is for what the agent itself has to say in it."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._time_ms = 0
        self._lines = LineLog(str(folder), clock_ms=lambda: self._time_ms or now_ms())
        self._place: Place | None = None
        self._task: asyncio.Task[None] | None = None

    def write(self, data: bytes) -> None:
        """Now."""
        self._time_ms = 0
        self._lines.write(data)

    def follow(self, container: str) -> None:
        """Copies until the container has ended and all is copied, or `close`."""
        if self._task is None:
            self._task = asyncio.create_task(self._follow(container), name=f"log of {container[:12]}")

    async def finished(self, limit_s: float) -> None:
        """Waits until all of an ended container is copied, not longer than `limit_s`."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=limit_s)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _follow(self, container: str) -> None:
        attempt = 0
        while True:
            try:
                await self._copy(container, follow=True)
                inspected = await self._engine.call(lambda client: client.inspect_container(container))
                if not inspected["State"]["Running"]:
                    # Engines end a stream that is followed before its last lines, when a container is quick.
                    await self._copy(container, follow=False)
                    return
                attempt = 0
            except NotThere:
                return
            except (EngineError, OSError) as error:
                attempt += 1
                if attempt == 1:
                    _log.info("the log of container %s breaks off (%s); trying again", container[:12], error)
            await asyncio.sleep(backoff_s(max(1, attempt), first_s=0.2, max_s=5.0, jitter=0.0))

    def _look_back(self) -> Place:
        newest_ms = count = 0
        cursor = LogCursor(lambda: self._folder)
        try:
            cursor.begin(tail_lines=BACK_LINES, follow=False)
            while lines := cursor.read():
                for time_ms, _ in lines:
                    count = count + 1 if time_ms == newest_ms else 1
                    newest_ms = time_ms
        finally:
            cursor.close()
        return Place(newest_ms, count, 10**6)

    async def _copy(self, container: str, *, follow: bool) -> None:
        """To the end of what is there, or of the container."""
        if self._place is None:
            self._place = await asyncio.to_thread(self._look_back)
        since = self._place.since()
        rest = {1: b"", 2: b""}
        count = 0
        async with streams.log(self._engine.socket, container, since, follow=follow) as frames:
            async for stream, data in frames:
                self._take(self._place, rest, stream, data)
                count += 1
                if count % TURN_FRAMES == 0:
                    await asyncio.sleep(0)

    def _take(self, place: Place, rest: dict[int, bytes], stream: int, data: bytes) -> None:
        """A frame: the time, a space, and a line or a piece of a long one. Some engines cut frames
        elsewhere."""
        text = rest.get(stream, b"") + data
        *whole, rest[stream] = text.split(b"\n") if text.endswith(b"\n") else [text, b""]
        for index, line in enumerate(whole):
            stamp, _, words = line.partition(b" ")
            try:
                time_ns = unix_ns(stamp.decode("ascii"))
            except ValueError:
                # No line of the engine's: better twice than lost.
                time_ns, words = self._time_ms * 10**6, line
            if place.is_new(time_ns):
                self._time_ms = time_ns // 10**6
                ends = index < len(whole) - 1 or text.endswith(b"\n")
                self._lines.write(words + (b"\n" if ends else b""))
