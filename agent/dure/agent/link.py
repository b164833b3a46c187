"""The agent's stream to the manager: joins once, says Hello, reports, beats, and comes back when it broke."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from dure.agent.device_watch import DeviceWatch
from dure.agent.log_sender import LogSender
from dure.agent.measurer import Measurer
from dure.agent.storage import ManagerStorage
from dure.agent.supervisor import Supervisor
from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.wire import identity
from dure.wire.backoff import backoff_s
from dure.wire.channel import bearer
from dure.wire.errors import (
    AlreadyExists,
    DureError,
    FailedPrecondition,
    InvalidInput,
    ManagerUnreachable,
    PermissionDenied,
    Unauthenticated,
    from_rpc,
)
from dure.wire.identity import Identity

ANSWER_LIMIT_S = 10.0
BEATS_MISSED_MAX = 3
RECONNECT_FIRST_S, RECONNECT_MAX_S = 0.1, 1.0
# A message stays well below 1 MiB: 256 log tails alone could fill one.
REPORT_KERNELS_MAX = 256
REPORT_BYTES_MAX = 512 * 1024
_Call = Any  # grpc.aio.StreamStreamCall; its stubs disagree with themselves on what read() returns
_log = logging.getLogger(__name__)


class Refused(Exception):
    """The manager does not let this agent join; trying again with the same token would not help."""


class Link:
    """`run` goes on until it is cancelled; only a join that is refused ends it. `hello` is asked at the begin
    of every stream; what the watch tells later follows it."""

    def __init__(
        self,
        *,
        name: str,
        home: Path,
        join_token: str,
        hello: Callable[[], fleet_pb2.Hello],
        stub: fleet_pb2_grpc.FleetServiceAsyncStub,
        supervisor: Supervisor,
        storage: ManagerStorage,
        logs: LogSender,
        measurer: Measurer,
        watch: DeviceWatch,
    ) -> None:
        self._name = name
        self._home = home
        self._join_token = join_token
        self._hello = hello
        self._stub = stub
        self._supervisor = supervisor
        self._storage = storage
        self._logs = logs
        self._measurer = measurer
        self._watch = watch
        self._told = "not connected"
        self.connected = False
        # Streams that were welcomed since the agent's start.
        self.streams = 0

    async def run(self) -> None:
        """Raises Refused."""
        attempt = 0
        while True:
            began_s = time.monotonic()
            try:
                who = identity.load(self._home) or await self._join()
                await self._stream(who)
                self._tell("ended", "the manager ended the stream; connecting again")
            except Unauthenticated as error:
                self._tell(
                    error.reason,
                    f"the manager does not know this agent ({error}); if it was removed there, "
                    f"delete {self._home / 'identity.toml'} and join again with --join-token",
                )
            except DureError as error:
                self._tell(error.reason, f"no stream to the manager ({error.reason}: {error}); trying again")
            # A stream that held for a while is no failed attempt.
            attempt = 1 if time.monotonic() - began_s > RECONNECT_MAX_S * 5 else attempt + 1
            await asyncio.sleep(
                backoff_s(attempt, first_s=RECONNECT_FIRST_S, max_s=RECONNECT_MAX_S, jitter=random.random())
            )

    async def _join(self) -> Identity:
        try:
            async with asyncio.timeout(ANSWER_LIMIT_S):
                answer = await self._stub.Join(
                    fleet_pb2.JoinRequest(agent=self._name), metadata=bearer(self._join_token)
                )
        except TimeoutError as error:
            raise ManagerUnreachable(f"no answer to Join within {ANSWER_LIMIT_S:g} s") from error
        except grpc.aio.AioRpcError as error:
            raised = from_rpc(error)
            if isinstance(
                raised, (Unauthenticated, PermissionDenied, AlreadyExists, InvalidInput, FailedPrecondition)
            ):
                raise Refused(f"the manager refused to let `{self._name}` join: {raised}") from error
            raise raised from error
        who = Identity(uid=answer.uid, credential=answer.credential)
        identity.save(self._home, who)
        _log.info("joined as %s (%s)", self._name, who.uid)
        return who

    async def _stream(self, who: Identity) -> None:
        """One stream from Hello to its end. Raises DureError when it broke."""
        call: _Call = self._stub.Connect(metadata=bearer(who.credential))
        try:
            await _within(call.write(fleet_pb2.ConnectRequest(hello=self._hello())), ANSWER_LIMIT_S)
            for observed in reports(self._supervisor.begin_stream(), complete=True):
                await _within(call.write(fleet_pb2.ConnectRequest(observed=observed)), ANSWER_LIMIT_S)
            first = await _within(call.read(), ANSWER_LIMIT_S)
            if first is grpc.aio.EOF or first.WhichOneof("message") != "welcome":
                raise FailedPrecondition("the manager did not answer Hello with Welcome")
            self._storage.announce(who.credential, first.welcome)
            self._tell("", "connected to the manager")
            self._measurer.begin_stream()
            self.connected = True
            self.streams += 1
            interval_s = max(first.welcome.heartbeat_interval_ms, 100) / 1000
            await self._converse(call, interval_s, who)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error
        except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            # Written to a call that has just ended: its status tells more.
            raise ManagerUnreachable(str(call.details() if call.done() else error)) from error
        finally:
            self.connected = False
            call.cancel()

    async def _converse(self, call: _Call, interval_s: float, who: Identity) -> None:
        beats = _Beats(interval_s)
        tasks = [
            asyncio.create_task(self._listen(call, beats, who)),
            asyncio.create_task(self._speak(call, beats)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        # The listener knows best why a stream ended.
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _listen(self, call: _Call, beats: _Beats, who: Identity) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            kind = message.WhichOneof("message")
            if kind == "desired":
                try:
                    self._supervisor.apply(message.desired)
                except ValueError as error:
                    raise FailedPrecondition(f"the manager sent nonsense: {error}") from error
            elif kind == "heartbeat_ack":
                beats.acknowledged_s = time.monotonic()
            elif kind == "log_request":
                self._logs.answer(who.credential, message.log_request)
            elif kind == "measure_interval":
                self._measurer.set_interval(message.measure_interval.interval_ms)

    async def _speak(self, call: _Call, beats: _Beats) -> None:
        while True:
            await beats.wait_with(self._supervisor.changed)
            if beats.is_due():
                if beats.are_lost():
                    raise ManagerUnreachable(f"no answer to {BEATS_MISSED_MAX} heartbeats")
                beat = fleet_pb2.Heartbeat(sequence=beats.next_sequence())
                await _within(call.write(fleet_pb2.ConnectRequest(heartbeat=beat)), beats.limit_s)
            # First: nobody should be placed again on a device whose kernels are about to fail.
            if (news := self._watch.take()) is not None:
                await _within(call.write(fleet_pb2.ConnectRequest(devices_changed=news)), beats.limit_s)
            for observed in reports(self._supervisor.take_changes(), complete=False):
                await _within(call.write(fleet_pb2.ConnectRequest(observed=observed)), beats.limit_s)
            # Last: what happened to kernels is worth more than what they use.
            for measurements in batches(self._measurer.take()):
                await _within(call.write(fleet_pb2.ConnectRequest(measurements=measurements)), beats.limit_s)

    def _tell(self, state: str, message: str) -> None:
        """Logs a change of state once, however often it is tried; an empty state is the good one."""
        if state == self._told:
            return
        _log.log(logging.WARNING if state else logging.INFO, "%s", message)
        self._told = state


class _Beats:
    """When to beat, and whether anybody answers."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._sequence = 0
        self._next_s = time.monotonic()
        self.acknowledged_s = time.monotonic()
        self.limit_s = interval_s * BEATS_MISSED_MAX

    async def wait_with(self, changed: asyncio.Event) -> None:
        """Until a beat is due or something changed."""
        try:
            async with asyncio.timeout(max(0.0, self._next_s - time.monotonic())):
                await changed.wait()
        except TimeoutError:
            return

    def is_due(self) -> bool:
        return time.monotonic() >= self._next_s

    def are_lost(self) -> bool:
        return time.monotonic() - self.acknowledged_s > self.limit_s

    def next_sequence(self) -> int:
        self._sequence += 1
        self._next_s = time.monotonic() + self._interval_s
        return self._sequence


