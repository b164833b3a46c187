"""Reads the logs of an endpoint's sessions for users: all its kernels at once, merged as lines arrive.

Who follows an endpoint follows it across replicas: those that come are read from their first line on, and
one whose agent is away is read on from where it was when the agent is back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf import timestamp_pb2
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.fleet.v1 import fleet_pb2
from dure.manager import schema, scope
from dure.manager.fleet import Fleet
from dure.manager.log_relay import AgentAway, LogRelay
from dure.manager.model import KernelPhase
from dure.manager.store import Store, now_ms
from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import LogChunk
from dure.wire import errors, names
from dure.wire.errors import Violation
from dure.wire.seen import LinesSeen

READS_MAX = 256
# Of one read. Who has more replicas names the one that matters.
KERNELS_MAX = 64
CHUNKS_MAX = 8
# Somebody who pages through what came holds everything up for that long, then is cut off.
SENDING_WAIT_S = 600.0
# New replicas are looked for when the endpoint changed, at most this often, and at least this often.
LOOK_PAUSE_S, LOOK_MAX_S = 0.2, 5.0
# A replica that ended is still looked for, and its agent waited for, that long.
ENDED_SHOWN_MS = 60_000
AGAIN_S = 1.0
LINES_MAX = 1_000_000


@dataclass(frozen=True)
class Wanted:
    """What to read. `replica_uid` and `kernel` empty: of all."""

    endpoint_uid: str
    replica_uid: str = ""
    kernel: str = ""
    follow: bool = False
    tail_lines: int = 0
    max_age_ms: int = 0
    previous: bool = False


@dataclass(frozen=True)
class _Source:
    """One log."""

    kernel_uid: str
    replica_uid: str
    kernel: str
    agent_uid: str
    agent: str
    reported: bool

    def chunk(self, notice: str = "") -> LogChunk:
        return LogChunk(replica=self.replica_uid, kernel=self.kernel, notice=notice)


class LogReader:
    """See `read`."""

    def __init__(self, store: Store, fleet: Fleet, relay: LogRelay) -> None:
        self._store = store
        self._fleet = fleet
        self._relay = relay
        self._open = 0

    async def serve(self, request: endpoint_pb2.ReadLogsRequest, context: Any) -> None:
        """Answers ReadLogs."""
        wanted = await self._wanted(request)
        async with contextlib.aclosing(self._read(wanted)) as chunks:
            async for chunk in chunks:
                async with asyncio.timeout(SENDING_WAIT_S):
                    await context.write(endpoint_pb2.ReadLogsResponse(chunk=chunk))

    def read(self, endpoint_uid: str, *, follow: bool) -> AsyncGenerator[LogChunk, None]:
        """All that the sessions of an endpoint wrote; with `follow` until it is deleted. Close it
        (`contextlib.aclosing`) when leaving it early."""
        return self._read(Wanted(endpoint_uid, follow=follow))

    async def _wanted(self, request: endpoint_pb2.ReadLogsRequest) -> Wanted:
        max_age_ms = int(request.max_age.ToMilliseconds())
        violations = []
        if not 0 <= request.tail_lines <= LINES_MAX:
            violations.append(Violation("tail_lines", f"must be from 0 (all) to {LINES_MAX}"))
        if max_age_ms < 0:
            violations.append(Violation("max_age", "must not be negative"))
        if request.follow and request.previous:
            violations.append(Violation("follow", "has no meaning for replicas that have ended (previous)"))
        if violations:
            raise errors.InvalidInput.of(violations)
        endpoint_name, replica_uid = request.name, ""
        if "/replicas/" in request.name:
            project, endpoint, replica_uid = names.parse(request.name, "projects/{}/endpoints/{}/replicas/{}")
            endpoint_name = names.endpoint(project, endpoint)
        async with self._store.read() as session:
            _, row = await scope.endpoint(session, endpoint_name)
            if replica_uid:
                replica = await session.get(schema.Replica, replica_uid)
                if replica is None or replica.endpoint_uid != row.uid:
                    raise errors.NotFound(
                        f"endpoint `{row.name}` has no replica `{replica_uid}`; `dure endpoint replicas "
                        f"{row.name} --all` lists them",
                        reason="REPLICA_NOT_FOUND",
                    )
        return Wanted(
            endpoint_uid=row.uid,
            replica_uid=replica_uid,
            kernel=request.kernel,
            follow=request.follow,
            tail_lines=request.tail_lines,
            max_age_ms=max_age_ms,
            previous=request.previous,
        )

    async def _read(self, wanted: Wanted) -> AsyncGenerator[LogChunk, None]:
        if self._open >= READS_MAX:
            raise errors.ResourceExhausted(f"{READS_MAX} readers of logs are there; try again later")
        self._open += 1
        queue: asyncio.Queue[LogChunk | None] = asyncio.Queue(CHUNKS_MAX)
        reading = asyncio.create_task(self._read_all(wanted, queue))
        try:
            while (chunk := await queue.get()) is not None:
                yield chunk
            await reading
        finally:
            self._open -= 1
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read_all(self, wanted: Wanted, queue: asyncio.Queue[LogChunk | None]) -> None:
        tasks: dict[str, asyncio.Task[None]] = {}
        changed = asyncio.Event()

        def listen(_revision: int, keys: Iterable[tuple[str, str]]) -> None:
            if ("endpoint", wanted.endpoint_uid) in keys:
                changed.set()

        unlisten = self._store.listen(listen)
        try:
            await self._begin_all(wanted, queue, tasks, changed)
            await asyncio.gather(*tasks.values())
        finally:
            unlisten()
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            # Only a reader that is still there waits for it.
            current = asyncio.current_task()
            if current is not None and not current.cancelling():
                await queue.put(None)

    async def _begin_all(
        self,
        wanted: Wanted,
        queue: asyncio.Queue[LogChunk | None],
        tasks: dict[str, asyncio.Task[None]],
        changed: asyncio.Event,
    ) -> None:
        """Begins to read each kernel's log; with `follow` goes on to look for new ones."""
        since_ms, first = now_ms(), True
        expected: set[str] = set()
        while True:
            changed.clear()
            sources, over = await self._sources(wanted, since_ms)
            since_ms = max(since_ms, now_ms() - ENDED_SHOWN_MS)
            expected.clear()
            if not over:
                expected.update(source.kernel_uid for source in sources)
            if first:
                notice = _notice(wanted, sources)
                if notice:
                    await queue.put(LogChunk(notice=notice))
            for source in sources:
                # One that its agent has not reported cannot be read yet.
                if source.kernel_uid in tasks or (wanted.follow and not source.reported):
                    continue
                if sum(not task.done() for task in tasks.values()) >= KERNELS_MAX:
                    break
                task = asyncio.create_task(self._read_one(wanted, source, queue, expected, whole=not first))
                tasks[source.kernel_uid] = task
            if over or not wanted.follow:
                return
            first = False
            for uid in [uid for uid, task in tasks.items() if task.done() and uid not in expected]:
                tasks.pop(uid).result()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_MAX_S):
                    await changed.wait()
            await asyncio.sleep(LOOK_PAUSE_S)

    async def _sources(self, wanted: Wanted, since_ms: int) -> tuple[list[_Source], bool]:
        """The logs to read, and whether no more can come. Raises NotFound."""
        async with self._store.read() as session:
            replicas = await _replicas(session, wanted, since_ms)
            endpoint = await session.get(schema.Endpoint, wanted.endpoint_uid)
            over = endpoint is None or endpoint.deleted_ms is not None
            if wanted.replica_uid:
                over = over or all(replica.ended_ms is not None for replica in replicas)
            rows = await session.execute(
                select(schema.Kernel, schema.Agent.name)
                .outerjoin(schema.Agent, schema.Agent.uid == schema.Kernel.agent_uid)
                .where(schema.Kernel.replica_uid.in_([replica.uid for replica in replicas]))
            )
            found = [
                _Source(
                    kernel_uid=row.uid,
                    replica_uid=row.replica_uid,
                    kernel=f"{row.role}{row.index}",
                    agent_uid=row.agent_uid,
                    agent=agent or row.agent_uid,
                    reported=row.phase != KernelPhase.ASSIGNED,
                )
                for row, agent in rows
            ]
        sources = [source for source in found if wanted.kernel in ("", source.kernel)]
        if found and not sources:
            there = ", ".join(sorted({source.kernel for source in found}))
            raise errors.NotFound(
                f"no kernel `{wanted.kernel}`; there are {there}", reason="KERNEL_NOT_FOUND"
            )
        return sorted(sources, key=lambda source: (source.replica_uid, source.kernel)), over

    async def _read_one(
        self,
        wanted: Wanted,
        source: _Source,
        queue: asyncio.Queue[LogChunk | None],
        expected: set[str],
        *,
        whole: bool,
    ) -> None:
        """Reads one log to its end; if it is followed across absences of its agent, as long as it is
        `expected`: more may come."""
        request = fleet_pb2.LogRequest(kernel_uid=source.kernel_uid, follow=wanted.follow)
        if not whole:
            request.tail_lines, request.max_age_ms = wanted.tail_lines, wanted.max_age_ms
        seen, said = LinesSeen(), ""
        while True:
            notice = ""
            try:
                async with contextlib.aclosing(self._relay.read(source.agent_uid, request)) as messages:
                    async for message in messages:
                        notice = message.notice
                        # What is tried again and again is said once.
                        chunk = source.chunk(notice if notice != said else "")
                        for line in message.lines:
                            if seen.is_new(line.time_ms):
                                chunk.lines.append(_line(line))
                                # Asked once more, it is for what comes after the lines that were shown.
                                request.tail_lines = request.max_age_ms = 0
                        said = notice or ("" if chunk.lines else said)
                        if chunk.lines or chunk.notice:
                            await queue.put(chunk)
                return
            except AgentAway:
                if not notice:
                    when = "its logs come when it is back" if wanted.follow else "try again when it is back"
                    notice = f"agent {source.agent} is away; {when}"
                    if notice != said:
                        await queue.put(source.chunk(notice))
                    said = notice
            if not wanted.follow:
                return
            await asyncio.sleep(AGAIN_S)
            if source.kernel_uid not in expected:
                return
            seen.begin_again()


