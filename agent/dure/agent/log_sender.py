"""Answers the manager's requests for logs: one call of SendLogs for each, at the pace of its reader."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from dure.agent.log_archive import LogArchive
from dure.agent.log_files import Line, LogCursor
from dure.agent.shim.log import now_ms
from dure.agent.waiting import in_thread
from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.wire.channel import bearer

READERS_MAX = 32
# Those beyond READERS_MAX are told so; beyond this they are not even answered.
ANSWERS_MAX = 4 * READERS_MAX
MESSAGE_BYTES_MAX = 192 * 1024
# A log is looked at this often: soon after it grew, seldom while it is quiet.
LOOK_FIRST_S, LOOK_MAX_S = 0.05, 0.5
_log = logging.getLogger(__name__)
_Call = Any  # grpc.aio.StreamUnaryCall


class LogSender:
    """Reads logs for the manager. `ended` tells whether a kernel writes no more."""

    def __init__(
        self,
        stub: fleet_pb2_grpc.FleetServiceAsyncStub,
        archive: LogArchive,
        ended: Callable[[str], bool],
    ) -> None:
        self._stub = stub
        self._archive = archive
        self._ended = ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading = 0

    def answer(self, credential: str, request: fleet_pb2.LogRequest) -> None:
        """Begins an answer; it goes on until it is complete or the manager ends it."""
        if len(self._tasks) >= ANSWERS_MAX:
            _log.warning("refused a request for the log of kernel %s: too many", request.kernel_uid)
            return
        task = asyncio.create_task(self._answer(credential, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Breaks off all answers."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, credential: str, request: fleet_pb2.LogRequest) -> None:
        call: _Call = self._stub.SendLogs(metadata=bearer(credential))
        try:
            # At once, so that the manager knows that somebody answers.
            await call.write(fleet_pb2.SendLogsRequest(request_id=request.request_id))
            notice, complete = "", True
            if self._reading >= READERS_MAX:
                notice, complete = f"this node sends {READERS_MAX} logs already; try again later", False
            elif not _is_name(request.kernel_uid) or self._archive.locate(request.kernel_uid) is None:
                notice = "its node does not keep its log any more"
            else:
                self._reading += 1
                try:
                    await self._read(call, request)
                finally:
                    self._reading -= 1
            await call.write(
                fleet_pb2.SendLogsRequest(request_id=request.request_id, notice=notice, complete=complete)
            )
            await call.done_writing()
            await call
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            # The manager has heard enough, or is gone; whoever wanted the log asks again.
            return
        except OSError as error:
            _log.warning("cannot read the log of kernel %s: %s", request.kernel_uid, error)
        finally:
            call.cancel()

    async def _read(self, call: _Call, request: fleet_pb2.LogRequest) -> None:
        def locate() -> Path | None:
            return self._archive.locate(request.kernel_uid)

        cursor = LogCursor(locate)
        try:
            not_before_ms = now_ms() - request.max_age_ms if request.max_age_ms > 0 else 0
            await in_thread(
                cursor.begin,
                tail_lines=max(0, request.tail_lines),
                not_before_ms=not_before_ms,
                follow=request.follow,
            )
            await self._send_all(call, request, cursor)
        finally:
            cursor.close()

    async def _send_all(self, call: _Call, request: fleet_pb2.LogRequest, cursor: LogCursor) -> None:
        pause_s = LOOK_FIRST_S
        while not call.done():
            # Asked before reading: of one that had ended by now everything is there.
            over = not request.follow or self._ended(request.kernel_uid)
            lines = await in_thread(cursor.read)
            if not lines and over:
                lines = cursor.rest()
                await _send(call, request.request_id, lines, "")
                return
            if lines:
                notice, cursor.notice = cursor.notice, ""
                await _send(call, request.request_id, lines, notice)
                pause_s = LOOK_FIRST_S
                continue
            while not (call.done() or self._ended(request.kernel_uid) or cursor.has_more()):
                await asyncio.sleep(pause_s)
                pause_s = min(LOOK_MAX_S, pause_s * 2)
            # Many lines in one message, not a message for each.
            await asyncio.sleep(LOOK_FIRST_S)


async def _send(call: _Call, request_id: str, lines: Sequence[Line], notice: str) -> None:
    message = fleet_pb2.SendLogsRequest(request_id=request_id, notice=notice)
    size_bytes = 0
    for time_ms, text in lines:
        # A line of one byte takes 14 on the wire.
        size_bytes += len(text) + 16
        if size_bytes > MESSAGE_BYTES_MAX:
            await call.write(message)
            message, size_bytes = fleet_pb2.SendLogsRequest(request_id=request_id), len(text) + 16
        message.lines.add(time_ms=time_ms, text=text)
    if message.lines or message.notice:
        await call.write(message)


def _is_name(uid: str) -> bool:
    # It becomes a path.
    return bool(uid) and all(one.isascii() and (one.isalnum() or one == "-") for one in uid)