def reports(statuses: Sequence[fleet_pb2.KernelStatus], complete: bool) -> Iterator[fleet_pb2.Observed]:
    """Cuts statuses into messages; the last bears `complete`. None at all make a message if it is set."""
    piece = fleet_pb2.Observed()
    size_bytes = 0
    for status in statuses:
        status_bytes = status.ByteSize()
        if len(piece.kernels) == REPORT_KERNELS_MAX or (
            piece.kernels and size_bytes + status_bytes > REPORT_BYTES_MAX
        ):
            yield piece
            piece = fleet_pb2.Observed()
            size_bytes = 0
        piece.kernels.append(status)
        size_bytes += status_bytes
    piece.complete = complete
    if piece.kernels or complete:
        yield piece


def batches(measured: Sequence[fleet_pb2.KernelMeasurement]) -> Iterator[fleet_pb2.Measurements]:
    """Cuts a round into messages; a round of nothing makes none."""
    for start in range(0, len(measured), REPORT_KERNELS_MAX):
        yield fleet_pb2.Measurements(kernels=measured[start : start + REPORT_KERNELS_MAX])


async def _within(awaitable: Any, limit_s: float) -> Any:
    try:
        async with asyncio.timeout(limit_s):
            return await awaitable
    except TimeoutError as error:
        raise ManagerUnreachable(f"the manager did not answer within {limit_s:g} s") from error