async def _replicas(session: AsyncSession, wanted: Wanted, since_ms: int) -> list[schema.Replica]:
    query = select(schema.Replica).where(schema.Replica.endpoint_uid == wanted.endpoint_uid)
    if wanted.replica_uid:
        query = query.where(schema.Replica.uid == wanted.replica_uid)
    elif wanted.previous:
        ran = select(schema.Kernel.uid).where(schema.Kernel.replica_uid == schema.Replica.uid).exists()
        query = query.where(schema.Replica.ended_ms.is_not(None), ran)
        query = query.order_by(schema.Replica.ended_ms.desc()).limit(1)
    else:
        # Also one that came and went between two looks: what it wrote says why.
        query = query.where(or_(schema.Replica.ended_ms.is_(None), schema.Replica.ended_ms >= since_ms))
    return list(await session.scalars(query))


def _notice(wanted: Wanted, sources: list[_Source]) -> str:
    if len(sources) > KERNELS_MAX:
        return f"there are {len(sources)} kernels; {KERNELS_MAX} of them are read: name a replica"
    if sources or wanted.follow:
        return ""
    if wanted.previous:
        return "no replica has ended, or its log is not kept any more"
    if wanted.replica_uid:
        return "this replica has not been given a place yet"
    return "no replica runs: ask for the previous one (--previous), or what happened (`dure endpoint events`)"


def _line(line: fleet_pb2.LogLine) -> endpoint_pb2.LogLine:
    time = timestamp_pb2.Timestamp()
    time.FromMilliseconds(max(0, line.time_ms))
    return endpoint_pb2.LogLine(time=time, text=line.text.decode(errors="replace"))
