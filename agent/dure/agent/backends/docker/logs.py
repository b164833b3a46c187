"""Copies what a container writes into the log of its kernel, where all else reads it.

The engine tells the time of each line. What the log has already is found by its newest times, so that a copy
which is begun again, after an agent or an engine was away, repeats nothing and leaves nothing out.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from dure.agent.backends.docker import streams
from dure.agent.backends.docker.engine import Engine, EngineError, NotThere
from dure.agent.backends.docker.labels import unix_s
from dure.agent.log_files import LogCursor
from dure.agent.shim.log import LineLog, now_ms
from dure.wire.backoff import backoff_s
from dure.wire.seen import LinesSeen

# Lines at the end of a log that are looked through for what was copied: as many as may have one time.
BACK_LINES = 2_000
# Frames after which others have their turn, while a container floods.
TURN_FRAMES = 64
_log = logging.getLogger(__name__)


class LogCopy:
    """The log of one kernel. `write` is for what the agent itself has to say in it."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._time_ms = 0
        self._lines = LineLog(str(folder), clock_ms=lambda: self._time_ms or now_ms())
        self._seen = LinesSeen()
        self._newest_ms = 0
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

    def _look_back(self) -> None:
        self._newest_ms = 0
        self._seen = LinesSeen()
        cursor = LogCursor(lambda: self._folder)
        try:
            cursor.begin(tail_lines=BACK_LINES, follow=False)
            while lines := cursor.read():
                for time_ms, _ in lines:
                    if time_ms:
                        self._seen.is_new(time_ms)
                        self._newest_ms = max(self._newest_ms, time_ms)
        finally:
            cursor.close()

    async def _copy(self, container: str, *, follow: bool) -> None:
        """To the end of what is there, or of the container."""
        await asyncio.to_thread(self._look_back)
        self._seen.begin_again()
        # A millisecond early, for what rounding did; zero would be refused.
        since_ms = self._newest_ms - 1
        since = f"{since_ms // 1000}.{since_ms % 1000:03d}000000" if self._newest_ms else ""
        rest = {1: b"", 2: b""}
        count = 0
        async with streams.log(self._engine.socket, container, since, follow=follow) as frames:
            async for stream, data in frames:
                self._take(rest, stream, data)
                count += 1
                if count % TURN_FRAMES == 0:
                    await asyncio.sleep(0)

    def _take(self, rest: dict[int, bytes], stream: int, data: bytes) -> None:
        """A frame: the time, a space, and a line or a piece of a long one. Some engines cut frames
        elsewhere."""
        text = rest.get(stream, b"") + data
        *whole, rest[stream] = text.split(b"\n") if text.endswith(b"\n") else [text, b""]
        for index, line in enumerate(whole):
            stamp, space, words = line.partition(b" ")
            try:
                time_ms = int(unix_s(stamp.decode("ascii")) * 1000) if space else 0
            except ValueError:
                time_ms, words = self._time_ms, line
            self._time_ms = max(self._time_ms, time_ms)
            if self._seen.is_new(self._time_ms):
                ends = index < len(whole) - 1 or text.endswith(b"\n")
                self._lines.write(words + (b"\n" if ends else b""))
